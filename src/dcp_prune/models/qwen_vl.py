"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed towers, 2 x 2 patches a token, positions along three axes, videos."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from dcp_prune.errors import InvalidInputError
from dcp_prune.models.base import EncodedImages, ModelAdapter, Reduction
from dcp_prune.models.layout import ImageLayout, frames_layout, pad_images, plain_layout
from dcp_prune.models.packed import PackedTower
from dcp_prune.tokens import Signal


class Qwen2VLAdapter(ModelAdapter):
    """Images of any sizes; attention that a token receives takes the place of what [CLS] pays to it."""

    architecture = "Qwen2VLForConditionalGeneration"
    prunes_in_encoder = True
    image_inputs = ("pixel_values", "image_grid_thw")
    image_details = ("image_grid_thw",)
    video_adapter = "Qwen2VLVideoAdapter"

    def __init__(self, model: Any) -> None:
        self.model = model
        tower = model.model.visual
        self.tower = PackedTower(tower, getattr(tower, "over_all_heads", None))

    def grid(self, pixel_values: Tensor | None = None) -> tuple[int, int]:
        return 16, 16

    def layouts(self, images: Mapping[str, Any]) -> list[ImageLayout]:
        merge = self.tower.module.spatial_merge_size
        grids = self._grids(images)
        steps = self.time_steps(images, len(grids))
        flat = self.modality == "image" and all(frames == 1 for frames, _, _ in grids)
        return [
            plain_layout(rows // merge, cols // merge)
            if flat
            else frames_layout(frames, rows // merge, cols // merge, step=step)
            for (frames, rows, cols), step in zip(grids, steps, strict=True)
        ]

    def time_steps(self, images: Mapping[str, Any], count: int) -> list[float]:
        """Positions from each frame to the next, in each image or video."""
        return [1.0] * count

    def take(self, images: Mapping[str, Any], layouts: Sequence[ImageLayout], which: Sequence[int]) -> dict[str, Any]:
        name = self.image_inputs[0]
        parts = images[name].split([len(layout) * self.tower.cell for layout in layouts])
        return super().take({**images, name: parts}, layouts, which) | {
            name: torch.cat([images[name][:0], *(parts[image] for image in which)])
        }

    def encode(
        self,
        images: Mapping[str, Any],
        stages: Sequence[Reduction] = (),
        signals: AbstractSet[Signal] = frozenset(),
        lap: Callable[[str], None] = lambda name: None,
        layouts: Sequence[ImageLayout] | None = None,
    ) -> EncodedImages:
        stages = self.check_stages(stages)
        if layouts is None:
            layouts = self.layouts(images)
        pixels, grids = (images[name] for name in self.image_inputs[:2])
        positions = None
        if stages:
            frames = [plain_layout(*layout.grid).positions for layout in layouts for _ in range(layout.num_tiles)]
            positions = torch.stack(frames)
        walk = self.tower.walk(pixels, torch.as_tensor(grids), stages, signals, lap, positions)
        lengths = [len(layout) for layout in layouts]
        deepstack = tuple(pad_sequence(list(each.split(lengths)), True) for each in walk.deepstack)
        if walk.reduced is not None:
            features = walk.features.unflatten(0, walk.reduced.encoder.indices.shape)
            return replace(walk.reduced.encoded(features, layouts, bool(signals)), deepstack=deepstack)
        found = {name: value.split(lengths) for name, value in walk.signals.items()}
        return EncodedImages(
            pad_images(walk.features.split(lengths), layouts, found), tuple(layouts), deepstack=deepstack
        )

    def check_stages(self, stages: Sequence[Reduction]) -> tuple[Reduction, ...]:
        if any(stage.num_tokens is None for stage in stages):
            raise InvalidInputError(
                f"{self.architecture} can drop only a given number of tokens inside its encoder, and this pruner lets "
                "the data decide how many; use another pruner"
            )
        return super().check_stages(stages)

    def rope_positions(
        self,
        ids: Int[Tensor, "b l"],
        mask: Bool[Tensor, "b l"] | None,
        layouts: Mapping[str, Sequence[ImageLayout]],
        details: Mapping[str, Any],
    ) -> Int[Tensor, "3 b l"]:
        """What the model itself makes of a prompt of this length, for time, row and column.

        Raises:
            InvalidInputError: the placeholders of an image are cut in two, or those of two images are adjacent.
        """
        config, merge = self.model.config, self.tower.module.spatial_merge_size
        ids, mask = ids.cpu(), None if mask is None else mask.cpu()
        kinds = torch.zeros_like(ids)
        grids = {}
        for number, modality in enumerate(("image", "video"), 1):
            places = ids == getattr(config, f"{modality}_token_id")
            kinds[places] = number
            found = layouts.get(modality, ())
            runs = int((places & ~functional.pad(places, (1, -1))).sum())
            wanted = sum(self.groups(layout, modality) for layout in found)
            if runs != wanted:
                raise InvalidInputError(
                    f"the {modality} placeholders stand in {runs} run(s), but {wanted} belong to these {modality}s, so "
                    "nobody can say where each lies; put text or the model's marks between two runs, none inside one"
                )
            if found:
                sizes = [(each.num_tiles, each.grid[0] * merge, each.grid[1] * merge) for each in found]
                grids[f"{modality}_grid_thw"] = torch.tensor(sizes)
        seconds = details.get("second_per_grid_ts")
        positions, _ = self.model.model.get_rope_index(
            ids, mm_token_type_ids=kinds, attention_mask=mask, second_per_grid_ts=seconds, **grids
        )
        return positions

    def groups(self, layout: ImageLayout, modality: str) -> int:
        """Runs of placeholders of an image or video."""
        return 1

    @property
    def rope_offset(self) -> Int[Tensor, "b 1"] | None:
        return self.model.model.rope_deltas

    @rope_offset.setter
    def rope_offset(self, offset: Int[Tensor, "b 1"]) -> None:
        self.model.model.rope_deltas = offset

    def hand_over(
        self, features: Iterable[Float[Tensor, "k d"]], deepstack: Sequence[Iterable[Float[Tensor, "k d"]]] = ()
    ) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=list(features))  # type: ignore[arg-type]

    def _grids(self, images: Mapping[str, Any]) -> list[list[int]]:
        """Frames, rows and columns of patches of each image or video."""
        pixels, given = (images.get(name) for name in self.image_inputs[:2])
        name, detail = self.image_inputs[:2]
        if given is None or pixels is None:
            raise InvalidInputError(
                f"{name} came without {detail}, which says how many patches each {self.modality} has; pass both, as "
                "the model's processor makes them"
            )
        grids = torch.as_tensor(given).tolist()
        for number, (frames, rows, cols) in enumerate(grids):
            if min(frames, rows, cols) < 1:
                raise InvalidInputError(
                    f"{self.modality} {number} has nothing to show, {frames} frame(s) of {rows} x {cols} patches; take "
                    "it and its placeholders out of the call"
                )
        merge, patches = self.tower.module.spatial_merge_size, sum(map(math.prod, grids))
        if patches != pixels.shape[0] or any(rows % merge or cols % merge for _, rows, cols in grids):
            raise InvalidInputError(
                f"{name} holds {pixels.shape[0]} patches, but {detail} counts {patches} in {grids}, of which rows and "
                f"columns are multiples of {merge}; make both in one call of the model's processor"
            )
        return grids


class _Videos:
    """What is different where frames are tiles."""

    modality = "video"
    image_inputs: tuple[str, ...] = ("pixel_values_videos", "video_grid_thw")
    image_details: tuple[str, ...] = ("video_grid_thw",)
    video_adapter = None
    model: Any


class Qwen2VLVideoAdapter(_Videos, Qwen2VLAdapter):
    """Videos, two frames of which share a patch; below, such a pair is a frame."""


class Qwen25VLAdapter(Qwen2VLAdapter):
    """Most layers attend within windows; the last one to the whole frame."""

    architecture = "Qwen2_5_VLForConditionalGeneration"
    video_adapter = "Qwen25VLVideoAdapter"


class Qwen25VLVideoAdapter(_Videos, Qwen25VLAdapter):
    """Positions along time count seconds."""

    image_inputs = (*_Videos.image_inputs, "second_per_grid_ts")
    image_details = (*_Videos.image_details, "second_per_grid_ts")

    def time_steps(self, images: Mapping[str, Any], count: int) -> list[float]:
        seconds = images.get("second_per_grid_ts")
        seconds = [1.0] * count if seconds is None else torch.as_tensor(seconds).tolist()
        if len(seconds) != count:
            raise InvalidInputError(
                f"second_per_grid_ts is of {len(seconds)} video(s), but {count} were given; make both in one call of "
                "the model's processor"
            )
        return [self.model.config.vision_config.tokens_per_second * each for each in seconds]


class Qwen3VLAdapter(Qwen2VLAdapter):
    """Features of earlier layers go along, for the first layers of the language model (DeepStack)."""

    architecture = "Qwen3VLForConditionalGeneration"
    video_adapter = "Qwen3VLVideoAdapter"

    def groups(self, layout: ImageLayout, modality: str) -> int:
        return layout.num_tiles if modality == "video" else 1

    def hand_over(
        self, features: Iterable[Float[Tensor, "k d"]], deepstack: Sequence[Iterable[Float[Tensor, "k d"]]] = ()
    ) -> BaseModelOutputWithDeepstackFeatures:
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=list(features),  # type: ignore[arg-type]
            deepstack_features=[list(layer) for layer in deepstack],  # type: ignore[arg-type]
        )


class Qwen3VLVideoAdapter(_Videos, Qwen3VLAdapter):
    """The prompt says when each frame is, so there is a run of placeholders per frame, and text that goes with it."""

    markers = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.tile_marks = (model.config.vision_start_token_id, model.config.vision_end_token_id)
