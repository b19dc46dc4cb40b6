"""Tiny models with random weights, one per family, and how each turns prompts and pictures into inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    Idefics3VisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PixtralVisionConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from dcp_prune.models import ModelAdapter, get_adapter
from dcp_prune.pruners.base import ScorePruner
from dcp_prune.tokens import VisualTokens
from tiny_llava import BOS_ID, CHAT_TEMPLATE, EOS_ID, IMAGE_ID, PAD_ID, build_processor

TILE, PATCH = 56, 14
VIDEO_ID = 63
SIZES = ((90, 90), (60, 120), (100, 40))
"""(height, width) of pictures, which are cut into different numbers of tiles and padded on different sides."""


def make_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Coloured blocks."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (5, 5, 3), generator=generator, dtype=torch.uint8)
    height, width = size
    return Image.fromarray(blocks.numpy()).resize((width, height), Image.Resampling.NEAREST)


def make_spot(size: tuple[int, int], corner: tuple[float, float], extent: float) -> Image.Image:
    """A plain picture with one square that differs; its corner and extent are shares of the picture's sides."""
    height, width = size
    pixels = torch.full((height, width, 3), 40, dtype=torch.uint8)
    top, left = int(corner[0] * height), int(corner[1] * width)
    pixels[top : int(top + extent * height), left : int(left + extent * width)] = torch.tensor([250, 30, 90]).byte()
    return Image.fromarray(pixels.numpy())


def share_of_spot(boxes: torch.Tensor, corner: tuple[float, float], extent: float) -> torch.Tensor:
    """How much of each box, `n 4` in shares of the picture, lies in the square of `make_spot`."""
    low = torch.tensor(corner)
    sides = torch.minimum(boxes[:, 2:], low + extent) - torch.maximum(boxes[:, :2], low)
    return sides.clamp(min=0).prod(dim=1) / (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)


