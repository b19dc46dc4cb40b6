"""What dropping visual tokens does to a prompt of token ids: pure functions, the same for every model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dcp_prune.errors import InvalidInputError


def locate_images(
    ids: Int[Tensor, "b l"], image_token_id: int, lengths: Sequence[int], modality: str = "image"
) -> tuple[Int[Tensor, " i"], Int[Tensor, "i n"]]:
    """Which row each image belongs to, and the columns of its placeholders; -1 behind those of shorter images.

    Images are counted off by their known lengths, not by runs of placeholders: two images may be adjacent.

    Raises:
        InvalidInputError: no placeholder, or not `lengths` of them.
    """
    placeholders = ids == image_token_id
    counts = placeholders.sum(dim=1).tolist()
    if sum(counts) == 0:
        raise InvalidInputError(
            f"{len(lengths)} {modality}(s) came with a prompt that holds no {modality} placeholder (token "
            f"{image_token_id}); write the placeholder into the prompt, e.g. '<{modality}>', and let the model's "
            "processor expand it"
        )
    per_row = images_per_row(counts, lengths, modality)
    owner = torch.tensor([row for row, count in enumerate(per_row) for _ in range(count)], device=ids.device)
    _, columns = placeholders.nonzero(as_tuple=True)
    longest = max(lengths)
    if min(lengths) == longest:
        return owner, columns.view(len(lengths), longest)
    return owner, pad_sequence(list(columns.split(list(lengths))), batch_first=True, padding_value=-1)


def images_per_row(counts: Sequence[int], lengths: Sequence[int], modality: str = "image") -> list[int]:
    """How many images stand in each row of a prompt, where row r holds `counts[r]` placeholders.

    Raises:
        InvalidInputError: the rows cannot be filled with images of these lengths, in this order.
    """
    if len(set(lengths)) == 1:
        n = lengths[0]
        if any(count % n for count in counts):
            raise InvalidInputError(
                f"the prompt's rows hold {list(counts)} {modality} placeholders, no multiple of the {n} visual tokens "
                f"of each {modality}; make the ids with the model's processor, which expands each placeholder, and do "
                "not truncate them"
            )
        if sum(counts) != len(lengths) * n:
            raise InvalidInputError(
                f"the prompt has room for {sum(counts) // n} {modality}(s), but {len(lengths)} were given; "
                f"write exactly one placeholder per {modality}"
            )
        return [count // n for count in counts]
    ends = [0, *accumulate(lengths)]
    borders = [0, *accumulate(counts)]
    if borders[-1] != ends[-1] or not set(borders) <= set(ends):
        raise InvalidInputError(
            f"the prompt's rows hold {list(counts)} {modality} placeholders, but the {modality}s have {list(lengths)} "
            f"visual tokens; make the ids and the {modality}s in one call of the model's processor, and do not "
            "truncate them"
        )
    places = [ends.index(border) for border in borders]
    return [after - before for before, after in pairwise(places)]


def surviving_columns(
    mask: Bool[Tensor, "b l"] | None,
    ids: Int[Tensor, "b l"],
    rows: Int[Tensor, " i"],
    columns: Int[Tensor, "i n"],
    kept: Int[Tensor, "i k"],
    gone: Sequence[Bool[Tensor, "b l"]] = (),
) -> Int[Tensor, "b m"]:
    """Column of the prompt that lands in each column of the short prompt; -1 is padding.

    Rows keep all their text but what is `gone`, and of each image the `kept` placeholders (-1 is none). m is the
    longest row; padding is taken off and put back on the side where the batch had it (left if it had none), masked
    columns inside a row stay.
    """
    keep = torch.ones_like(ids, dtype=torch.bool)
    right = False
    if mask is not None:
        keep = (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0)
        right = bool(((~mask[:, -1]).any() & mask[:, 0].all()).item())
    # The column behind the last takes what images of fewer tokens have no column for.
    keep = torch.cat((keep, keep[:, :1]), dim=1)
    survivors = columns.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, -1)
    keep[rows.unsqueeze(1), columns] = False
    keep[rows.unsqueeze(1), survivors] = True
    keep = keep[:, :-1]
    for columns in gone:
        keep = keep & ~columns
    length = int(keep.sum(dim=1).max().item())
    order = torch.argsort(keep.int(), dim=1, stable=True, descending=right)
    order = order[:, :length] if right else order[:, keep.shape[1] - length :]
    return order.masked_fill(~keep.gather(1, order), -1)


def take_columns(tensor: Tensor, columns: Int[Tensor, "b m"], fill: int) -> Tensor:
    """Gathers columns of a `b l` tensor, with `fill` where the column is -1."""
    columns = columns.to(tensor.device)
    return tensor.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, fill)


def compact_positions(mask: Bool[Tensor, "b l"], length: int) -> Int[Tensor, "b l"]:
    """Positions that count only real tokens, for the last `length` columns; padding is at 0."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
