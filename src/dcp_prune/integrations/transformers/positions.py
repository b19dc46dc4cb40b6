"""Positions of a short prompt, and the samples that are packed into its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional
from transformers.utils.generic import is_flash_attention_requested

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers.cache import CachedPrompt, NewTurn
from dcp_prune.integrations.transformers.images import CallImages
from dcp_prune.integrations.transformers.prompt import compact_positions, real_columns, take_columns
from dcp_prune.models import ModelAdapter

Positions = Literal["compact", "original"]
"""Whether kept tokens are numbered as if the dropped ones had never been there, or as in the original prompt."""


def check_positions(model: Any, positions: Positions) -> None:
    """Refuses what cannot work, before any call.

    Raises:
        InvalidInputError: no such positions, or an attention that takes gaps for the borders of packed samples.
    """
    if positions not in get_args(Positions):
        raise InvalidInputError(f"positions is {positions!r}; use one of: {', '.join(get_args(Positions))}")
    if positions == "original" and is_flash_attention_requested(model.config.get_text_config()):
        raise InvalidInputError(
            "flash attention takes gaps between positions for the borders of packed samples; use positions='compact', "
            "or load the model with attn_implementation='sdpa'"
        )


def rope_positions(
    adapter: ModelAdapter,
    kinds: Sequence[CallImages],
    inputs: Mapping[str, Any],
    tail: Int[Tensor, "b s"],
    turn: NewTurn,
    cached: CachedPrompt | None,
    with_gaps: bool,
) -> Int[Tensor, "p b l"] | None:
    """Where the columns of `input_ids` lie in the original conversation, 0 for those that are in the cache; None where
    positions just count tokens, and dropped ones leave no gaps.

    Raises:
        InvalidInputError: gaps are asked for, and the conversation began without them or the other way round; or they
            would be taken for the borders of packed samples.
    """
    given = inputs.get("position_ids")
    if with_gaps and given is not None and given.ndim == 2:
        return _check_gaps(inputs, counted_positions(inputs))
    if given is not None:
        return given[-3:].expand(-1, *inputs["input_ids"].shape) if given.ndim == 3 else None
    mask = inputs.get("attention_mask")
    begin = 0 if mask is None else mask.shape[1] - tail.shape[1]
    own_mask = None if mask is None else mask[:, begin:].bool()
    details = {name: value for each in kinds for name, value in each.inputs.items()}
    found = adapter.rope_positions(tail, own_mask, {each.adapter.modality: each.layouts for each in kinds}, details)
    if found is None:
        if cached is not None and turn.cut and (cached.next_position is not None) != with_gaps:
            raise InvalidInputError(
                f"the prompt in this cache was pruned with positions={'compact' if with_gaps else 'original'!r}; go on "
                "with the same, or start with an empty cache"
            )
        if not with_gaps:
            return None
        real = torch.ones_like(tail) if own_mask is None else own_mask
        found = _check_gaps(inputs, (real.cumsum(dim=1) - 1).clamp(min=0))
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


def _check_gaps(inputs: Mapping[str, Any], counted: Int[Tensor, "b l"] | None) -> Int[Tensor, "1 b l"]:
    assert counted is not None
    starts = sample_starts(inputs, real_columns(inputs["input_ids"], inputs.get("attention_mask")))
    if starts is not None and starts.any():
        raise InvalidInputError(
            "samples that are packed into a row are told apart by their positions, where gaps would be taken for "
            "borders; use positions='compact' for packed rows"
        )
    return counted.unsqueeze(0)


def short_rope_positions(
    rope: Int[Tensor, "p b l"], tensors: Mapping[str, Any], columns: Int[Tensor, "b m"], own: Int[Tensor, "b s"]
) -> Int[Tensor, "*q b s"]:
    """`position_ids` of the short prompt: of one axis as they are, of several behind a count of tokens, from which
    attention masks are made."""
    if len(rope) == 1:
        return take_columns(rope[0], own, 0)
    counted = tensors.get("position_ids")  # the caller's own, if it had one
    if counted is None:
        mask = tensors.get("attention_mask")
        counted = compact_positions(columns >= 0 if mask is None else mask.bool(), own.shape[1])
    return torch.stack((counted, *(take_columns(axis, own, 0) for axis in rope)))


def counted_positions(inputs: Mapping[str, Any]) -> Int[Tensor, "b l"] | None:
    """The given positions that count tokens, if there are any; those of rotary axes do not.

    Raises:
        InvalidInputError: they are not about the columns of `input_ids`.
    """
    given, ids = inputs.get("position_ids"), inputs["input_ids"]
    if given is None:
        return None
    if given.ndim not in (2, 3) or given.shape[-1] != ids.shape[1] or given.shape[-2] not in (1, ids.shape[0]):
        raise InvalidInputError(
            f"position_ids of shape {tuple(given.shape)} do not fit input_ids of {tuple(ids.shape)}, which they must "
            "while pruning; give one position for each id, or leave them out"
        )
    if given.ndim == 3 and len(given) < 4:
        return None
    return (given if given.ndim == 2 else given[0]).expand(ids.shape)


def sample_starts(inputs: Mapping[str, Any], real: Bool[Tensor, "b l"]) -> Bool[Tensor, "b l"] | None:
    """Where positions begin again within a row, or `cu_seq_lens_q` say so, as several samples were packed into it;
    None if neither is given."""
    positions, borders = counted_positions(inputs), inputs.get("cu_seq_lens_q")
    if borders is not None:
        starts = torch.zeros(real.numel() + 1, dtype=torch.bool, device=real.device)
        starts[borders.to(real.device).long().clamp(max=real.numel())] = True
        return starts[:-1].view(real.shape)
    if positions is None:
        return None
    again = (positions[:, 1:] <= positions[:, :-1]) & (real[:, 1:] & real[:, :-1]).to(positions.device)
    return functional.pad(again, (1, 0))


def short_packing(inputs: Mapping[str, Any], own: Int[Tensor, "b s"], head_width: int) -> dict[str, Any]:
    """What `inputs` say about lengths of samples that are packed into one row, counted anew.

    Raises:
        InvalidInputError: there are several rows, or a cache in front of them.
    """
    short: dict[str, Any] = {}
    for side in ("q", "k"):
        borders = inputs.get(f"cu_seq_lens_{side}")
        if borders is None:
            continue
        if len(own) > 1 or head_width:
            raise InvalidInputError(
                f"cu_seq_lens_{side} can be shortened for one row without a cache only; pack all samples into one row"
            )
        counted = torch.searchsorted(own[0].contiguous(), borders.to(own)).to(borders)
        short[f"cu_seq_lens_{side}"] = counted
        if inputs.get(f"max_length_{side}") is not None:
            longest = counted.diff().max()
            given = inputs[f"max_length_{side}"]
            short[f"max_length_{side}"] = longest.to(given) if isinstance(given, Tensor) else int(longest)
    return short


def next_position(rope: Int[Tensor, "p b l"], mask: Tensor | None) -> Int[Tensor, "b 1"]:
    """Where the token behind the last one of each row lies."""
    ends = rope.amax(dim=0)
    if mask is None:
        return ends[:, -1:] + 1
    own = mask[:, mask.shape[1] - ends.shape[1] :].bool()
    last = torch.arange(ends.shape[1], device=ends.device).where(own, 0).amax(dim=1, keepdim=True)
    return ends.gather(1, last) + 1
