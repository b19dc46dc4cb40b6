"""Where the visual tokens of an image lie: which patch of which tile each placeholder of the prompt stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dcp_prune.functional.similarity import gather_tokens
from dcp_prune.tokens import EncoderTokens, VisualTokens


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """The placeholders of one image in the order of the prompt, which are its original tokens; tensors on the CPU.

    Attributes:
        source: patch of each placeholder, counted through the tiles one after the other, each in raster order; -1 for a
            separator, such as the newline behind a row of patches. `N`.
        positions: (row, col) in units of the finest patches, of which an overview tile's are many; of a video (row,
            col, time). `N p`.
        boxes: top, left, bottom and right edge of the patch as shares of the picture that the model saw; a separator
            has no area. `N 4`.
        num_tiles: images that the encoder sees of this one; frames of a video.
        grid: (rows, cols) of patches of a tile.
        picture: height and width of the picture in pixels, where the model scales the raster of its patches down behind
            the encoder; `source` then names the patch in the middle of each token. None where tokens are patches.
    """

    source: Int[Tensor, " N"]
    positions: Float[Tensor, "N p"]
    boxes: Float[Tensor, "N 4"]
    num_tiles: int
    grid: tuple[int, int]
    picture: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.source.shape[0]

    @property
    def tile_size(self) -> int:
        """Patches of a tile."""
        return self.grid[0] * self.grid[1]

    @cached_property
    def tile_lengths(self) -> tuple[int, ...]:
        """Tokens of each tile: patches that are in the prompt."""
        tiles = self.source[self.source >= 0] // self.tile_size
        return tuple(torch.bincount(tiles, minlength=self.num_tiles).tolist())

    @cached_property
    def is_plain(self) -> bool:
        """Whether the tokens are the patches of a single tile, one by one."""
        return self.num_tiles == 1 and torch.equal(self.source, torch.arange(self.tile_size))


@lru_cache(maxsize=64)
def plain_layout(rows: int, cols: int) -> ImageLayout:
    """One tile in raster order, without separators."""
    n = rows * cols
    positions = torch.stack((torch.arange(n) // cols, torch.arange(n) % cols), dim=1).float()
    size = torch.tensor([rows, cols])
    boxes = torch.cat((positions / size, (positions + 1) / size), dim=1)
    return ImageLayout(torch.arange(n), positions, boxes, 1, (rows, cols))


def frames_layout(frames: int, rows: int, cols: int, *, step: float = 1.0) -> ImageLayout:
    """A video: its frames one after the other, each in raster order, without separators.

    Args:
        frames: at least one.
        rows, cols: patches of a frame.
        step: time from a frame to the next; 1 counts frames. How far apart that makes tokens is up to the pruner, see
            `DCPPruner.time_weight`.
    """
    frame = plain_layout(rows, cols)
    time = torch.arange(frames).repeat_interleave(rows * cols).unsqueeze(1) * step
    positions = torch.cat((frame.positions.repeat(frames, 1), time), dim=1)
    return ImageLayout(torch.arange(frames * rows * cols), positions, frame.boxes.repeat(frames, 1), frames, frame.grid)


@lru_cache(maxsize=64)
def stacked_layout(tiles: int, rows: int, cols: int) -> ImageLayout:
    """Tiles of which nobody knows how they lie in the picture, each in raster order, without separators: boxes are
    shares of the tile that a token comes from, and positions those of tiles one below the other (ours), so that tokens
    of different tiles are not taken for neighbours."""
    tile = plain_layout(rows, cols)
    below = torch.arange(tiles).repeat_interleave(rows * cols) * rows
    positions = tile.positions.repeat(tiles, 1) + torch.stack((below, torch.zeros_like(below)), dim=1)
    return ImageLayout(torch.arange(len(below)), positions, tile.boxes.repeat(tiles, 1), tiles, tile.grid)


def with_separators(layout: ImageLayout, before: Sequence[int]) -> ImageLayout:
    """The same patches, with separators between them.

    Args:
        layout: without separators.
        before: the patch that each separator stands before, ascending; `len(layout)` is the end.
    """
    separates = torch.zeros(len(layout) + len(before), dtype=torch.bool)
    separates[torch.tensor(before) + torch.arange(len(before))] = True
    patch = ((~separates).cumsum(0) - (~separates).long()).clamp(max=len(layout) - 1)
    return replace(
        layout,
        source=layout.source[patch].masked_fill(separates, -1),
        positions=layout.positions[patch],
        boxes=layout.boxes[patch].masked_fill(separates.unsqueeze(1), 0.0),
    )


def tiled_layout(source: Int[Tensor, " N"], rows: int, cols: int, grid: tuple[int, int], num_tiles: int) -> ImageLayout:
    """An overview tile, then the patches of the other tiles as one raster of rows x cols with a separator behind each
    row; or the overview alone with a separator behind it.

    Args:
        source: as in `ImageLayout`. `N`.
        rows, cols: the raster without separators and without the padding of the picture.
        grid: of a tile.
        num_tiles: the overview included.
    """
    overview = plain_layout(*grid)
    if num_tiles == 1:
        corner = torch.tensor([grid]).float()
        boxes = torch.cat((overview.boxes, torch.ones(1, 4)))
        return ImageLayout(source, torch.cat((overview.positions, corner)), boxes, 1, grid)
    index = torch.arange(rows * (cols + 1))
    corner = torch.stack((index // (cols + 1), index % (cols + 1)), dim=1).float()
    extent = torch.tensor([float(rows), float(cols)])
    far = torch.minimum(corner + 1, extent)
    boxes = torch.cat((overview.boxes, torch.cat((corner / extent, far / extent), dim=1)))
    # Patches of the overview sit where their middle is among the finer ones.
    middle = (overview.boxes[:, :2] + overview.boxes[:, 2:]) / 2 * extent - 0.5
    return ImageLayout(source, torch.cat((middle, corner)), boxes, num_tiles, grid)


@lru_cache(maxsize=64)
def mosaic_layout(down: int, across: int, grid: tuple[int, int]) -> ImageLayout:
    """Tiles of down x across, row by row and each in raster order, then an overview of them all; no separators.

    Args:
        grid: (rows, cols) of tokens of a tile.
    """
    overview = plain_layout(*grid)
    tile = torch.arange(down * across)
    corner = torch.stack((tile // across, tile % across), dim=1) * torch.tensor(grid)
    fine = (corner.unsqueeze(1) + overview.positions).flatten(0, 1)
    extent = torch.tensor([down * grid[0], across * grid[1]]).float()
    middle = (overview.boxes[:, :2] + overview.boxes[:, 2:]) / 2 * extent - 0.5
    boxes = torch.cat((torch.cat((fine, fine + 1), dim=1) / extent.repeat(2), overview.boxes))
    return ImageLayout(torch.arange(len(boxes)), torch.cat((fine, middle)), boxes, len(tile) + 1, grid)


def tile_rows(layouts: Sequence[ImageLayout], images: Sequence[int]) -> list[int]:
    """Rows of the tiles of these images, where the tiles of all images are stacked."""
    ends = [0]
    for layout in layouts:
        ends.append(ends[-1] + layout.num_tiles)
    return [row for image in images for row in range(ends[image], ends[image + 1])]


def pad_images(
    features: Sequence[Float[Tensor, "n d"]],
    layouts: Sequence[ImageLayout],
    signals: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
) -> VisualTokens:
    """One row per image, padded to the longest, `b n d`, where all tokens of an image leave the projector together.

    Args:
        features: behind the projector, one tensor an image, in the order of its placeholders.
        layouts: of the same images, without separators.
        signals: fields of `EncoderTokens` by name (`features`, `cls_attention`, ...), one tensor an image, `n ...`.
    """
    device, lengths = features[0].device, [len(layout) for layout in layouts]
    longest = max(lengths)

    def pad(rows: Sequence[Tensor]) -> Tensor:
        return pad_sequence([row.to(device) for row in rows], batch_first=True)

    order = torch.arange(longest, device=device).expand(len(lengths), -1)
    mask = order < torch.tensor(lengths, device=device).unsqueeze(1)
    positions = pad([layout.positions for layout in layouts])
    found: dict[str, Any] = {name: pad(rows) for name, rows in signals.items()}
    encoder = None
    if found:
        found.setdefault("features", pad(features))
        encoder = EncoderTokens(**found, positions=positions, indices=order, mask=mask)
    plain = all(layout.num_tiles == 1 for layout in layouts) and min(lengths) == longest
    return VisualTokens(
        features=pad(features),
        mask=mask,
        positions=positions,
        indices=order,
        num_original=longest,
        assignment=order.masked_fill(~mask, -1),
        encoder=encoder,
        tiles=None if plain else pad([layout.source // layout.tile_size for layout in layouts]),
        tile_lengths=None if plain else tuple(layout.tile_lengths for layout in layouts),
    )


def join_images(tokens: VisualTokens, layouts: Sequence[ImageLayout]) -> VisualTokens:
    """Tokens of stacked tiles, `t n d`, as one row per image, `b m d`, in the order of the prompt.

    Patches that are not in the prompt, since they show the picture's padding, are masked. `indices` and `assignment`
    then count placeholders.
    """
    if all(layout.is_plain for layout in layouts):
        return tokens
    device, (_, n) = tokens.mask.device, tokens.indices.shape
    size, b = layouts[0].tile_size, len(layouts)
    most, longest = max(each.num_tiles for each in layouts), max(map(len, layouts))
    width = min(most * n, max(sum(each.tile_lengths) for each in layouts))
    tile = torch.arange(most, device=device).view(1, most, 1)

    first = torch.tensor([0, *(each.num_tiles for each in layouts[:-1])]).cumsum(0)
    exists = torch.arange(most) < torch.tensor([each.num_tiles for each in layouts]).unsqueeze(1)
    rows = ((first.unsqueeze(1) + torch.arange(most)) * exists).to(device)  # b most
    source = torch.full((b, longest), -1)
    positions = torch.zeros(b, longest, layouts[0].positions.shape[1])
    for row, layout in enumerate(layouts):
        source[row, : len(layout)] = layout.source
        positions[row, : len(layout)] = layout.positions
    # Placeholder of each patch; the last slot takes what placeholders without a patch write.
    place = torch.full((b, most * size + 1), longest).scatter(
        1, source % (most * size + 1), torch.arange(longest).expand(b, -1)
    )
    place[:, -1] = longest
    source, positions, place = source.to(device), positions.to(device), place.to(device)

    present = tokens.mask[rows] & exists.to(device).unsqueeze(2)
    placed = place.gather(1, (tokens.indices[rows] + tile * size).flatten(1)).masked_fill(~present.flatten(1), longest)
    order = placed.argsort(dim=1, stable=True)
    taken = (rows.unsqueeze(2) * n + torch.arange(n, device=device)).flatten(1).gather(1, order[:, :width])
    indices = placed.gather(1, order[:, :width])
    mask = indices < longest
    indices = indices.clamp(max=longest - 1)
    positions = gather_tokens(positions, indices)

    slot = tokens.assignment[rows].flatten(1).gather(1, source.clamp(min=0))
    slot = slot.masked_fill(source < 0, -1)
    stacked = slot.clamp(min=0) + source.clamp(min=0) // size * n
    absorbed = (slot >= 0) & (placed.gather(1, stacked) < longest)
    assignment = order.argsort(dim=1).gather(1, stacked).masked_fill(~absorbed, -1)

    encoder = tokens.encoder
    if encoder is not None:
        signals = {
            name: value.flatten(0, 1)[taken]
            for name in ("features", "cls_attention", "keys", "values", "cls_value_affinity")
            if (value := getattr(encoder, name)) is not None
        }
        encoder = replace(encoder, **signals, positions=positions, indices=indices, mask=mask)
    return VisualTokens(
        features=tokens.features.flatten(0, 1)[taken],
        mask=mask,
        positions=positions,
        indices=indices,
        num_original=longest,
        assignment=assignment,
        encoder=encoder,
        tiles=order[:, :width] // n,
        tile_lengths=tuple(layout.tile_lengths for layout in layouts),
    )
