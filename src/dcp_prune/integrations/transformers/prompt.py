"""What dropping visual tokens does to a prompt of token ids: pure functions, the same for every model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional
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
    longest row. Padding is taken off and put back on the side where the batch had it (left if it had none); if it had
    some on both sides, that on the right stays as it is, so that columns counted from the end go on to mean the same.
    Masked columns inside a row stay.
    """
    keep = torch.ones_like(ids, dtype=torch.bool)
    behind = torch.zeros_like(keep)
    right = False
    if mask is not None:
        right = bool(((~mask[:, -1]).any() & mask[:, 0].all()).item())
        behind = mask.flip(1).cumsum(1).flip(1) == 0
        keep = ~behind if right else mask.cumsum(1) > 0
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
    return order.masked_fill(~(keep & ~behind).gather(1, order), -1)


def real_columns(ids: Int[Tensor, "b l"], mask: Tensor | None) -> Bool[Tensor, "b l"]:
    """Where ids are no padding; the mask may begin further left than they do."""
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, mask.shape[1] - ids.shape[1] :].bool()


def take_columns(tensor: Tensor, columns: Int[Tensor, "b m"], fill: int) -> Tensor:
    """Gathers columns of a `b l ...` tensor, with `fill` where the column is -1."""
    columns = columns.to(tensor.device).view(*columns.shape, *(1,) * (tensor.ndim - 2))
    columns = columns.expand(-1, -1, *tensor.shape[2:])
    return tensor.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, fill)


def put_columns(tensor: Tensor, columns: Int[Tensor, "b m"], width: int) -> Tensor:
    """The way back: a `b m ...` tensor in columns of the original prompt, 0 where nothing is left: `b width ...`."""
    columns = columns.to(tensor.device)
    places = torch.where(columns < 0, width, columns)  # the column behind the last takes padding
    places = places.view(*places.shape, *(1,) * (tensor.ndim - 2)).expand_as(tensor)
    return tensor.new_zeros(len(tensor), width + 1, *tensor.shape[2:]).scatter(1, places, tensor)[:, :width]


def compact_positions(mask: Bool[Tensor, "b l"], length: int) -> Int[Tensor, "b l"]:
    """Positions that count only real tokens, for the last `length` columns; padding is at 0."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]


def close_gaps(
    positions: Int[Tensor, "b l"], real: Bool[Tensor, "b l"], columns: Int[Tensor, "b m"], before: Int[Tensor, "b 1"]
) -> Int[Tensor, "b m"]:
    """Positions of a short prompt: each is lowered by the number of tokens that were dropped in front of it.

    Where positions begin again, another sample begins, and what was dropped of the one before does not count.

    Args:
        positions, real: of the prompt before anything is dropped, and where it is no padding.
        columns: of the prompt in each column of the short one, -1 for padding.
        before: tokens that were dropped in front of this part of the conversation.
    """
    kept = put_columns(torch.ones_like(columns), columns, positions.shape[1]) > 0
    gone = (real & ~kept).long()
    earlier = gone.cumsum(dim=1) - gone
    begins = functional.pad(positions[:, 1:] <= positions[:, :-1], (1, 0), value=True)
    earlier = earlier - earlier.where(begins, 0).cummax(dim=1).values
    return take_columns(positions - earlier - before, columns, 0).clamp(min=0)


def split_samples(
    starts: Bool[Tensor, "b l"],
    ids: Int[Tensor, "b l"],
    mask: Bool[Tensor, "b l"],
    rows: Int[Tensor, " i"],
    columns: Int[Tensor, "i n"],
) -> tuple[Int[Tensor, "s w"], Bool[Tensor, "s w"], Int[Tensor, " i"], Int[Tensor, "i n"]]:
    """Samples that were packed into rows, each in a row of its own: ids, mask, rows and columns of the images.

    Args:
        starts: where a sample begins, beside the first of each row.
        ids, mask: of the packed rows.
        rows, columns: as `locate_images` finds them in the packed rows.
    """
    starts = starts.clone()
    starts[:, 0] = True
    sample = starts.flatten().cumsum(0) - 1
    lengths = sample.bincount().tolist()
    first = starts.flatten().nonzero().squeeze(1) % ids.shape[1]
    own = sample.view(ids.shape)[rows, columns[:, 0]]
    apart, real = (pad_sequence(list(each.flatten().split(lengths)), batch_first=True) for each in (ids, mask))
    return apart, real, own, torch.where(columns < 0, -1, columns - first[own].unsqueeze(1))


def short_logits_to_keep(
    wanted: int | Tensor, columns: Int[Tensor, "b m"], real: Bool[Tensor, "b l"]
) -> int | Int[Tensor, " k"]:
    """Which columns of the short prompt are those of which the caller wants logits.

    Args:
        wanted: how many of the last columns of the original prompt, or which of its columns; 0 is all that are left.
        columns: of the prompt in each column of the short one, -1 for padding.
        real: where the prompt is no padding.

    Raises:
        InvalidInputError: one of them was dropped or does not exist, or they are no longer the same in all rows.
    """
    length = real.shape[1]
    if isinstance(wanted, int):
        if wanted == 0:
            return 0
        which = torch.arange(max(length - wanted, 0), length, device=columns.device)
    else:
        which = wanted.to(columns.device)
        which = which.nonzero().squeeze(1) if which.dtype == torch.bool else which + length * (which < 0)
        if which.numel() and not 0 <= int(which.min()) <= int(which.max()) < length:
            raise InvalidInputError(f"logits_to_keep names columns of a prompt of {length} that do not exist")
    number = torch.arange(1, columns.shape[1] + 1, device=columns.device).expand_as(columns)
    places = put_columns(number, columns, length)[:, which] - 1
    missing = places < 0
    lost = (missing & real.to(missing.device)[:, which]).any(dim=0)
    if lost.any():
        raise InvalidInputError(
            f"logits_to_keep asks for column {int(which[lost][0])} of the prompt, which was dropped with its visual "
            "token and has no logits; ask for columns of text"
        )
    found = places.amax(dim=0) if places.numel() else which
    if ((places != found) & ~missing).any():
        raise InvalidInputError(
            "logits_to_keep asks for columns that stand at different places in the rows of the short prompt, which "
            "lost different numbers of tokens; pad the prompts on the left, or leave logits_to_keep out and read "
            "handle.last.columns"
        )
    last = torch.arange(columns.shape[1] - len(which), columns.shape[1], device=columns.device)
    if isinstance(wanted, int) and ((found == last) | (found < 0)).all() and last[0] >= 0:
        return wanted
    return found.clamp(min=0)
