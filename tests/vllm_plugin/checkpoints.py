"""Checkpoints for engines: the testbed's and random ones, in the layout of the model hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tiny_llava import BOS_ID, EOS_ID, IMAGE_ID, IMAGE_SIZE, NUM_TOKENS, PAD_ID, PATCH_SIZE, build_processor


def make_deep(folder: Path) -> Path:
    """36 visual tokens behind 10 encoder layers with uneven attention, and heads as wide as vLLM wants them."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=10,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        initializer_factor=3.0,
    )
    special: dict[str, Any] = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=NUM_TOKENS, **special
    )
    model = LlavaForConditionalGeneration(config)
    inner: Any = model.model
    for layer in inner.vision_tower.encoder.layers:
        layer.self_attn.q_proj.weight.data.mul_(20.0)
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


def as_on_the_hub(source: Path, folder: Path) -> Path:
    """A copy in float32 whose CLIP tower has the `vision_model.` that transformers 5 leaves out and vLLM wants."""
    shutil.copytree(source, folder)
    weights = load_file(source / "model.safetensors")
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight.float().contiguous()
        for name, weight in weights.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
