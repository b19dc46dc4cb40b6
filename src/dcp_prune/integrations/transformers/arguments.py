"""What becomes of each argument of a call whose prompt gets shorter; what nobody can shorten is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers.cache import NewTurn
from dcp_prune.integrations.transformers.images import CallImages
from dcp_prune.integrations.transformers.positions import counted_positions, sample_starts, short_packing
from dcp_prune.integrations.transformers.prompt import close_gaps, real_columns, short_logits_to_keep, take_columns
from dcp_prune.models import ModelAdapter


def shorten_arguments(
    inputs: Mapping[str, Any],
    adapter: ModelAdapter,
    columns: Int[Tensor, "b m"],
    own: Int[Tensor, "b s"],
    turn: NewTurn,
    padding: int,
) -> dict[str, Any]:
    """The inputs without images: `columns` of the conversation for the mask, `own` for what is like `input_ids`."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    visual = (*adapter.image_inputs, *(adapter.video.image_inputs if adapter.video else ()))
    short = {name: value for name, value in inputs.items() if name not in visual}
    if own.shape != ids.shape or (own < 0).any():
        short |= _shorten_columns(short, own, {"input_ids": padding, "labels": -100, "shift_labels": -100})
        short |= short_packing(inputs, own, turn.head_width)
        wanted = inputs.get("logits_to_keep")
        if wanted is not None:
            short["logits_to_keep"] = short_logits_to_keep(wanted, own, real_columns(ids, mask))
        if inputs.get("num_items_in_batch") is not None:
            short["num_items_in_batch"] = _items_left(inputs, short)
    positions = counted_positions(inputs)
    short.pop("position_ids", None)
    if mask is not None:
        short["attention_mask"] = take_columns(mask, columns, 0)
    elif (columns < 0).any():
        starts = sample_starts(inputs, real_columns(ids, mask))
        if starts is not None and starts.any():
            raise InvalidInputError(
                "these rows hold several samples each and keep different numbers of tokens, which takes a mask that "
                "would let the samples see each other; pack all samples into one row"
            )
        short["attention_mask"] = (columns >= 0).long()
    if positions is not None:
        # Compact: gaps would make attention kernels believe that several sequences were packed into one.
        before = torch.zeros_like(ids[:, :1])
        if turn.start < turn.head_width:
            head = (turn.head >= 0) if mask is None else take_columns(mask, turn.head, 0).bool()
            whole = turn.head_width if mask is None else mask[:, : turn.head_width].sum(dim=1, keepdim=True)
            before = whole - head.sum(dim=1, keepdim=True)
        short["position_ids"] = close_gaps(positions, real_columns(ids, mask).to(positions.device), own, before)
    return short


def _shorten_columns(inputs: Mapping[str, Any], own: Int[Tensor, "b s"], fills: Mapping[str, int]) -> dict[str, Tensor]:
    """Everything that has a value for each column of `input_ids`.

    Raises:
        InvalidInputError: something has the length of the prompt in it, but is of another form.
    """
    shape = inputs["input_ids"].shape
    short = {}
    for name, value in inputs.items():
        if name in SHORTENED_OTHERWISE or not isinstance(value, Tensor):
            continue
        if value.shape[:2] == shape:
            short[name] = take_columns(value, own, fills.get(name, 0))
        elif shape[1] in value.shape[int(shape[0] > 1 or value.ndim > 1) :]:
            raise InvalidInputError(
                f"{name} of shape {tuple(value.shape)} seems to be about the {shape[1]} columns of the prompt, and "
                "nobody can say what is left of it in a shorter one; leave it out, or give it as rows x columns"
            )
    return short


SHORTENED_OTHERWISE = (
    "attention_mask",
    "position_ids",
    "logits_to_keep",
    "num_items_in_batch",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)
"""Inputs with the length of the prompt in them that are not simply rows x columns."""


def _items_left(inputs: Mapping[str, Any], short: Mapping[str, Any]) -> Any:
    """By how many labels the loss is to be divided; what is known of these holds for the rest of a larger batch."""
    name = "shift_labels" if inputs.get("shift_labels") is not None else "labels"
    items = inputs["num_items_in_batch"]
    if inputs.get(name) is None:
        return items
    first = int(name == "labels")  # the label of the first column is nobody's to predict
    given, left = ((each[name][:, first:] != -100).sum() for each in (inputs, short))
    return torch.where(left > 0, items * left / given.clamp(min=1), items)


def check_arguments(config: Any, inputs: Mapping[str, Any], kinds: Sequence[CallImages]) -> None:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    in_cache = inputs.get("past_key_values") is not None or inputs.get("mm_encoder_outputs") is not None
    for images in kinds:
        adapter = images.adapter
        unpruned = [name for name in adapter.unpruned_inputs if inputs.get(name) is not None]
        if unpruned:
            raise InvalidInputError(
                f"{', '.join(unpruned)} of {adapter.architecture} cannot be pruned yet, only images; "
                "remove the handle for such a call"
            )
        if not images and ids is not None and not in_cache and (ids == adapter.image_token_id).any():
            raise InvalidInputError(
                f"the prompt holds {adapter.modality} placeholders, but no {adapter.modality} came with it; pass "
                f"{adapter.image_inputs[0]}, or take the placeholders out of the prompt"
            )
        for name in adapter.image_inputs[1:] if images else ():
            value = inputs.get(name)
            if (
                name not in adapter.image_details
                and value is not None
                and (not hasattr(config, name) or getattr(config, name) != value)
            ):
                raise InvalidInputError(
                    f"{name}={value} differs from the model's config and cannot be set per call while pruning; "
                    f"set model.config.{name}"
                )
    if not any(kinds):
        return
    if ids is None:
        raise InvalidInputError(
            "images can be pruned only together with input_ids, which say where they stand; pass input_ids, not "
            "inputs_embeds"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        form = f"has {mask.ndim} dimensions" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        raise InvalidInputError(
            f"attention_mask {form}, but a prompt can be shortened only with the 2-D mask (rows x "
            "columns) that the processor makes"
        )


def pad_id(model: Any) -> int:
    """What to write into padding columns, which the mask hides; never the placeholder."""
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is not None:
            return config.pad_token_id
    return 0 if model.config.image_token_id != 0 else 1
