"""Idefics3 and SmolVLM: tiles, then an overview, through a SigLIP tower whose patches a connector merges to cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dcp_prune.errors import InvalidInputError
from dcp_prune.models.base import EncodedImages, ModelAdapter, Reduction
from dcp_prune.models.layout import ImageLayout, mosaic_layout, plain_layout, tile_rows
from dcp_prune.models.tower import Tower
from dcp_prune.tokens import Signal


class Idefics3Adapter(ModelAdapter):
    """Which tiles make up an image stands in the prompt only, between the placeholders: `<row_1_col_1>` and its like
    before each tile, `<global-img>` before the overview, which ends an image. They go with the tiles they name.

    Without [CLS], attention that a token receives takes the place of what [CLS] pays to it. Signals are means over the
    patches of a cell.
    """

    architecture = "Idefics3ForConditionalGeneration"
    prunes_in_encoder = False
    why_not_in_encoder = ", whose connector merges whole cells of patches"
    cuts_tiles = True
    image_inputs = ("pixel_values", "pixel_attention_mask")
    image_details = ("pixel_attention_mask",)
    markers = True

    def __init__(self, model: Any) -> None:
        self.model = model
        tower = model.model.vision_model
        self.tower = Tower(tower, len(tower.encoder.layers), by_name=True)
        self.cell = model.config.scale_factor
        """Side of a cell in patches."""

    def grid(self, pixel_values: Float[Tensor, "b t c y x"] | None = None) -> tuple[int, int]:
        rows, cols = self.tower.grid(pixel_values)
        return rows // self.cell, cols // self.cell

    def layouts(self, images: Mapping[str, Any]) -> list[ImageLayout]:
        pixels, ids = images["pixel_values"], images.get("input_ids")
        real = self._real_tiles(images)
        grid = self.grid(pixels)
        if ids is None:
            return [plain_layout(*grid)] * int(real.sum())
        found = _read_images(ids, self.image_token_id, grid[0] * grid[1], real.sum(dim=1).tolist())
        return [
            mosaic_layout(tiles // across, across, grid) if tiles else plain_layout(*grid) for tiles, across in found
        ]

    def take(self, images: Mapping[str, Any], layouts: Sequence[ImageLayout], which: Sequence[int]) -> dict[str, Any]:
        real, rows = self._real_tiles(images), tile_rows(layouts, which)
        found = {name: images.get(name) for name in self.image_inputs}
        return {name: value[real][rows].unsqueeze(0) for name, value in found.items() if value is not None}

    def encode(
        self,
        images: Mapping[str, Any],
        stages: Sequence[Reduction] = (),
        signals: AbstractSet[Signal] = frozenset(),
        lap: Callable[[str], None] = lambda name: None,
        layouts: Sequence[ImageLayout] | None = None,
    ) -> EncodedImages:
        planned = self.check_stages(stages)
        layouts = self.layouts(images) if layouts is None else layouts
        real = self._real_tiles(images)
        pixels = images["pixel_values"][real].to(self.model.dtype)
        mask, side = images.get("pixel_attention_mask"), self.tower.module.patch_size
        mask = torch.ones_like(pixels[:, 0]) if mask is None else mask[real]
        patches = mask.unfold(1, side, side).unfold(2, side, side).sum(dim=(-1, -2)) > 0
        walk = self.tower.walk(pixels, planned, signals, lap, patches)
        features = self.model.model.connector(walk.normed(self.tower.module.post_layernorm))
        cells = walk.merged(self.tower.grid(pixels), self.cell)
        return cells.encoded(features, layouts, with_encoder=bool(signals))

    def hand_over(
        self, features: Iterable[Float[Tensor, "k d"]], deepstack: Sequence[Iterable[Float[Tensor, "k d"]]] = ()
    ) -> BaseModelOutputWithPooling:
        # Blocks of one token: the form that every release takes, whatever is left of a tile.
        return BaseModelOutputWithPooling(pooler_output=torch.cat(list(features)).unsqueeze(1))  # type: ignore[arg-type]

    def _real_tiles(self, images: Mapping[str, Any]) -> Bool[Tensor, "b t"]:
        """Which tiles do not only pad a row of the batch: as for the model itself, those that are not all zero."""
        pixels, mask = images["pixel_values"], images.get("pixel_attention_mask")
        rows, cols = self.tower.grid(pixels)
        if pixels.ndim != 5 or rows != cols or rows % self.cell:
            raise InvalidInputError(
                f"{self.architecture} takes pixel_values as prompts x tiles x channels x rows x columns, of square "
                f"tiles of a multiple of {self.cell} patches, got shape {tuple(pixels.shape)}; make them with the "
                "model's processor"
            )
        if mask is not None and mask.shape != (*pixels.shape[:2], *pixels.shape[3:]):
            raise InvalidInputError(
                f"pixel_attention_mask has the shape {tuple(mask.shape)}, which does not fit pixel_values of "
                f"{tuple(pixels.shape)}; make both in one call of the model's processor"
            )
        real = (pixels != 0).flatten(2).any(dim=2)
        if not real.any():
            raise InvalidInputError(
                f"every tile of pixel_values is zero, which {self.architecture} takes for padding; pass an image, or "
                "no pixel_values"
            )
        return real


class SmolVLMAdapter(Idefics3Adapter):
    """The same in another language model. Frames of a video are images to this model, and are pruned as such."""

    architecture = "SmolVLMForConditionalGeneration"


def _read_images(ids: Int[Tensor, "b l"], image_token_id: int, size: int, given: list[int]) -> list[tuple[int, int]]:
    """How many tiles each image has beside the overview that ends it, and how many of them lie side by side.

    Args:
        ids: prompts; those of a conversation may begin with images whose pixels are not there any more.
        size: placeholders of a tile.
        given: tiles in each row of the pixels.

    Raises:
        InvalidInputError: tiles and placeholders do not match.
    """
    places = ids == image_token_id
    room = places.sum(dim=1).tolist()
    mismatch = InvalidInputError(
        f"the prompt's rows hold {room} image placeholders, but pixel_values hold {given} tiles of {size} visual "
        "tokens each; make both in one call of the model's processor, and do not truncate them"
    )
    if any(count % size for count in room):
        raise mismatch
    row, column = places.nonzero(as_tuple=True)
    around = functional.pad(ids, (1, 1), value=-1)
    sides = (around[row[::size], column[::size]], around[row[::size], column[size - 1 :: size] + 2])
    runs = [side.tolist() for side in torch.stack(sides).split([count // size for count in room], dim=1)]
    lines = [_split_images(before, behind) for before, behind in runs]
    if len(lines) != len(given):
        lines, given = [[image for line in lines for image in line]], [sum(given)]
    found: list[tuple[int, int]] = []
    for images, tiles in zip(lines, given, strict=True):
        ends = [0, *accumulate(count + 1 for count, _ in images)]
        if ends[-1] - tiles not in ends:
            raise mismatch
        found.extend(images[ends.index(ends[-1] - tiles) :])
    return found


def _split_images(before: list[int], behind: list[int]) -> list[tuple[int, int]]:
    """`_read_images` of one prompt, from the ids right before and right behind each tile's run of placeholders.

    What stands before the last run names an overview. What stands behind an overview also stands behind each tile, but
    for the last one of a row of tiles, which a newline follows; where none does, the tiles count as one column.
    """
    images: list[tuple[int, int]] = []
    first = 0
    for tile, name in enumerate(before):
        if name == before[-1]:
            row_ends = [closer != behind[tile] for closer in behind[first:tile]]
            across = row_ends.index(True) + 1 if True in row_ends else 1
            images.append((tile - first, 1 if (tile - first) % across else across))
            first = tile + 1
    return images
