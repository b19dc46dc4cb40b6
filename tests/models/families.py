"""Tiny models with random weights, one per family, and how each turns prompts and pictures into inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from conftest import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID, build_processor

TILE, PATCH = 56, 14
SIZES = ((90, 90), (60, 120), (100, 40))
"""(height, width) of pictures, which are cut into different numbers of tiles and padded on different sides."""


def make_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Coloured blocks."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (5, 5, 3), generator=generator, dtype=torch.uint8)
    height, width = size
    return Image.fromarray(blocks.numpy()).resize((width, height), Image.Resampling.NEAREST)


def text_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.15,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


class Family(ABC):
    """One architecture.

    Attributes:
        name: of the test.
        separated: whether the unpruned prompt holds separators, which are not kept.
    """

    name: str
    separated = False

    @abstractmethod
    def build(self) -> Any:
        """The model, in eval mode, with the seed set."""

    @abstractmethod
    def make_inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        """Prompts with `<image>`, padded on the left, and the pictures in their order."""

    @cached_property
    def model(self) -> Any:
        """Shared by all tests: never change it."""
        torch.manual_seed(0)
        model = self.build().eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD_ID
        return model

    def own_features(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """What the model itself makes of the images, one tensor each."""
        images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
        with torch.no_grad():
            return list(self.model.get_image_features(**images).pooler_output)


class LlavaNext(Family):
    name = "llava_next"
    separated = True

    def build(self) -> Any:
        vision = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=PATCH,
            initializer_factor=3.0,
        )
        config = LlavaNextConfig(
            vision_config=vision,
            text_config=text_config(),
            image_token_index=IMAGE_ID,
            image_grid_pinpoints=[[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]],
        )
        return LlavaNextForConditionalGeneration(config)

    @cached_property
    def processor(self) -> Any:
        plain = build_processor()
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=self.model.config.image_grid_pinpoints,
        )
        return LlavaNextProcessor(
            image_processor=images,
            tokenizer=plain.tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=plain.chat_template,
        )

    def make_inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        return dict(
            self.processor(
                text=list(prompts),
                images=list(pictures) or None,
                return_tensors="pt",
                padding=True,
                padding_side="left",
            )
        )


FAMILIES: tuple[Family, ...] = (LlavaNext(),)
