"""LLaVA with towers of other kinds than CLIP: DINOv2 with and without registers, SigLIP."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from families import Family, LlavaDinov2, LlavaPlainDinov2, LlavaSiglip, make_picture

from dcp_prune.errors import UnsupportedModelError
from dcp_prune.integrations.transformers import encode_images, prune, prune_inputs
from dcp_prune.models import get_adapter
from dcp_prune.registry import make_pruner

PROMPT = "USER: <image> what is this ASSISTANT:"
TOWERS = (LlavaDinov2(), LlavaPlainDinov2(), LlavaSiglip())


@pytest.fixture(params=TOWERS, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Any:
    return request.param


def pixels() -> torch.Tensor:
    return torch.cat([TOWERS[0].make_inputs([PROMPT], [make_picture(n, (84, 84))])["pixel_values"] for n in range(2)])


def test_features_are_bit_equal_to_the_models_own(family: Family) -> None:
    encoded = encode_images(family.model, pixels(), make_pruner("uniform", num_tokens=36))
    own = family.own_features({"pixel_values": pixels()})
    assert torch.equal(encoded.tokens.features, torch.stack(own)[:, -36:])


def test_saliency_is_that_of_eager_attention(family: Family) -> None:
    tokens = encode_images(family.model, pixels(), make_pruner("cls_attention", num_tokens=4)).tokens
    model = copy.deepcopy(family.model)
    model.set_attn_implementation("eager")
    tower: Any = model.model.vision_tower
    attention = tower(pixels(), output_attentions=True).attentions[get_adapter(model).tower.num_layers - 1].mean(dim=1)
    row = attention.mean(dim=1) if family.name == "llava_siglip" else attention[:, 0]
    torch.testing.assert_close(tokens.encoder.cls_attention, row[:, -36:])


def test_stages_inside_the_encoder_run_and_keep_the_budget(family: Family) -> None:
    inputs = family.make_inputs([PROMPT], [make_picture(3, (84, 84))])
    short = prune_inputs(family.model, inputs, make_pruner("dcp_progressive", num_tokens=6))
    assert short.tensors["input_ids"].shape[1] == inputs["input_ids"].shape[1] - 30 - getattr(family, "prefix", 0)
    with prune(family.model, make_pruner("dcp_progressive", num_tokens=6)):
        answer = family.model.generate(**inputs, max_new_tokens=3)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3


def test_a_strategy_that_takes_cls_for_a_patch_is_refused() -> None:
    model = copy.deepcopy(LlavaPlainDinov2().model)
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedModelError, match=re.escape("passes on [CLS] like a patch")):
        get_adapter(model)