@dataclass(frozen=True, kw_only=True)
class OddOnesPruner(ScorePruner):
    """Keeps what looks least like the rest."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        real = tokens.features.masked_fill(~tokens.mask.unsqueeze(2), torch.nan)
        middle = real.nanmedian(dim=1, keepdim=True).values
        return (tokens.features - middle).norm(dim=2)


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


def clip_config(image_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=PATCH,
        initializer_factor=3.0,
    )


class Family(ABC):
    """One architecture.

    Attributes:
        name: of the test.
        modality: what the model calls the things that stand in the prompts.
        separated: whether the unpruned prompt holds separators, which are not kept.
        staged: whether tokens can be dropped inside the encoder whatever the picture.
    """

    name: str
    modality = "image"
    separated = False
    staged = True

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

    @property
    def adapter(self) -> ModelAdapter:
        """Of what stands in the prompts."""
        adapter = get_adapter(self.model)
        if self.modality == "image":
            return adapter
        assert adapter.video is not None
        return adapter.video

    def own_features(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """What the model itself makes of the images, one tensor each."""
        names = ("pixel_values", "pixel_values_images", "image_sizes", "batch_num_images", "image_grid_thw")
        images = {name: inputs[name] for name in names if name in inputs}
        with torch.no_grad():
            return list(self.model.get_image_features(**images).pooler_output)

    def oracle_inputs(
        self, inputs: dict[str, Any], mask: torch.Tensor, laid: Sequence[torch.Tensor], deepstack: Sequence[Any]
    ) -> dict[str, Any]:
        """The unpruned prompt, masked, with these features at the placeholders of each image."""
        places = inputs["input_ids"] == self.adapter.image_token_id
        embeddings = self.model.get_input_embeddings()(inputs["input_ids"])
        return {
            "inputs_embeds": embeddings.masked_scatter(places.unsqueeze(-1), torch.cat(list(laid))),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            **{name: inputs[name] for name in ("token_type_ids",) if name in inputs},
        }


class LlavaNext(Family):
    name = "llava_next"
    separated = True

    def build(self) -> Any:
        config = LlavaNextConfig(
            vision_config=clip_config(TILE),
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


def siglip_config(image_size: int = TILE) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=PATCH,
        vision_use_head=False,  # type: ignore[call-arg]
    )


def expand_placeholders(prompts: Sequence[str], spans: Sequence[int | list[int]]) -> dict[str, torch.Tensor]:
    """Ids and mask, with as many placeholders for each image as the model has features, or with a span of ids."""
    tokenizer: Any = build_processor().tokenizer
    remaining = iter([IMAGE_ID] * span if isinstance(span, int) else span for span in spans)
    rows = []
    for prompt in prompts:
        words = [
            next(remaining) if word == "<image>" else tokenizer.convert_tokens_to_ids([word]) for word in prompt.split()
        ]
        rows.append([BOS_ID, *(number for word in words for number in word)])
    width = max(map(len, rows))
    ids = torch.tensor([[PAD_ID] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


class LlavaOnevision(Family):
    """Its processor needs a video processor, and that torchvision: ids are made by hand."""

    name = "llava_onevision"
    separated = True
    aspect = "anyres_max_9"
    tile = TILE

    def build(self) -> Any:
        config = LlavaOnevisionConfig(
            vision_config=siglip_config(self.tile),
            text_config=text_config(),
            image_token_index=IMAGE_ID,
            video_token_index=VIDEO_ID,
            image_grid_pinpoints=[[rows * self.tile, cols * self.tile] for rows, cols in ((1, 2), (2, 1), (2, 2))],
            vision_aspect_ratio=self.aspect,
        )
        model = LlavaOnevisionForConditionalGeneration(config)
        sharpen(model.model.vision_tower)
        return model

    def make_inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        if not pictures:
            return dict(expand_placeholders(prompts, []))
        processor = LlavaOnevisionImageProcessorPil(
            size={"height": self.tile, "width": self.tile}, image_grid_pinpoints=self.model.config.image_grid_pinpoints
        )
        given = iter(pictures)
        groups = [[next(given) for _ in range(prompt.count("<image>"))] for prompt in prompts]
        images = dict(processor(groups, return_tensors="pt"))  # type: ignore[arg-type]
        lengths = [len(features) for features in self.own_features(images)]
        return expand_placeholders(prompts, lengths) | images


class ScaledOnevision(LlavaOnevision):
    """Large pictures are scaled down behind the projector."""

    name = "llava_onevision_scaled"
    staged = False
    aspect = "anyres_max_2"


class PaliGemma(Family):
    """Its processor would add a thousand words to the tokenizer: ids are made by hand."""

    name = "paligemma"

    def build(self) -> Any:
        text = GemmaConfig(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            initializer_range=0.15,
            pad_token_id=PAD_ID,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
        )
        config = PaliGemmaConfig(
            vision_config=siglip_config(84), text_config=text, image_token_index=IMAGE_ID, projection_dim=48
        )
        model = PaliGemmaForConditionalGeneration(config)
        sharpen(model.model.vision_tower)
        return model

    def make_inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        ids = expand_placeholders(prompts, [36] * len(pictures))
        ids["token_type_ids"] = torch.zeros_like(ids["input_ids"])
        if not pictures:
            return dict(ids)
        images = SiglipImageProcessorPil(size={"height": 84, "width": 84})(list(pictures), return_tensors="pt")
        return ids | dict(images)


class LlavaDinov2(Family):
    """LLaVA with a DINOv2 tower, whose registers reach the language model in front of the patches."""

    name = "llava_dinov2"
    separated = True
    prefix = 4
    strategy: Literal["default", "full"] = "default"

    def vision(self) -> Any:
        return Dinov2WithRegistersConfig(
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            mlp_ratio=2,
            image_size=84,
            patch_size=PATCH,
            num_register_tokens=4,
            initializer_range=0.15,
        )

    def build(self) -> Any:
        config = LlavaConfig(
            vision_config=self.vision(),
            text_config=text_config(),
            image_token_index=IMAGE_ID,
            image_seq_length=36 + self.prefix,
            vision_feature_select_strategy=self.strategy,
        )
        return LlavaForConditionalGeneration(config)

    def make_inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        ids = expand_placeholders(prompts, [36 + self.prefix] * len(pictures))
        if not pictures:
            return dict(ids)
        processor = CLIPImageProcessorPil(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84})
        return ids | {"pixel_values": processor(list(pictures), return_tensors="pt")["pixel_values"]}


class LlavaPlainDinov2(LlavaDinov2):
    """Without registers."""

    name = "llava_plain_dinov2"
    separated = False
    prefix = 0

    def vision(self) -> Any:
        registers = super().vision().to_dict()
        names = "hidden_size num_hidden_layers num_attention_heads mlp_ratio image_size patch_size initializer_range"
        return Dinov2Config(**{name: registers[name] for name in names.split()})


class LlavaSiglip(LlavaPlainDinov2):
    """LLaVA with a SigLIP tower, without [CLS]."""

    name = "llava_siglip"
    strategy = "full"

    def vision(self) -> Any:
        return siglip_config(84)


class VideoLlava(Family):
    """Its processor needs a video processor, and that torchvision: ids are made by hand."""

    name = "video_llava"

    def build(self) -> Any:
        config = VideoLlavaConfig(
            vision_config=clip_config(84),
            text_config=text_config(),
            image_token_index=IMAGE_ID,
            video_token_index=VIDEO_ID,
            image_seq_length=36,
        )
        return VideoLlavaForConditionalGeneration(config)

    def make_inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        ids = expand_placeholders(prompts, [36] * len(pictures))
        if not pictures:
            return dict(ids)
        processor = CLIPImageProcessorPil(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84})
        return ids | {"pixel_values_images": processor(list(pictures), return_tensors="pt")["pixel_values"]}


class Pixtral(Family):
    """Its processor needs torchvision: ids are made by hand."""

    name = "pixtral"
    staged = False
    break_id, end_id = 60, 61
    cell = 1

    def build(self) -> Any:
        config = LlavaConfig(
            vision_config=pixtral_config(),
            text_config=text_config(),
            image_token_index=IMAGE_ID,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        model = LlavaForConditionalGeneration(config)
        sharpen(model.model.vision_tower)
        return model

    def make_inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        if not pictures:
            return dict(expand_placeholders(prompts, []))
        unit = PATCH * self.cell
        processor = PixtralImageProcessorPil(size={"longest_edge": 168}, patch_size={"height": unit, "width": unit})
        images = dict(processor(list(pictures), return_tensors="pt"))
        spans = [self.span(height // unit, width // unit) for height, width in images["image_sizes"].tolist()]
        return expand_placeholders(prompts, spans) | images

    def span(self, rows: int, cols: int) -> list[int]:
        """What the prompt holds of an image: a break behind each row of placeholders, the end behind the last."""
        return [*([*[IMAGE_ID] * cols, self.break_id] * rows)[:-1], self.end_id]


class Mistral3(Pixtral):
    """Its processor needs torchvision: ids are made by hand."""

    name = "mistral3"
    cell = 2

    def build(self) -> Any:
        config = Mistral3Config(
            vision_config=pixtral_config(),
            text_config=text_config(),
            image_token_index=IMAGE_ID,
            vision_feature_layer=-1,
        )
        model = Mistral3ForConditionalGeneration(config)
        sharpen(model.model.vision_tower)
        return model


class Gemma3(Family):
    name = "gemma3"
    staged = False
    side = 112
    image_id = 60
    window = 4096
    """Columns that a layer with a sliding window sees: here, all."""

    def build(self) -> Any:
        text = Gemma3TextConfig(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            query_pre_attn_scalar=12,
            initializer_range=0.15,
            sliding_window=self.window,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            pad_token_id=PAD_ID,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
        )
        config = Gemma3Config(
            vision_config=siglip_config(self.side),
            text_config=text,
            mm_tokens_per_image=16,
            image_token_index=self.image_id,
            boi_token_index=self.image_id + 1,
            eoi_token_index=self.image_id + 2,
        )
        model = Gemma3ForConditionalGeneration(config)
        sharpen(model.model.vision_tower)
        model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(std=0.15)
        return model

    @cached_property
    def processor(self) -> Any:
        plain = build_processor()
        marks = {"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
        tokenizer = plain.tokenizer
        fill = [f"<{number}>" for number in range(len(tokenizer), self.image_id)]
        tokenizer.add_tokens([*fill, *marks.values()], special_tokens=True)
        for name, mark in marks.items():
            setattr(tokenizer, name, mark)
            setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(mark))
        return Gemma3Processor(
            image_processor=Gemma3ImageProcessorPil(size={"height": self.side, "width": self.side}),
            tokenizer=tokenizer,
            chat_template=CHAT_TEMPLATE.replace("<image>", "<boi>"),
            image_seq_length=16,
        )

    def make_inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image], **options: Any) -> dict[str, Any]:
        given = iter(pictures)
        groups = [[next(given) for _ in range(prompt.count("<image>"))] for prompt in prompts]
        text = ["<s> " + prompt.replace("<image>", "<boi>") for prompt in prompts]
        return dict(
            self.processor(text=text, images=groups if pictures else None, return_tensors="pt", padding=True, **options)
        )


def pixtral_config() -> PixtralVisionConfig:
    return PixtralVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=112,
        patch_size=PATCH,
    )


class Qwen2VL(Family):
    """Its processor needs a video processor, and that torchvision: ids are made by hand."""

    name = "qwen2_vl"
    kind: Any = Qwen2VLForConditionalGeneration
    rope: ClassVar[dict[str, Any]] = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10_000.0}

    shared: ClassVar[dict[str, Any]] = {"depth": 4, "num_heads": 4, "patch_size": PATCH}

    def vision(self) -> dict[str, Any]:
        return {"embed_dim": 64, "hidden_size": 48, "mlp_ratio": 2} | self.shared

    def build(self) -> Any:
        text = {
            "vocab_size": 64,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "max_position_embeddings": 1024,
            "initializer_range": 0.15,
            "rope_parameters": self.rope,
            "pad_token_id": PAD_ID,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
        }
        tokens = {"image": IMAGE_ID, "video": VIDEO_ID, "vision_start": 61, "vision_end": 62}
        config = self.kind.config_class(
            vision_config=self.vision(), text_config=text, **{f"{name}_token_id": id for name, id in tokens.items()}
        )
        model = self.kind(config)
        sharpen(model.model.visual)
        return model

    def make_inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        if not pictures:
            images, lengths = {}, []
        else:
            size = {"shortest_edge": 84 * 84, "longest_edge": 168 * 168}
            images = dict(Qwen2VLImageProcessorPil(size=size, patch_size=PATCH)(list(pictures), return_tensors="pt"))
            lengths = (images["image_grid_thw"].prod(dim=1) // 4).tolist()
        made = expand_placeholders(prompts, lengths)
        return made | images | {"mm_token_type_ids": self.token_types(made["input_ids"])}

    def token_types(self, ids: torch.Tensor) -> torch.Tensor:
        return (ids == IMAGE_ID).long() + 2 * (ids == VIDEO_ID).long()

    def oracle_inputs(
        self, inputs: dict[str, Any], mask: torch.Tensor, laid: Sequence[torch.Tensor], deepstack: Sequence[Any]
    ) -> dict[str, Any]:
        grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs}
        types, seconds = inputs["mm_token_type_ids"], inputs.get("second_per_grid_ts")
        axes, _ = self.model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=types,
            attention_mask=inputs["attention_mask"],
            second_per_grid_ts=seconds,
            **grids,
        )
        return {
            "input_ids": inputs["input_ids"],
            "attention_mask": mask,
            "position_ids": torch.cat(((mask.cumsum(1) - 1).clamp(min=0)[None], axes)),
            "mm_encoder_outputs": {
                self.modality: BaseModelOutputWithDeepstackFeatures(
                    pooler_output=tuple(laid),  # type: ignore[arg-type]
                    deepstack_features=[list(layer) for layer in deepstack] or None,  # type: ignore[arg-type]
                )
            },
        }


class Qwen25VL(Qwen2VL):
    name = "qwen2_5_vl"
    kind = Qwen2_5_VLForConditionalGeneration

    def vision(self) -> dict[str, Any]:
        windows = {"window_size": 2 * 2 * PATCH, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2}
        return {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 48} | windows | self.shared


class Qwen3VL(Qwen2VL):
    name = "qwen3_vl"
    kind = Qwen3VLForConditionalGeneration

    def vision(self) -> dict[str, Any]:
        deepstack = {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 36}
        return {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 48} | deepstack | self.shared


class Idefics3(Family):
    """Pictures are scaled to two tiles along their longer side, or without `split` to one tile."""

    name = "idefics3"
    staged = False
    tile, patch, scale = 56, 7, 2
    split = True

    def build(self) -> Any:
        config = Idefics3Config(
            vision_config=self.vision_config(Idefics3VisionConfig),
            text_config=text_config(),
            image_token_id=IMAGE_ID,
            pad_token_id=PAD_ID,
            scale_factor=self.scale,
        )
        model = Idefics3ForConditionalGeneration(config)
        sharpen(model.model.vision_model)
        return model

    def vision_config(self, kind: type) -> Any:
        return kind(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=self.tile,
            patch_size=self.patch,
        )

    def image_processor(self) -> Any:
        return Idefics3ImageProcessorPil

    @cached_property
    def processor(self) -> Any:
        plain: Any = build_processor()
        names = [f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4)]
        plain.tokenizer.add_tokens(["<global-img>", *names], special_tokens=True)
        plain.tokenizer.add_tokens(["\n"])
        images = self.image_processor()(
            size={"longest_edge": 2 * self.tile},
            max_image_size={"longest_edge": self.tile},
            do_image_splitting=self.split,
        )
        length = (self.tile // self.patch // self.scale) ** 2
        return Idefics3Processor(images, plain.tokenizer, image_seq_len=length, chat_template=plain.chat_template)

    def make_inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        return dict(
            self.processor(
                text=[f"<s> {prompt}" for prompt in prompts],
                images=list(pictures) or None,
                return_tensors="pt",
                padding=True,
                padding_side="left",
            )
        )

    def own_features(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """Releases differ in how they pack tiles."""
        images = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask")}
        with torch.no_grad():
            packed = self.model.get_image_features(**images).pooler_output
        lengths = [len(layout) for layout in get_adapter(self.model).layouts(inputs)]
        return list(torch.cat([tile.flatten(0, -2) for tile in packed]).split(lengths))


class SmolVLM(Idefics3):
    """Its processor needs a video processor, and that torchvision; Idefics3's writes the same prompts."""

    name = "smolvlm"
    tile, patch, scale = 96, 8, 4

    def build(self) -> Any:
        config = SmolVLMConfig(
            vision_config=self.vision_config(SmolVLMVisionConfig),
            text_config=text_config(),
            image_token_id=IMAGE_ID,
            pad_token_id=PAD_ID,
            scale_factor=self.scale,
        )
        model = SmolVLMForConditionalGeneration(config)
        sharpen(model.model.vision_model)
        return model

    def image_processor(self) -> Any:
        return SmolVLMImageProcessorPil


