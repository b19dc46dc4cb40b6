"""What dropping visual tokens does to a prompt of token ids: pure functions, the same for every model."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dcp_prune.errors import InvalidInputError


def locate_images(
    ids: Int[Tensor, "b l"], image_token_id: int, num_tokens: int, num_images: int
) -> tuple[Int[Tensor, " i"], Int[Tensor, "i n"]]:
    """Which row each image belongs to, and the columns of its n placeholders.

    Images are counted off by their known length, not by runs of placeholders: two images may be adjacent.

    Raises:
        InvalidInputError: no placeholder, or not n for each of the images.
    """
    placeholders = ids == image_token_id
    counts = placeholders.sum(dim=1).tolist()
    if sum(counts) == 0:
        raise InvalidInputError(
            f"{num_images} image(s) came with a prompt that holds no image placeholder (token {image_token_id}); "
            "write the placeholder into the prompt, e.g. '<image>', and let the model's processor expand it"
        )
    if any(count % num_tokens for count in counts):
        raise InvalidInputError(
            f"the prompt's rows hold {counts} image placeholders, no multiple of the {num_tokens} visual tokens of an "
            "image; make the ids with the model's processor, which expands each placeholder, and do not truncate them"
        )
    if sum(counts) != num_images * num_tokens:
        raise InvalidInputError(
            f"the prompt has room for {sum(counts) // num_tokens} image(s), but {num_images} were given; "
            "write exactly one placeholder per image"
        )
    rows, columns = placeholders.nonzero(as_tuple=True)
    return rows.view(num_images, num_tokens)[:, 0], columns.view(num_images, num_tokens)


def find_question(
    ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"] | None, image_token_id: int, special_ids: Int[Tensor, " s"]
) -> Bool[Tensor, "b l"]:
    """The words that ask about the images: no placeholder, padding or special token, and behind the last placeholder.

    A row where nothing follows the image (text first, image last) gives all its words.
    """
    length = ids.shape[1]
    placeholders = ids == image_token_id
    words = ~placeholders & ~torch.isin(ids, special_ids)
    if mask is not None:
        words = words & mask
    columns = torch.arange(length, device=ids.device)
    last = torch.where(placeholders, columns, -1).amax(dim=1, keepdim=True)
    behind = words & (columns > last)
    return torch.where(behind.any(dim=1, keepdim=True), behind, words)


def surviving_columns(
    mask: Bool[Tensor, "b l"] | None,
    ids: Int[Tensor, "b l"],
    rows: Int[Tensor, " i"],
    columns: Int[Tensor, "i n"],
    kept: Int[Tensor, "i k"],
) -> Int[Tensor, "b m"]:
    """Column of the prompt that lands in each column of the short prompt; -1 is padding.

    Rows keep all their text, and of each image the k `kept` placeholders. m is the longest row; padding is taken off
    and put back on the side where the batch had it (left if it had none), masked columns inside a row stay.
    """
    keep = torch.ones_like(ids, dtype=torch.bool)
    right = False
    if mask is not None:
        keep = (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0)
        right = bool(((~mask[:, -1]).any() & mask[:, 0].all()).item())
    keep[rows.unsqueeze(1), columns] = False
    keep[rows.unsqueeze(1), columns.gather(1, kept)] = True
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
