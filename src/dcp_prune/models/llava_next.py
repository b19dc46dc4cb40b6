"""LLaVA-NeXT (LLaVA-1.6): an overview of the image and the tiles of a grid, each through the CLIP tower by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from dcp_prune.errors import InvalidInputError
from dcp_prune.models.layout import ImageLayout, tiled_layout
from dcp_prune.models.llava import LlavaAdapter


class LlavaNextAdapter(LlavaAdapter):
    """Tiles are rows of the encoder; behind it they are joined to images.

    In the model's own prompt the overview comes first, then the grid's patches row by row across its tiles, without
    those that show padding, and a newline behind each row. Of this, patches are what is pruned. Newlines go as soon as
    anything does: they mark rows, and of rows few tokens are left.
    """

    architecture = "LlavaNextForConditionalGeneration"
    image_details = ("image_sizes",)

    @property
    def separator(self) -> Float[Tensor, " d"]:
        return self.model.model.image_newline

    def layouts(self, images: Mapping[str, Any]) -> list[ImageLayout]:
        pixels, sizes = images["pixel_values"], images.get("image_sizes")
        if sizes is None or pixels.ndim != 5 or len(sizes) != len(pixels):
            given = "none" if sizes is None else f"{len(sizes)}"
            raise InvalidInputError(
                f"{self.architecture} takes pixel_values as images x tiles x channels x rows x columns with one of "
                f"image_sizes for each, got shape {tuple(pixels.shape)} and {given}; make both with the model's "
                "processor"
            )
        made = {size: self._layout(size) for size in set(map(tuple, torch.as_tensor(sizes).tolist()))}
        layouts = [made[tuple(size)] for size in torch.as_tensor(sizes).tolist()]
        most = max(layout.num_tiles for layout in layouts)
        if most > pixels.shape[1]:
            raise InvalidInputError(
                f"an image of this size is cut into {most} tiles, but pixel_values hold {pixels.shape[1]}; make "
                "pixel_values and image_sizes in one call of the model's processor"
            )
        return layouts

    def stack_tiles(self, pixel_values: Tensor, layouts: Sequence[ImageLayout]) -> Float[Tensor, "t c y x"]:
        return torch.cat([tiles[: layout.num_tiles] for tiles, layout in zip(pixel_values, layouts, strict=True)])

    def _layout(self, size: tuple[int, int]) -> ImageLayout:
        """Of an image of (height, width) pixels, by having the model pack the numbers of the patches."""
        config, grid = self.model.config, self.grid()
        num_tiles = image_size_to_num_patches(list(size), config.image_grid_pinpoints, config.vision_config.image_size)
        patches = torch.arange(num_tiles * grid[0] * grid[1]).view(num_tiles, -1, 1)
        source = self._pack(patches, size)
        separators = int((source < 0).sum())
        raster = len(source) - grid[0] * grid[1]
        rows = separators if num_tiles > 1 else 0
        return tiled_layout(source, rows, raster // max(rows, 1) - 1, grid, num_tiles, separated=True)

    def _pack(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        packed, _ = self.model.model.pack_image_features(
            [patches],
            [list(size)],
            vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
            image_newline=torch.tensor([-1]),
        )
        return packed[0].squeeze(1)
