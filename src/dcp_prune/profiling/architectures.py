"""Architectures with random weights, and inputs for them: what a model costs, without its weights at hand.

Random weights cost what trained ones do: no step of any pruner depends on what tokens say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
)

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import get_adapter

Images = Mapping[str, Tensor]
"""Model inputs that describe images."""
Draw = Callable[..., Tensor]
"""Normal numbers of a shape."""


@dataclass(frozen=True)
class Architecture:
    """A model without its weights.

    Attributes:
        summary: what it is, in words.
        config: makes its configuration.
        images: makes the inputs of so many images, of the size that the model is mostly used with.
    """

    summary: str
    config: Callable[[], PreTrainedConfig]
    images: Callable[[Any, int, Draw], Images]


def _llava(vision: dict[str, Any], text: dict[str, Any]) -> LlavaConfig:
    language = LlamaConfig(**text)
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=language, image_token_index=language.vocab_size - 1
    )


_VIT_L: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_LLAMA_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
}


def _tiny() -> LlavaConfig:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
    text = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    return _llava(
        {**vision, "image_size": 56, "patch_size": 7},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, **text},
    )


def _vit_l_1b() -> LlavaConfig:
    text = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    return _llava(_VIT_L, {**_LLAMA_7B, **text, "num_key_value_heads": 8, "tie_word_embeddings": True})


def _llava_next() -> LlavaNextConfig:
    language = LlamaConfig(**_LLAMA_7B)
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_VIT_L), text_config=language, image_token_index=language.vocab_size - 1
    )


def _qwen() -> Qwen2_5_VLConfig:
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text)


def _one_tile(config: LlavaConfig, count: int, draw: Draw) -> Images:
    size = config.vision_config.image_size  # type: ignore[union-attr]
    return {"pixel_values": draw(count, 3, size, size)}


def _four_tiles(config: LlavaNextConfig, count: int, draw: Draw) -> Images:
    size: int = config.vision_config.image_size  # type: ignore[union-attr, assignment]
    return {
        "pixel_values": draw(count, 5, 3, size, size),
        "image_sizes": torch.tensor([[2 * size, 2 * size]] * count),
    }


def _packed(config: Qwen2_5_VLConfig, count: int, draw: Draw) -> Images:
    vision: Any = config.vision_config
    side = 72  # 1,008 pixels
    channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": draw(count * side**2, channels),
        "image_grid_thw": torch.tensor([[1, side, side]] * count),
    }


ARCHITECTURES = {
    "tiny": Architecture("a LLaVA of toy size", _tiny, _one_tile),
    "vit-l-1b": Architecture("CLIP ViT-L/14-336 and a 1B-parameter Llama", _vit_l_1b, _one_tile),
    "llava-1.5-7b": Architecture("LLaVA-1.5-7B", lambda: _llava(_VIT_L, _LLAMA_7B), _one_tile),
    "llava-next-7b": Architecture("LLaVA-NeXT-7B, an overview and 2 x 2 tiles", _llava_next, _four_tiles),
    "qwen2.5-vl-7b": Architecture("Qwen2.5-VL-7B, 1008 x 1008 pixels", _qwen, _packed),
}
"""By the name that follows `random:`."""


def get_architecture(name: str) -> Architecture:
    """The architecture of this name.

    Raises:
        InvalidInputError: there is none.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    near = get_close_matches(name, ARCHITECTURES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(ARCHITECTURES)}"
    raise InvalidInputError(f"random:{name} is no architecture that is known here; {hint}")


def build_model(config: Any, dtype: torch.dtype = torch.float32, attention: str = "sdpa", device: str = "cpu") -> Any:
    """The model with random weights, always the same ones on a device; in evaluation mode."""
    torch.manual_seed(0)
    kind: Any = AutoModelForImageTextToText
    with torch.device(device):
        return kind.from_config(config, dtype=dtype, attn_implementation=attention).eval()


def make_inputs(model: Any, architecture: Architecture, *, batch: int = 1, text_tokens: int = 40) -> dict[str, Any]:
    """Prompts with one image each, in main memory: some words, the image, more words; all random, always the same.

    Args:
        model: of this architecture; its weights are not read.
        architecture: says what images look like.
        batch: prompts.
        text_tokens: of each prompt beside the image.
    """
    generator = torch.Generator().manual_seed(0)
    images = architecture.images(model.config, batch, lambda *shape: torch.randn(*shape, generator=generator))
    image_id = model.config.image_token_id
    length = len(get_adapter(model).layouts(images)[0])
    words = torch.randint(3, min(image_id, 1000), (batch, text_tokens), generator=generator)
    image = torch.full((batch, length), image_id)
    before = min(8, text_tokens - 1)
    if hasattr(model.config, "vision_start_token_id"):
        words[:, before - 1], words[:, before] = model.config.vision_start_token_id, model.config.vision_end_token_id
    input_ids = torch.cat((words[:, :before], image, words[:, before:]), dim=1)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **images}
    if hasattr(model.config, "vision_start_token_id"):
        inputs["mm_token_type_ids"] = (input_ids == image_id).int()
    return inputs


def move(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Inputs on the model's device, the pixels in its dtype."""

    def place(value: Any, floats: torch.dtype | None) -> Any:
        if isinstance(value, list | tuple):
            return [place(each, floats) for each in value]
        return value.to(model.device, floats) if isinstance(value, Tensor) else value

    pixels = get_adapter(model).image_inputs[0]
    return {name: place(value, model.dtype if name == pixels else None) for name, value in inputs.items()}
