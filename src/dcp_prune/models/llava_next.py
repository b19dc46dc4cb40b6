"""LLaVA-NeXT (LLaVA-1.6): an overview of the image and the tiles of a grid, each through the CLIP tower by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from dcp_prune.errors import InvalidInputError
from dcp_prune.models.base import read_parameter
from dcp_prune.models.layout import ImageLayout, tiled_layout
from dcp_prune.models.llava import LlavaAdapter


class LlavaNextAdapter(LlavaAdapter):
    """Tiles are rows of the encoder; behind it they are joined to images.

    In the model's own prompt the overview comes first, then the grid's patches row by row across its tiles, without
    those that show padding, and a newline behind each row. Of this, patches are what is pruned. Newlines go as soon as
    anything does: they mark rows, and of rows few tokens are left.
    """

    architecture = "LlavaNextForConditionalGeneration"
    cuts_tiles = True
    needs_cls = True
    image_details = ("image_sizes",)

    @property
    def separator(self) -> Float[Tensor, " d"]:
        return read_parameter(self.model.model, "image_newline")

    def layouts(self, images: Mapping[str, Any]) -> list[ImageLayout]:
        pixels, sizes = images["pixel_values"], images.get("image_sizes")
        if sizes is None or any(tiles.ndim != 4 for tiles in pixels) or len(sizes) != len(pixels):
            given = "none" if sizes is None else f"{len(sizes)}"
            shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else [tuple(tiles.shape) for tiles in pixels]
            raise InvalidInputError(
                f"{self.architecture} takes pixel_values as images x tiles x channels x rows x columns with one of "
                f"image_sizes for each, got shape {shape} and {given}; make both with the model's processor"
            )
        pictures = [(int(height), int(width)) for height, width in torch.as_tensor(sizes).tolist()]
        tiles = self.count_tiles(pictures, images)
        for cut, held in zip(tiles, map(len, pixels), strict=True):
            if cut > held:
                raise InvalidInputError(
                    f"an image of this size is cut into {cut} tiles, but pixel_values hold {held}; make pixel_values "
                    "and image_sizes in one call of the model's processor"
                )
        keys = list(zip(pictures, tiles, strict=True))
        made = {key: self._layout(*key) for key in set(keys)}
        return [made[key] for key in keys]

    def count_tiles(self, pictures: Sequence[tuple[int, int]], images: Mapping[str, Any]) -> list[int]:
        """Tiles of pictures of (height, width) pixels, without those that only pad a batch."""
        config = self.model.config
        return [
            image_size_to_num_patches(list(picture), config.image_grid_pinpoints, config.vision_config.image_size)
            for picture in pictures
        ]

    def stack_tiles(self, pixel_values: Any, layouts: Sequence[ImageLayout]) -> Float[Tensor, "t c y x"]:
        return torch.cat([tiles[: layout.num_tiles] for tiles, layout in zip(pixel_values, layouts, strict=True)])

    def pack(self, tiles: Float[Tensor, "t n d"], picture: tuple[int, int], newline: Tensor) -> Float[Tensor, "N d"]:
        """What the model's prompt holds of the features of one image."""
        packed, _ = self.model.model.pack_image_features(
            [tiles],
            [list(picture)],
            vision_feature_select_strategy=self.strategy,
            image_newline=newline,
        )
        return packed[0]

    def _layout(self, picture: tuple[int, int], num_tiles: int) -> ImageLayout:
        """By having the model pack the numbers of the patches."""
        (rows, cols), size = self.grid(), math.prod(self.grid())
        code = torch.arange(num_tiles * size)
        across = max(1, self._columns(picture))
        tile, patch = (code // size - 1).clamp(min=0), code % size
        # Number, and place in the raster of all tiles: a model that scales this raster scales these numbers along.
        place = (tile // across * rows + patch // cols, tile % across * cols + patch % cols)
        numbers = torch.stack((code, *place), dim=1).double().view(num_tiles, size, 3)
        packed = self.pack(numbers, picture, torch.full((3,), -1.0).double())
        separators = packed[:, 0] == -1
        raster_rows = int(separators.sum())
        raster_cols = (len(packed) - size) // max(raster_rows, 1) - 1
        scaled = bool((packed[:, 1:] % 1).any())
        source = packed[:, 0].long()
        if scaled:
            row, col = packed[size:, 1:].round().long().unbind(dim=1)
            middle = (1 + row // rows * across + col // cols) * size + row % rows * cols + col % cols
            source[size:] = middle.masked_fill(separators[size:], -1)
        layout = tiled_layout(source, raster_rows, raster_cols, (rows, cols), num_tiles)
        return replace(layout, picture=picture) if scaled else layout

    def _columns(self, picture: tuple[int, int]) -> int:
        """Tiles side by side in the grid of a picture."""
        config = self.model.config
        size = config.vision_config.image_size
        return get_anyres_image_grid_shape(list(picture), config.image_grid_pinpoints, size)[1]
