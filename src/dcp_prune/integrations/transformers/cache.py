"""Conversations that go on: what is in a key-value cache, and where the new part of a prompt begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dcp_prune.errors import InvalidInputError


@dataclass(frozen=True, eq=False)
class CachedPrompt:
    """The beginning of a conversation as it is in a key-value cache.

    Attributes:
        columns: of the original prompt, in the order in which they were cached; -1 is padding. `b m`.
        width: columns of the original prompt.
        ids: the original prompt, where all of it is known. `b w`.
        next_position: where the column behind it lies, where positions do more than count tokens. `b 1`.
    """

    columns: Int[Tensor, "b m"]
    width: int
    ids: Int[Tensor, "b w"] | None
    next_position: Int[Tensor, "b 1"] | None = None


@dataclass(frozen=True, eq=False)
class NewTurn:
    """Where the new part of a conversation begins; without a cache, all of it is new.

    Attributes:
        head: columns of the original conversation before the new part, as far as they are in the cache. `b h`.
        head_width: columns of the original conversation before the new part, dropped ones included.
        start: column of `input_ids` where the new part begins.
    """

    head: Int[Tensor, "b h"]
    head_width: int
    start: int

    @property
    def cut(self) -> int:
        return self.head_width - self.head.shape[1]


def find_new_turn(
    ids: Int[Tensor, "b l"], mask: Tensor | None, cache: Any, cached: CachedPrompt | None, whole_prompt: bool
) -> NewTurn:
    b, length = ids.shape
    filled = 0 if cache is None else int(cache.get_seq_length())
    if filled == 0:
        return NewTurn(ids.new_empty(b, 0), 0, 0)
    if cached is None:
        known, width = torch.arange(filled, device=ids.device).expand(b, filled), filled
    else:
        known, width = cached.columns.to(ids.device), cached.width
        known = known.repeat_interleave(b // known.shape[0], dim=0)
    if not whole_prompt or (mask is not None and mask.shape[1] > length):
        # Only the new tokens were passed; tokens generated in between are in the cache as they are.
        between = torch.arange(width, filled + width - known.shape[1], device=ids.device).expand(b, -1)
        head = torch.cat((known, between), dim=1)
        return NewTurn(head, width + between.shape[1], 0)
    if cached is not None and cached.ids is not None:
        begin = cached.ids.to(ids.device).repeat_interleave(b // cached.ids.shape[0], dim=0)
        if not torch.equal(ids[:, :width], begin):
            raise InvalidInputError(
                "these input_ids do not begin with the prompt that is in the cache; pass the ids that generate "
                "returned, followed by the new turn, or start with an empty cache"
            )
    return NewTurn(known, width, width)
