"""Positions of a short prompt in models whose rotary embedding does more than count tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from dcp_prune.integrations.transformers.cache import CachedPrompt, NewTurn
from dcp_prune.integrations.transformers.images import CallImages
from dcp_prune.integrations.transformers.prompt import compact_positions, take_columns
from dcp_prune.models import ModelAdapter


def rope_positions(
    adapter: ModelAdapter,
    kinds: Sequence[CallImages],
    inputs: Mapping[str, Any],
    tail: Int[Tensor, "b s"],
    turn: NewTurn,
    cached: CachedPrompt | None,
) -> Int[Tensor, "p b l"] | None:
    """Where the columns of `input_ids` lie in the original conversation, 0 for those that are in the cache; None where
    positions just count tokens."""
    given = inputs.get("position_ids")
    if given is not None:
        return given[-3:] if given.ndim == 3 else None
    mask = inputs.get("attention_mask")
    begin = 0 if mask is None else mask.shape[1] - tail.shape[1]
    own_mask = None if mask is None else mask[:, begin:].bool()
    details = {name: value for each in kinds for name, value in each.inputs.items()}
    found = adapter.rope_positions(tail, own_mask, {each.adapter.modality: each.layouts for each in kinds}, details)
    if found is None:
        return None
    found = found.to(tail.device)
    if turn.head_width:
        if cached is not None and cached.next_position is not None:
            first = cached.next_position.to(tail.device) + (turn.head_width - cached.width)
        else:
            first = turn.head_width if mask is None else mask[:, :begin].sum(dim=1, keepdim=True)
            first = first + (torch.zeros(1, 1) if adapter.rope_offset is None else adapter.rope_offset).to(tail)
        found = found + first.repeat_interleave(tail.shape[0] // first.shape[0], dim=0)
    if own_mask is not None:
        found = found.masked_fill(~own_mask, 0)
    return functional.pad(found, (turn.start, 0))


def short_rope_positions(
    rope: Int[Tensor, "p b l"], tensors: Mapping[str, Any], columns: Int[Tensor, "b m"], own: Int[Tensor, "b s"]
) -> Int[Tensor, "q b s"]:
    """`position_ids` of the short prompt: a count of tokens, from which attention masks are made, then each axis."""
    mask = tensors.get("attention_mask")
    counted = compact_positions(columns >= 0 if mask is None else mask.bool(), own.shape[1])
    return torch.stack((counted, *(take_columns(axis, own, 0) for axis in rope)))


def next_position(rope: Int[Tensor, "p b l"], mask: Tensor | None) -> Int[Tensor, "b 1"]:
    """Where the token behind the last one of each row lies."""
    ends = rope.amax(dim=0)
    if mask is None:
        return ends[:, -1:] + 1
    own = mask[:, mask.shape[1] - ends.shape[1] :].bool()
    last = torch.arange(ends.shape[1], device=ends.device).where(own, 0).amax(dim=1, keepdim=True)
    return ends.gather(1, last) + 1
