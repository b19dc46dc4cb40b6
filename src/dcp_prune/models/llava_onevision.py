"""LLaVA-OneVision: LLaVA-NeXT's tiles through a SigLIP tower; features are scaled down where they are too many.

Frames of videos go through the same tower, and the model pools the raster of each to a quarter of its patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dcp_prune.errors import InvalidInputError
from dcp_prune.models.base import WITHOUT_CLS, EncodedImages, ModelAdapter, Reduction
from dcp_prune.models.frames import FramesAdapter
from dcp_prune.models.layout import ImageLayout, frames_layout, tile_rows, with_separators
from dcp_prune.models.llava_next import LlavaNextAdapter
from dcp_prune.models.tower import Walk
from dcp_prune.tokens import Signal


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """Without [CLS], attention that a token receives takes the place of what [CLS] pays to it.

    Of several images in a prompt only overviews are encoded. Large images are scaled behind the projector; their tokens
    are then no patches any more, and signals of the encoder are those of the patch in the middle of each.
    """

    architecture = "LlavaOnevisionForConditionalGeneration"
    needs_cls = False
    saliency = ModelAdapter.saliency
    signals = WITHOUT_CLS
    image_inputs = (*LlavaNextAdapter.image_inputs, "vision_aspect_ratio", "batch_num_images")
    image_details = ("image_sizes", "batch_num_images")
    video_adapter = "LlavaOnevisionVideoAdapter"

    def count_tiles(self, pictures: Sequence[tuple[int, int]], images: Mapping[str, Any]) -> list[int]:
        tiles = super().count_tiles(pictures, images)
        groups = images.get("batch_num_images")
        if groups is None:
            return tiles
        several = [count > 1 for count in torch.as_tensor(groups).tolist() for _ in range(count)]
        if len(several) != len(tiles):
            raise InvalidInputError(
                f"batch_num_images counts {len(several)} image(s), but {len(tiles)} were given; make both in one call "
                "of the model's processor"
            )
        return [1 if alone else count for alone, count in zip(several, tiles, strict=True)]

    def pack(self, tiles: Float[Tensor, "t n d"], picture: tuple[int, int], newline: Tensor) -> Float[Tensor, "N d"]:
        packed, _ = self.model.model.pack_image_features(
            [tiles],
            [list(picture)],
            image_newline=newline,
            vision_aspect_ratio=self.model.config.vision_aspect_ratio,
        )
        return packed[0]

    def encode(
        self,
        images: Mapping[str, Any],
        stages: Sequence[Reduction] = (),
        signals: AbstractSet[Signal] = frozenset(),
        lap: Callable[[str], None] = lambda name: None,
        layouts: Sequence[ImageLayout] | None = None,
    ) -> EncodedImages:
        scaled = next((layout.picture for layout in layouts or () if layout.picture is not None), None)
        if stages and scaled is not None:
            raise InvalidInputError(
                f"an image of {scaled[0]} x {scaled[1]} pixels has more patches than its prompt has room for, so the "
                "model scales its features down behind the encoder, and stages inside the encoder leave no raster to "
                "scale; use a pruner without such stages, or a smaller image"
            )
        return super().encode(images, stages, signals, lap, layouts)

    def project(self, walk: Walk, layouts: Sequence[ImageLayout], with_encoder: bool) -> EncodedImages:
        features = self.model.model.multi_modal_projector(walk.encoder.features)
        encoded = walk.encoded(features, layouts, with_encoder)
        scaled = [image for image, layout in enumerate(layouts) if layout.picture is not None]
        if not scaled:
            return encoded
        rows = list(encoded.tokens.features)
        for image in scaled:
            layout = layouts[image]
            assert layout.picture is not None
            packed = self.pack(features[tile_rows(layouts, [image])], layout.picture, self.separator)
            patches = packed[(layout.source >= 0).to(packed.device)]
            rows[image] = torch.cat((patches, rows[image][len(patches) :]))
        return replace(encoded, tokens=replace(encoded.tokens, features=torch.stack(rows)))


class LlavaOnevisionVideoAdapter(FramesAdapter, LlavaOnevisionAdapter):
    """Videos: a token is a cell of 2 x 2 patches of a frame; a newline ends the video.

    Signals of a cell are those of its patches, pooled with the same weights as the features.
    """

    prunes_in_encoder = False
    why_not_in_encoder = ", behind which it pools the raster of every frame"
    image_inputs = (*FramesAdapter.image_inputs, "image_sizes_videos", "vision_aspect_ratio")
    image_details = ("image_sizes_videos",)

    def layout(self, frames: int, grid: tuple[int, int]) -> ImageLayout:
        rows, cols = (math.ceil(size / 2) for size in grid)
        plain = frames_layout(frames, rows, cols)
        return with_separators(plain, [len(plain)])

    def project(self, walk: Walk, layouts: Sequence[ImageLayout], with_encoder: bool) -> EncodedImages:
        pool = self.model.model.apply_pooling
        features = pool(self.model.model.multi_modal_projector(walk.encoder.features))
        return walk.pooled(pool, layouts[0].grid).encoded(features, layouts, with_encoder)
