"""How the adapter of a model is found, and what is refused before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from dcp_prune.errors import UnsupportedModelError
from dcp_prune.models import get_adapter, supported_architectures
from dcp_prune.models.llava import LlavaAdapter


def test_llava_is_found_by_class_and_by_parent_class(model: Any) -> None:
    class MyLlava(type(model)):
        pass

    assert isinstance(get_adapter(model), LlavaAdapter)
    model.__class__ = MyLlava
    assert isinstance(get_adapter(model), LlavaAdapter)


def test_a_model_without_adapter_is_refused_with_the_list_of_supported_ones() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no adapter") as error:
        get_adapter(llama)
    for name in supported_architectures():
        assert name in str(error.value)
    page = re.search(r"docs/how-to/[\w-]+\.md", str(error.value))
    assert page is not None, "it says where to read how to write one"
    assert (Path(__file__).parents[2] / page[0]).is_file()


def test_a_near_name_is_suggested() -> None:
    class LlavaNextVideoForConditionalGeneration(torch.nn.Module):
        pass

    with pytest.raises(UnsupportedModelError, match="nearest is LlavaNextForConditionalGeneration"):
        get_adapter(LlavaNextVideoForConditionalGeneration())


def test_a_compiled_wrapper_is_refused_with_the_way_out(model: Any) -> None:
    with pytest.raises(
        UnsupportedModelError, match="wraps a LlavaForConditionalGeneration; attach to that model first"
    ):
        get_adapter(torch.compile(model, backend="eager"))


def test_an_encoder_decoder_model_is_refused() -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        get_adapter(t5)


def test_tensor_parallelism_is_refused(model: Any) -> None:
    model._tp_size = 2
    with pytest.raises(UnsupportedModelError, match="tensor parallelism"):
        get_adapter(model)
    model._tp_size = 1
    get_adapter(model)


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("vision_feature_layer", [-2, -1], "is the list [-2, -1]"),
        ("vision_feature_layer", 0, "is the output of no layer"),
        ("vision_feature_layer", 9, "is the output of no layer"),
        ("vision_feature_select_strategy", "full", "passes on [CLS]"),
    ],
)
def test_a_llava_set_up_in_a_way_that_cannot_be_pruned_is_refused(
    model: Any, setting: str, value: object, sentence: str
) -> None:
    setattr(model.config, setting, value)
    with pytest.raises(UnsupportedModelError, match=re.escape(sentence)):
        get_adapter(model)


def test_a_tower_of_an_unknown_kind_is_refused_by_name(model: Any) -> None:
    del model.model.vision_tower.embeddings.class_embedding
    del model.model.vision_tower.embeddings.patch_embedding
    with pytest.raises(UnsupportedModelError, match=re.escape("CLIPVisionModel is no CLIP, DINOv2 or SigLIP encoder")):
        get_adapter(model)
