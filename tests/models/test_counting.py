"""Costs counted without weights against what torch counts, and what a cache holds, when every family really runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, make_picture
from torch.utils.flop_counter import FlopCounterMode

from dcp_prune.integrations.transformers import prune_inputs
from dcp_prune.integrations.transformers.images import encode
from dcp_prune.models import get_adapter
from dcp_prune.profiling.counting import Hollow
from dcp_prune.profiling.memory import kv_cache_bytes
from dcp_prune.pruners.random import RandomPruner

IMAGES = [family for family in FAMILIES if family.modality == "image"]
LOOKS_INTO_PIXELS = {"idefics3", "smolvlm", "llava_onevision_scaled"}


@pytest.fixture(params=IMAGES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@torch.no_grad()
def test_counts_without_weights_equal_those_of_the_real_thing(family: Family) -> None:
    inputs = family.make_inputs(["what is <image> this dog"], [make_picture(0, (90, 90))])
    model: Any = copy.deepcopy(family.model)
    model.set_attn_implementation("eager")  # operations of some fused kernels are not counted
    hollow = Hollow(type(model), model.config)
    with FlopCounterMode(display=False) as encoder:
        encode(get_adapter(model), inputs, ())
    counted = hollow.encoder_flops(inputs)
    if family.name in LOOKS_INTO_PIXELS:
        assert counted is None
    else:
        assert counted == pytest.approx(encoder.get_total_flops(), rel=0.01)
    for pruner in (RandomPruner(num_tokens=2), RandomPruner(num_tokens=4)):
        short = prune_inputs(model, inputs, pruner)
        with FlopCounterMode(display=False) as language:
            cache = model(**short.inputs, use_cache=True, logits_to_keep=1).past_key_values
        prefill = hollow.prefill(1, short.tensors["input_ids"].shape[1])
        assert prefill.flops == pytest.approx(language.get_total_flops(), rel=0.01)
        assert prefill.cache_bytes == kv_cache_bytes(cache)
