"""Every argument of every family's `forward` is settled: shortened in a way that is known, or free of any length."""

from __future__ import annotations

import inspect

import pytest
from families import FAMILIES, Family
from transformers.utils.generic import TransformersKwargs

from dcp_prune.integrations.transformers.arguments import SHORTENED_OTHERWISE
from dcp_prune.models import get_adapter

ROWS_BY_COLUMNS = {"input_ids", "labels", "token_type_ids", "mm_token_type_ids", "seq_idx"}
OF_ANOTHER_KIND = {"inputs_embeds", "past_key_values", "mm_encoder_outputs"}  # refused, cut by its keys, made anew
WITHOUT_LENGTH = {"use_cache", "is_causal", "output_hidden_states", "output_attentions", "output_router_logits"}
BESIDE_THE_PIXELS = {"image_sizes"}  # which InternVL takes, but has no use for


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_argument_of_a_family_is_settled(family: Family) -> None:
    adapter = get_adapter(family.model)
    named = set(inspect.signature(type(family.model).forward).parameters) - {"self", "kwargs"}
    visual = {*adapter.image_inputs, *adapter.unpruned_inputs, *(adapter.video.image_inputs if adapter.video else ())}
    settled = ROWS_BY_COLUMNS | set(SHORTENED_OTHERWISE) | OF_ANOTHER_KIND | WITHOUT_LENGTH | visual
    unsettled = (named | set(TransformersKwargs.__annotations__)) - settled - BESIDE_THE_PIXELS
    assert not unsettled
