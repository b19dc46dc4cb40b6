"""The natural testbed's architecture: a LLaVA of a pretrained DINOv2 tower, a two-layer projector and a small Llama."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dcp_prune.testbed.features import PIXEL_MEAN, PIXEL_STD
from dcp_prune.testbed.language import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    IMAGE,
    PAD,
    make_tokenizer,
    natural_vocabulary,
    vocabulary,
)
from dcp_prune.testbed.load import load
from dcp_prune.testbed.natural import GRID, PATCH

LAYERS = 6
"""Of the language model; `weak` has four, and two more are added behind them."""


def make_config(tower: Dinov2Config | None = None) -> LlavaConfig:
    """24 x 24 = 576 visual tokens and [CLS]; features leave the last layer of the tower before its norm.

    Args:
        tower: config of the vision tower; the eleven layers of DINOv2 ViT-S/14 if None.
    """
    words = natural_vocabulary()
    special: dict[str, Any] = {
        "pad_token_id": words.index(PAD),
        "bos_token_id": words.index(BOS),
        "eos_token_id": words.index(EOS),
    }
    return LlavaConfig(
        vision_config=tower
        or Dinov2Config(
            hidden_size=384,
            num_hidden_layers=11,
            num_attention_heads=6,
            image_size=GRID * PATCH,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            **special,
        ),
        image_token_index=words.index(IMAGE),
        vision_feature_layer=-1,
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
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=make_tokenizer(natural_vocabulary()),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_language_model(seed: int = 0) -> tuple[Any, nn.Linear]:
    """Language model and head of a new model: those of `weak`, new words at random, two new layers that do nothing yet.

    From random weights a model this small does not learn to look a word up among the patches in CPU-hours; `weak` has
    learned that on the first world, and new words only have to join in.
    """
    torch.manual_seed(seed)
    made: Any = LlavaForConditionalGeneration._from_config(make_config(), attn_implementation="sdpa")
    known: Any = load("weak")[0]
    language, head = made.model.language_model, made.lm_head
    old, new = vocabulary(), natural_vocabulary()
    with torch.no_grad():
        for table, like in (
            (language.embed_tokens.weight, known.model.language_model.embed_tokens.weight),
            (head.weight, known.lm_head.weight),
        ):
            table.normal_(std=float(like.std()))
        for word in new:
            if word in old:
                at, was = new.index(word), old.index(word)
                language.embed_tokens.weight[at] = known.model.language_model.embed_tokens.weight[was]
                head.weight[at] = known.lm_head.weight[was]
        for i, layer in enumerate(language.layers):
            if i < len(known.model.language_model.layers):
                layer.load_state_dict(known.model.language_model.layers[i].state_dict())
            else:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        language.norm.load_state_dict(known.model.language_model.norm.state_dict())
    return language, head


@torch.no_grad()
def assemble(tower: Any, feature_scale: float, parts: dict[str, Tensor]) -> LlavaForConditionalGeneration:
    """The whole model of a tower and what was trained behind it.

    Args:
        tower: a `Dinov2Model`.
        feature_scale: what features were divided by in training; moved into the projector's first layer.
        parts: the state of `projector.*`, `language.*` and `head.*`.
    """
    made: Any = LlavaForConditionalGeneration._from_config(make_config(tower.config))
    made.model.vision_tower.load_state_dict(tower.state_dict())
    for name, module in (
        ("projector", made.model.multi_modal_projector),
        ("language", made.model.language_model),
        ("head", made.lm_head),
    ):
        start = f"{name}."
        module.load_state_dict({k.removeprefix(start): v for k, v in parts.items() if k.startswith(start)})
    made.model.multi_modal_projector.linear_1.weight.div_(feature_scale)
    return made.eval()


def save(model: LlavaForConditionalGeneration, directory: Path) -> None:
    """Writes model and processor in bfloat16, loadable by `from_pretrained` with nothing else."""
    half: Any = copy.deepcopy(model)
    half.to(torch.bfloat16)
    half.config.dtype = "bfloat16"
    half.save_pretrained(directory)
    make_processor().save_pretrained(directory)
