"""Text between the placeholders of an image that marks its rows and tiles, and goes with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dcp_prune.integrations.transformers.images import PrunedImages


def markers_of_dropped(
    ids: Int[Tensor, "b l"],
    pruned: PrunedImages,
    rows: Int[Tensor, " i"],
    places: Int[Tensor, "i n"],
    whole: Sequence[bool],
) -> Bool[Tensor, "b l"]:
    """What stands between the placeholders of each image that loses some: marks of rows and tiles that are gone."""
    adapter = pruned.images.adapter
    if adapter.tile_marks is None:
        columns = torch.arange(ids.shape[1], device=ids.device)
        first, last = places[:, :1], places.amax(dim=1, keepdim=True)
        gone = (columns > first) & (columns < last) & ~torch.tensor(whole, device=ids.device).unsqueeze(1)
    else:
        gone = _marks_of_empty_tiles(ids[rows], pruned, places, adapter.tile_marks)
    inside = torch.zeros(ids.shape, dtype=torch.long, device=ids.device).index_add(0, rows, gone.long()) > 0
    return inside & (ids != adapter.image_token_id)


def _marks_of_empty_tiles(
    ids: Int[Tensor, "i l"], pruned: PrunedImages, places: Int[Tensor, "i n"], marks: tuple[int, int]
) -> Bool[Tensor, "i l"]:
    """Marks of tiles of which nothing is kept; in front of an image and behind it, only those that touch it."""
    layouts, (i, length) = pruned.images.layouts, ids.shape
    most = max(layout.num_tiles for layout in layouts)
    tiles = pad_sequence([layout.source // layout.tile_size for layout in layouts], True).to(ids.device)
    kept = pruned.tokens.indices.to(ids.device)
    alive = torch.zeros(i, most + 1, dtype=torch.bool, device=ids.device)
    alive.scatter_(1, tiles.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, most), True)
    # Tile of each placeholder; the column behind the last takes those of longer images.
    places = places[:, : tiles.shape[1]].masked_fill(places[:, : tiles.shape[1]] < 0, length)
    own = ids.new_full((i, length + 1), -1).scatter(1, places, tiles)[:, :length]
    before = own.cummax(dim=1).values
    behind = own.masked_fill(own < 0, most).flip(1).cummin(dim=1).values.flip(1)
    opening, closing = (ids == mark for mark in marks)
    about = torch.where(closing, before, behind)
    touching = (closing & (own.roll(1, 1) >= 0)) | (opening & (own.roll(-1, 1) >= 0))
    between = (before >= 0) & (behind < most)
    return (between | touching) & ~alive.gather(1, about.clamp(min=0))
