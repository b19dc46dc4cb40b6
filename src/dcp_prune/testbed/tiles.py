"""The testbed as a LLaVA-NeXT: an overview and 2 x 2 tiles of a larger picture, 2880 visual tokens, nothing trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from dcp_prune.errors import InvalidInputError
from dcp_prune.testbed.language import IMAGE
from dcp_prune.testbed.load import DEFAULT_CHECKPOINT, load
from dcp_prune.testbed.world import GRID

__all__ = ["ROPE_THETA", "TILED_GRID", "load_tiled", "with_tiles"]

TILED_GRID = 2 * GRID
"""Patches per side of a picture that fills 2 x 2 tiles; `make_scene(seed, grid=TILED_GRID)` paints such pictures."""
ROPE_THETA = 400_000.0
"""Base of the rotary positions. The language model was trained on 600 positions with the base 10,000 and is lost where
the question is 2,900 positions behind the overview. With a larger base, the known remedy that needs no training, it
reads them, and short prompts as well as before; chosen on tuning seeds."""


def load_tiled(
    checkpoint: str = DEFAULT_CHECKPOINT, *, dtype: torch.dtype | None = None, rope_theta: float | None = ROPE_THETA
) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """Model and processor of a shipped checkpoint, seeing tiles; in evaluation mode.

    Args:
        checkpoint: `weak`.
        dtype: float32 unless told otherwise.
        rope_theta: base of the rotary positions; None leaves that of the training.

    Raises:
        InvalidInputError: there is no checkpoint of that name.
    """
    return with_tiles(*load(checkpoint, dtype=dtype), rope_theta=rope_theta)


def with_tiles(
    model: PreTrainedModel, processor: ProcessorMixin, *, rope_theta: float | None = ROPE_THETA
) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """The same tower, projector and language model, copied into a LLaVA-NeXT.

    A picture of any size is cut into an overview and 2 x 2 tiles, each as large as the tower knows it; where it is no
    square, what only pads the tiles is not in the prompt. The separator behind each row of patches, which a LLaVA does
    not have, is zero.

    Args:
        model: a LLaVA that was trained on the testbed.
        processor: its processor.
        rope_theta: base of the rotary positions; None leaves that of the training.

    Raises:
        InvalidInputError: the model is no LLaVA.
    """
    if not isinstance(model, LlavaForConditionalGeneration):
        raise InvalidInputError(
            f"tiles are cut for a LLaVA that was trained on the testbed, but this is a {type(model).__name__}; "
            "choose another checkpoint, or none with tiles"
        )
    given: Any = model.config
    side = given.vision_config.image_size
    pinpoints = [[2 * side, 2 * side]]
    text = copy.deepcopy(given.text_config)
    text.max_position_embeddings = max(text.max_position_embeddings, 4096)
    if rope_theta is not None:
        text.rope_parameters = {**text.rope_parameters, "rope_theta": rope_theta}
    config = LlavaNextConfig(
        vision_config=copy.deepcopy(given.vision_config),
        text_config=text,
        image_token_index=given.image_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=given.vision_feature_layer,
        vision_feature_select_strategy=given.vision_feature_select_strategy,
        projector_hidden_act=given.projector_hidden_act,
        tie_word_embeddings=False,
        dtype=model.dtype,
    )
    made: Any = LlavaNextForConditionalGeneration._from_config(config, attn_implementation=given._attn_implementation)
    separator = torch.zeros_like(made.model.image_newline)
    made.load_state_dict({**model.state_dict(), "model.image_newline": separator})
    made.generation_config = copy.deepcopy(model.generation_config)

    known: Any = processor
    images = LlavaNextImageProcessorPil(
        size={"height": side, "width": side},
        crop_size={"height": side, "width": side},
        image_mean=known.image_processor.image_mean,
        image_std=known.image_processor.image_std,
        image_grid_pinpoints=pinpoints,
    )
    return made.to(model.device).eval(), LlavaNextProcessor(
        image_processor=images,
        tokenizer=known.tokenizer,
        patch_size=given.vision_config.patch_size,
        vision_feature_select_strategy=known.vision_feature_select_strategy,
        image_token=IMAGE,
        num_additional_image_tokens=known.num_additional_image_tokens,
        chat_template=known.chat_template,
    )
