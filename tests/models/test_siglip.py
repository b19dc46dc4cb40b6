"""Towers without [CLS]: attention received in its place, padding, and PaliGemma's positions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, make_picture

from dcp_prune.functional.attention import received_attention
from dcp_prune.integrations.transformers import encode_images, prune, prune_inputs
from dcp_prune.registry import make_pruner

PROMPT = "USER: <image> what is this ASSISTANT:"
SIGLIP = [family for family in FAMILIES if family.name in ("llava_onevision", "paligemma")]


@pytest.fixture(params=SIGLIP, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def paligemma() -> Family:
    return next(family for family in FAMILIES if family.name == "paligemma")


def test_saliency_is_the_attention_that_eager_attention_lets_a_token_receive(family: Family) -> None:
    model = copy.deepcopy(family.model)
    inputs = family.make_inputs([PROMPT], [make_picture(3, (56, 112))])
    details = {name: inputs[name] for name in ("image_sizes", "batch_num_images") if name in inputs}
    tokens = encode_images(model, inputs["pixel_values"], make_pruner("cls_attention", num_tokens=4), **details).tokens
    assert tokens.encoder is not None
    assert tokens.encoder.cls_attention is not None
    model.set_attn_implementation("eager")
    tower: Any = model.model.vision_tower
    pixels = inputs["pixel_values"]
    maps = tower(pixels[0] if pixels.ndim == 5 else pixels, output_attentions=True).attentions
    received = maps[-1].mean(dim=1).mean(dim=1)[0]
    # The first tile comes first in the prompt.
    torch.testing.assert_close(tokens.encoder.cls_attention[0, : len(received)], received)


@pytest.mark.parametrize("block_size", [2, 5, 64])
def test_padding_neither_asks_nor_receives(block_size: int) -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 4)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    found = received_attention(queries, keys, mask=mask, block_size=block_size)
    torch.testing.assert_close(found[0], received_attention(queries[:1], keys[:1])[0])
    torch.testing.assert_close(found[1, :5], received_attention(queries[1:, :5], keys[1:, :5])[0])
    assert not found[1, 5:].any()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("first", [0, 1])
def test_positions_of_paligemma_begin_where_the_caller_began(paligemma: Family, first: int) -> None:
    inputs = paligemma.make_inputs([PROMPT, "<image> what"], [make_picture(n, (84, 84)) for n in range(2)])
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0) + first
    short = prune_inputs(paligemma.model, inputs | {"position_ids": positions}, make_pruner("random", num_tokens=6))
    mask = short.tensors["attention_mask"]
    real = short.tensors["position_ids"][mask.bool()]
    assert torch.equal(real, ((mask.cumsum(1) - 1) + first)[mask.bool()])


def test_token_types_are_shortened_with_the_ids(paligemma: Family) -> None:
    inputs = paligemma.make_inputs([PROMPT], [make_picture(0, (84, 84))])
    inputs["token_type_ids"][:, -2:] = 1
    short = prune_inputs(paligemma.model, inputs, make_pruner("dcp", num_tokens=6))
    assert short.tensors["token_type_ids"].shape == short.tensors["input_ids"].shape
    assert short.tensors["token_type_ids"][0, -3:].tolist() == [0, 1, 1]


def test_paligemma_pruned_in_generate_and_in_a_plain_call_begins_with_the_same_token(paligemma: Family) -> None:
    inputs = paligemma.make_inputs([PROMPT], [make_picture(0, (84, 84))])
    model = copy.deepcopy(paligemma.model)
    with prune(model, make_pruner("dcp_progressive", num_tokens=6)):
        answer = model.generate(**inputs, max_new_tokens=1)
        with torch.no_grad():
            logits = model(**inputs).logits
    assert answer[0, -1] == logits[0, -1].argmax()