class InternVL(Family):
    """Its processor needs a video processor, and that torchvision: ids are made by hand."""

    name = "internvl"
    staged = False
    side = 112
    begin_id, end_id = 60, 61
    normed = True
    """Whether queries and keys are, as in the large models."""

    def build(self) -> Any:
        vision = InternVLVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=self.side,
            patch_size=PATCH,
            use_qk_norm=self.normed,
            norm_type="rms_norm" if self.normed else "layer_norm",
            attention_bias=not self.normed,
            layer_scale_init_value=1.0,
        )
        config = InternVLConfig(
            vision_config=vision, text_config=text_config(), image_token_id=IMAGE_ID, image_seq_length=16
        )
        model = InternVLForConditionalGeneration(config)
        embeddings = model.model.vision_tower.embeddings
        for parameter in (embeddings.cls_token, embeddings.position_embeddings):  # zero, untrained
            parameter.data.normal_()
        sharpen(model.model.vision_tower)
        return model

    def make_inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        if not pictures:
            return dict(expand_placeholders(prompts, []))
        size = {"height": self.side, "width": self.side}
        processor = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=3)
        images = dict(processor(list(pictures), return_tensors="pt"))
        spans = [self.span(tiles) for tiles in images.pop("num_patches").tolist()]
        return expand_placeholders(prompts, spans) | images

    def span(self, tiles: int) -> list[int]:
        """What the prompt holds of an image."""
        return [self.begin_id, *[IMAGE_ID] * 16 * tiles, self.end_id]

    def own_features(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        with torch.no_grad():
            tiles = self.model.get_image_features(inputs["pixel_values"]).pooler_output
        lengths = [len(layout) for layout in get_adapter(self.model).layouts(inputs)]
        return list(tiles.flatten(0, 1).split(lengths))


class QwenVideos(Qwen2VL):
    """Videos of two or three pairs of frames, across which the picture moves."""

    modality = "video"

    def make_inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        clips = [self.clip(picture) for picture in pictures]
        grids = [(len(clip), *(side // PATCH for side in clip.shape[-2:])) for clip in clips]
        made = expand_placeholders(prompts, [self.span(*grid) for grid in grids])
        made["mm_token_type_ids"] = self.token_types(made["input_ids"])
        if not clips:
            return dict(made)
        patches = torch.cat([cut_patches(clip) for clip in clips])
        return made | {"pixel_values_videos": patches, "video_grid_thw": torch.tensor(grids)}

    def clip(self, picture: Image.Image) -> torch.Tensor:
        """One frame a pair, `f c y x`: three of a square picture, two of others."""
        height, width = (2 * PATCH * (side // 20) for side in (picture.height, picture.width))
        pixels = torch.from_numpy(np.array(picture.resize((width, height), Image.Resampling.NEAREST))).permute(2, 0, 1)
        count = 3 if picture.width == picture.height else 2
        return torch.stack([pixels.roll(17 * frame, dims=2) for frame in range(count)]) / 127.5 - 1.0

    def span(self, frames: int, rows: int, cols: int) -> list[int]:
        """What the prompt holds of a video."""
        return [VIDEO_ID] * (frames * rows * cols // 4)

    def own_features(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        with torch.no_grad():
            found = self.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        return list(found.pooler_output)


class Qwen2VLVideos(QwenVideos):
    name = "qwen2_vl_videos"


class Qwen25VLVideos(QwenVideos, Qwen25VL):
    """Pairs of frames lie a second and a half apart, and one second."""

    name = "qwen2_5_vl_videos"

    def make_inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        seconds = torch.tensor([1.5 if picture.width == picture.height else 1.0 for picture in pictures])
        return super().make_inputs(prompts, pictures) | ({"second_per_grid_ts": seconds} if pictures else {})


class Qwen3VLVideos(QwenVideos, Qwen3VL):
    """The prompt says when each frame is."""

    name = "qwen3_vl_videos"

    def span(self, frames: int, rows: int, cols: int) -> list[int]:
        own = [61, *[VIDEO_ID] * (rows * cols // 4), 62]
        return [number for frame in range(frames) for number in (20 + frame, 11, *own)]


def cut_patches(frames: torch.Tensor) -> torch.Tensor:
    """Frames `f c y x`, each shown twice, as patches in cells of 2 x 2, `p v`."""
    f, c, height, width = frames.shape
    cut = frames.view(f, c, height // (2 * PATCH), 2, PATCH, width // (2 * PATCH), 2, PATCH)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, 2, -1, -1)
    return cut.reshape(-1, c * 2 * PATCH * PATCH)


def make_video(picture: Image.Image, side: int) -> torch.Tensor:
    """Frames `f c y x` across which the picture moves to the right: three of a square picture, two of others."""
    pixels = torch.from_numpy(np.array(picture.resize((side, side), Image.Resampling.NEAREST))).permute(2, 0, 1)
    frames = [pixels.roll(17 * frame, dims=2) for frame in range(3 if picture.width == picture.height else 2)]
    return torch.stack(frames) / 127.5 - 1.0


def video_inputs(prompts: Sequence[str], videos: Sequence[torch.Tensor], lengths: Sequence[int]) -> dict[str, Any]:
    """Prompts with videos in the place of `<image>`; one tensor where all have the same number of frames."""
    ids = expand_placeholders(prompts, [[VIDEO_ID] * length for length in lengths])
    if not videos:
        return dict(ids)
    stacked = torch.stack(list(videos)) if len(set(map(len, videos))) == 1 else list(videos)
    return ids | {"pixel_values_videos": stacked}


class VideoLlavaVideos(VideoLlava):
    """Through the other tower; each frame brings its [CLS]."""

    name = "video_llava_videos"
    modality = "video"
    side, cells = 84, 36

    def length(self, frames: int) -> int:
        """Placeholders of a video."""
        return (1 + self.cells) * frames

    def make_inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        videos = [make_video(picture, self.side) for picture in pictures]
        return video_inputs(prompts, videos, [self.length(len(video)) for video in videos])

    def own_features(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        features = self.model.model.get_video_features
        with torch.no_grad():
            return [
                features(pixel_values_videos=video[None]).pooler_output.flatten(0, 1)
                for video in inputs["pixel_values_videos"]
            ]


class OnevisionVideos(LlavaOnevision):
    """Five rows of patches are pooled to three rows of cells."""

    name = "llava_onevision_videos"
    modality = "video"
    staged = False
    tile = side = 70
    cells = 9

    def length(self, frames: int) -> int:
        """Placeholders of a video."""
        return self.cells * frames + 1

    def make_inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        videos = [make_video(picture, self.side) for picture in pictures]
        return video_inputs(prompts, videos, [self.length(len(video)) for video in videos])

    def own_features(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        features = self.model.model.get_video_features
        with torch.no_grad():
            return [
                features(pixel_values_videos=video[None]).pooler_output[0] for video in inputs["pixel_values_videos"]
            ]


def sharpen(tower: Any) -> None:
    """Random SigLIP weights give pictures that hardly differ; these do."""
    for parameter in tower.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4.0)


FAMILIES: tuple[Family, ...] = (
    LlavaNext(),
    LlavaOnevision(),
    ScaledOnevision(),
    LlavaDinov2(),
    PaliGemma(),
    Gemma3(),
    VideoLlava(),
    Pixtral(),
    Mistral3(),
    Qwen2VL(),
    Qwen25VL(),
    Qwen3VL(),
    Idefics3(),
    SmolVLM(),
    InternVL(),
    VideoLlavaVideos(),
    OnevisionVideos(),
    Qwen2VLVideos(),
    Qwen25VLVideos(),
    Qwen3VLVideos(),
)
