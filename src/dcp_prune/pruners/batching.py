"""Rows of a batch taken apart and put together again: some images, images of one budget, tiles of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from dcp_prune.functional.similarity import gather_tokens
from dcp_prune.tokens import EncoderTokens, PrunedTokens, VisualTokens, compose_assignments

_PER_IMAGE = ("text", "text_mask")


def take_rows(tokens: VisualTokens, which: slice | Sequence[int]) -> VisualTokens:
    """Some images of a batch, `b n d` -> `c n d`."""
    rows = which if isinstance(which, slice) else list(which)

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows]
        if isinstance(value, Mapping):
            return {name: pick(each) for name, each in value.items()}
        if isinstance(value, EncoderTokens):
            return replace(value, **pick(vars(value)))
        return value

    lengths = tokens.tile_lengths
    if lengths is not None:
        lengths = lengths[rows] if isinstance(rows, slice) else tuple(lengths[row] for row in rows)
    return replace(tokens, **pick(vars(tokens)) | {"tile_lengths": lengths})


def regroup(parts: Sequence[PrunedTokens], rows: Sequence[Sequence[int]]) -> PrunedTokens:
    """One result from those of groups of rows, padded to the longest; `rows` says where each group belongs.

    Numbers in `stats` that not every group reports are left out.
    """
    order = torch.tensor([row for group in rows for row in group]).argsort().to(parts[0].indices.device)

    def join(values: Sequence[Tensor], fill: int = 0) -> Tensor:
        if values[0].ndim == 1:
            return torch.cat(list(values))[order]
        width = max(value.shape[1] for value in values)
        short = [(width - value.shape[1]) for value in values]
        pads = [(0, 0) * (value.ndim - 2) + (0, missing) for value, missing in zip(values, short, strict=True)]
        joined = [functional.pad(value, pad, value=fill) for value, pad in zip(values, pads, strict=True)]
        return torch.cat(joined)[order]

    shared = set.intersection(*(set(part.stats) for part in parts))
    return PrunedTokens(
        features=join([part.features for part in parts]),
        indices=join([part.indices for part in parts], fill=-1),
        mask=join([part.mask for part in parts]),
        assignment=torch.cat([part.assignment for part in parts])[order],
        stats={name: join([part.stats[name] for part in parts]) for name in parts[0].stats if name in shared},
    )


def split_tiles(tokens: VisualTokens) -> VisualTokens:
    """One row per tile that has tokens, image by image: `b n d` -> `r w d` with w tokens in the largest tile.

    A picture of extreme shape may leave tiles that show nothing but its padding.

    `indices`, `num_original` and `assignment` go on to speak of the whole image.
    """
    assert tokens.tiles is not None
    assert tokens.tile_lengths is not None
    device, (b, n) = tokens.mask.device, tokens.mask.shape
    most = max(map(len, tokens.tile_lengths))
    width = min(n, max(max(lengths) for lengths in tokens.tile_lengths))
    image, tile = _owners(tokens, device)

    tiles = tokens.tiles.masked_fill(~tokens.mask, most)
    order = tiles.argsort(dim=1, stable=True)
    counts = torch.zeros(b, most + 1, dtype=torch.long, device=device).scatter_add(1, tiles, torch.ones_like(tiles))
    starts = (counts.cumsum(dim=1) - counts)[image, tile]
    slots = torch.arange(width, device=device)
    mask = slots < counts[image, tile].unsqueeze(1)
    # Column of the image's row that lands in each slot of the tile's.
    columns = order[image].gather(1, (starts.unsqueeze(1) + slots).clamp(max=n - 1))
    rank = order.argsort(dim=1)[image] - starts.unsqueeze(1)
    rank = rank.masked_fill(tiles[image] != tile.unsqueeze(1), -1)

    def pick(name: str, value: Any) -> Any:
        if isinstance(value, EncoderTokens):
            return replace(value, **{each: pick(each, inner) for each, inner in vars(value).items()})
        if not isinstance(value, Tensor):
            return value
        if name in _PER_IMAGE:
            return value[image]
        return value[image].gather(1, columns) if value.ndim == 2 else gather_tokens(value[image], columns)

    skipped = ("mask", "assignment", "tiles")
    picked = {name: pick(name, value) for name, value in vars(tokens).items() if name not in skipped}
    picked["tile_lengths"] = tuple((length,) for lengths in tokens.tile_lengths for length in lengths if length)
    return replace(
        tokens, **picked, mask=mask, tiles=None, assignment=compose_assignments(tokens.assignment[image], rank)
    )


def join_tiles(pruned: PrunedTokens, tokens: VisualTokens) -> PrunedTokens:
    """The inverse of `split_tiles` for what was kept of each tile: one row per image again, indices ascending."""
    assert tokens.tile_lengths is not None
    device, (_, k) = pruned.indices.device, pruned.indices.shape
    b, most = len(tokens.tile_lengths), max(map(len, tokens.tile_lengths))
    image, tile = _owners(tokens, device)

    def lay_out(value: Tensor, fill: int = 0) -> Tensor:
        """`r k ...` -> `b (most k) ...`."""
        laid = value.new_full((b, most, *value.shape[1:]), fill)
        return laid.index_put((image, tile), value).flatten(1, 2)

    mask = lay_out(pruned.mask)
    indices = lay_out(pruned.indices, -1)
    order = indices.masked_fill(~mask, tokens.num_original).argsort(dim=1, stable=True)
    slots = pruned.assignment + (tile * k).unsqueeze(1)
    slots = slots.masked_fill(pruned.assignment < 0, -1)
    joined = torch.full_like(tokens.assignment, -1).scatter_reduce(
        0, image.unsqueeze(1).expand_as(slots), slots, reduce="amax"
    )
    return PrunedTokens(
        features=gather_tokens(lay_out(pruned.features), order),
        indices=indices.gather(1, order),
        mask=mask.gather(1, order),
        assignment=compose_assignments(joined, order.argsort(dim=1)),
        stats=pruned.stats,
    )


def _owners(tokens: VisualTokens, device: torch.device) -> tuple[Int[Tensor, " r"], Int[Tensor, " r"]]:
    """Image and tile of each row of tiles."""
    assert tokens.tile_lengths is not None
    pairs = [
        (image, tile)
        for image, lengths in enumerate(tokens.tile_lengths)
        for tile, length in enumerate(lengths)
        if length
    ]
    return tuple(torch.tensor(pairs, device=device, dtype=torch.long).view(-1, 2).unbind(dim=1))  # type: ignore[return-value]
