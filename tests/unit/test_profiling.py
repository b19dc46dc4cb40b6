"""Counted costs against costs measured on a tiny LLaVA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dcp_prune.profiling.architectures import build_model as build_random
from dcp_prune.profiling.architectures import get_architecture
from dcp_prune.profiling.counting import Hollow
from dcp_prune.profiling.flops import llava_prefill_flops
from dcp_prune.profiling.memory import kv_cache_bytes

IMAGE_TOKEN = 99
PATCHES = 16


def tiny_config() -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=7,
        ),
        text_config=LlamaConfig(
            hidden_size=64,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=100,
        ),
        image_token_index=IMAGE_TOKEN,
    )


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    # The counter knows the products of eager attention; those of the CPU's fused kernel escape it.
    torch.manual_seed(0)
    return LlavaForConditionalGeneration._from_config(tiny_config(), attn_implementation="eager").eval()


def prefill(model: LlavaForConditionalGeneration, visual_tokens: int = PATCHES) -> tuple[int, DynamicCache]:
    """Operations that torch counted, and the cache."""
    input_ids = torch.tensor([[1] + [IMAGE_TOKEN] * visual_tokens + [5, 6, 7]])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(input_ids=input_ids, pixel_values=torch.rand(1, 3, 28, 28), logits_to_keep=1, use_cache=True)
    return counter.get_total_flops(), output.past_key_values


def test_the_analytic_prefill_equals_what_torch_counts(model):
    counted, _ = prefill(model)
    assert llava_prefill_flops(model.config, text_tokens=4, visual_tokens=PATCHES).total == counted


def test_an_encoder_stage_saves_exactly_the_operations_that_torch_no_longer_counts(model):
    def drop_to_six(module, args, output):
        return output[:, :7]  # [CLS] and six patches

    hook = model.model.vision_tower.encoder.layers[0].register_forward_hook(drop_to_six, prepend=True)
    try:
        counted, _ = prefill(model, visual_tokens=6)
    finally:
        hook.remove()
    analytic = llava_prefill_flops(model.config, text_tokens=4, visual_tokens=6, stages=[(0, 6)])
    assert analytic.total == counted
    assert analytic.vision < llava_prefill_flops(model.config, text_tokens=4, visual_tokens=6).vision


def test_the_cache_holds_keys_and_values_of_every_layer_and_token(model):
    _, cache = prefill(model)
    layers, tokens, key_value_heads, head_width, bytes_per_number = 2, 4 + PATCHES, 2, 16, 4
    assert kv_cache_bytes(cache) == 2 * layers * tokens * key_value_heads * head_width * bytes_per_number


def test_counting_without_weights_equals_the_formula_to_one_per_cent_for_a_7b_model():
    config: Any = get_architecture("llava-1.5-7b").config()
    hollow = Hollow(type(build_random(config, device="meta")), config, torch.bfloat16)
    images = {"pixel_values": torch.zeros(1, 3, 336, 336)}
    for visual, stages in ((576, []), (64, [(6, 300), (12, 200)])):
        encoder = hollow.encoder_flops(images, stages)
        prefill = hollow.prefill(1, 40 + visual)
        analytic = llava_prefill_flops(config, text_tokens=40, visual_tokens=visual, stages=stages, encoder_layers=23)
        assert encoder == pytest.approx(analytic.vision + analytic.projector, rel=0.01)
        assert prefill.flops == pytest.approx(analytic.language, rel=0.01)
        assert prefill.cache_bytes == 2 * 32 * 4096 * 2 * (40 + visual)


def test_an_unused_cache_is_refused():
    with pytest.raises(ValueError, match="measure it after the prefill"):
        kv_cache_bytes(DynamicCache())
