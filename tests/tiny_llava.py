"""A LLaVA-1.5 of toy size with random weights, and its processor: nothing is downloaded."""

from __future__ import annotations

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE, PATCH_SIZE = 84, 14
NUM_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
"""36 visual tokens per image, and [CLS] inside the encoder."""
WORDS = "what is the colour of this dog cat and where red blue a two here there USER: ASSISTANT: \n".split(" ")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
PAD_ID, BOS_ID, EOS_ID, UNK_ID, IMAGE_ID = range(5)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def build_model(
    seed: int = 0, *, attn_implementation: str = "sdpa", vision_layers: int = 4
) -> LlavaForConditionalGeneration:
    """4 + 4 layers of width 64 (vision) and 48 (language), 84 px in patches of 14; eval mode."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        initializer_factor=3.0,
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=NUM_TOKENS
    )
    config._attn_implementation = attn_implementation
    model = LlavaForConditionalGeneration(config).eval()
    # Random weights would end an answer at any time, and tests want answers of equal length.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD_ID
    return model


def build_processor(padding_side: str = "left") -> LlavaProcessor:
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side=padding_side,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_image(seed: int) -> Image.Image:
    """Big coloured blocks with noise: patches that differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8)
    pixels = blocks.repeat_interleave(PATCH_SIZE, 0).repeat_interleave(PATCH_SIZE, 1)
    noise = torch.randint(0, 30, pixels.shape, generator=generator, dtype=torch.uint8)
    return Image.fromarray((pixels // 2 + noise).numpy())
