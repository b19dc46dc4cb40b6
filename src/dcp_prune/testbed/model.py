"""The testbed's architecture: a LLaVA of about five million parameters, built only from `transformers` classes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dcp_prune.testbed.language import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD, make_tokenizer, vocabulary
from dcp_prune.testbed.world import GRID, PATCH

PIXEL_MEAN, PIXEL_STD = 0.5, 0.25


def make_config() -> LlavaConfig:
    """24 x 24 = 576 visual tokens and [CLS]; features leave the last but one layer, as in LLaVA-1.5."""
    words = vocabulary()
    special: dict[str, Any] = {
        "pad_token_id": words.index(PAD),
        "bos_token_id": words.index(BOS),
        "eos_token_id": words.index(EOS),
    }
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=GRID * PATCH,
            patch_size=PATCH,
            hidden_act="gelu",
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            **special,
        ),
        image_token_index=words.index(IMAGE),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=False,
        **special,
    )


def make_processor() -> LlavaProcessor:
    """Resizes any image to the one size that the model knows."""
    side = GRID * PATCH
    images = CLIPImageProcessorPil(
        size={"height": side, "width": side},
        do_center_crop=False,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=make_tokenizer(vocabulary()),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(seed: int = 0, attn_implementation: str = "sdpa") -> LlavaForConditionalGeneration:
    """A new model whose lookups exist from the first step.

    Queries and keys start alike, so a token finds tokens like itself, and positions start as sines and cosines of the
    patch coordinates; from plain random weights a model this small does not leave the plateau in CPU-minutes.
    """
    torch.manual_seed(seed)
    config = make_config()
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attn_implementation)
    inner: Any = model.model
    vision, language = inner.vision_tower, inner.language_model
    with torch.no_grad():
        for layer in vision.encoder.layers:
            nn.init.normal_(layer.self_attn.q_proj.weight, std=0.05)
            layer.self_attn.k_proj.weight.copy_(0.8 * layer.self_attn.q_proj.weight)
            nn.init.normal_(layer.self_attn.v_proj.weight, std=0.05)
        embeddings = vision.embeddings
        embeddings.position_embedding.weight.normal_(std=0.02)
        embeddings.position_embedding.weight[1:] += 0.3 * sincos_positions(GRID, inner.config.vision_config.hidden_size)
        nn.init.normal_(embeddings.class_embedding, std=0.1)
        nn.init.normal_(embeddings.patch_embedding.weight, std=0.05)
        language.embed_tokens.weight.normal_(std=language.config.hidden_size**-0.5)
        for layer in language.layers:
            nn.init.normal_(layer.self_attn.q_proj.weight, std=0.05)
            nn.init.normal_(layer.self_attn.k_proj.weight, std=0.05)
        for layer in language.layers[:2]:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model


def sincos_positions(grid: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column at patch frequencies, entries in [-1, 1]. `grid*grid width`."""
    frequencies = 1.0 / (40.0 ** torch.linspace(0, 1, width // 4))
    angles = torch.arange(grid, dtype=torch.float32)[:, None] * frequencies
    axis = torch.cat((angles.sin(), angles.cos()), dim=-1)
    rows = axis[:, None].expand(grid, grid, -1)
    cols = axis[None].expand(grid, grid, -1)
    return torch.cat((rows, cols), dim=-1).reshape(grid * grid, -1)


def save(model: LlavaForConditionalGeneration, directory: Path) -> None:
    """Writes model and processor in bfloat16, loadable by `from_pretrained` with nothing else."""
    half: Any = copy.deepcopy(model)
    half.to(torch.bfloat16)
    half.config.dtype = "bfloat16"
    half.save_pretrained(directory)
    make_processor().save_pretrained(directory)
