"""Checkpoints for engines: the testbed's and random ones, in the layout of the model hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tiny_llava import (
    BOS_ID,
    CHAT_TEMPLATE,
    EOS_ID,
    IMAGE_ID,
    IMAGE_SIZE,
    NUM_TOKENS,
    PAD_ID,
    PATCH_SIZE,
    build_processor,
)


def make_deep(folder: Path) -> Path:
    """36 visual tokens behind 10 encoder layers with uneven attention, and heads as wide as vLLM wants them."""
    config = LlavaConfig(**_parts(), image_token_index=IMAGE_ID, image_seq_length=NUM_TOKENS)
    return _save(LlavaForConditionalGeneration, config, build_processor(), folder, sharpness=20.0)


def make_next(folder: Path) -> Path:
    """The same as a LLaVA-NeXT: an overview and 1 to 4 tiles of 36 patches."""
    grids = [[rows * IMAGE_SIZE, cols * IMAGE_SIZE] for rows, cols in ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2))]
    config = LlavaNextConfig(**_parts(), image_token_index=IMAGE_ID, image_grid_pinpoints=grids)
    plain = build_processor()
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_grid_pinpoints=grids
        ),
        tokenizer=plain.tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=plain.chat_template,
    )
    return _save(LlavaNextForConditionalGeneration, config, processor, folder, sharpness=4.0)


def _parts() -> dict[str, Any]:
    """Configs of the encoder and the language model, and special tokens."""
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
    return {"vision_config": vision, "text_config": text, **special}


def _save(architecture: Any, config: Any, processor: Any, folder: Path, *, sharpness: float) -> Path:
    torch.manual_seed(0)
    model = architecture(config)
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.q_proj.weight.data.mul_(sharpness)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
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


QWEN_SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
"""What stands for an image in a prompt of Qwen2.5-VL."""


def make_qwen(folder: Path) -> Path:
    """A Qwen2.5-VL with windows in three of five encoder layers, uneven attention, and 28 pixels a visual token."""
    torch.manual_seed(0)
    processor = build_processor()
    tokenizer: Any = processor.tokenizer  # type: ignore[attr-defined]
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_SPECIAL})
    start, end, image, video = tokenizer.convert_tokens_to_ids(QWEN_SPECIAL)
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0}
    special: dict[str, Any] = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 5,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "patch_size": PATCH_SIZE,
            "window_size": 4 * PATCH_SIZE,
            "fullatt_block_indexes": [1, 4],
            "out_hidden_size": 128,
        },
        text_config={
            "vocab_size": 64,
            "hidden_size": 128,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 0.1,
            "rope_parameters": rope,
            **special,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    inner: Any = model.model
    for block in inner.visual.blocks:
        block.attn.qkv.weight.data.mul_(10.0)
    model.save_pretrained(folder)
    size = {"shortest_edge": 28 * 28 * 16, "longest_edge": 28 * 28 * 64}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=PATCH_SIZE, size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=PATCH_SIZE),
        chat_template=CHAT_TEMPLATE.replace("<image> ", PLACEHOLDER + " "),
    ).save_pretrained(folder)
    return folder
