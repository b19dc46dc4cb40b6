"""What the arguments of `generate` have to learn about a prompt that is shorter inside than outside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

Restore = Callable[[Int[Tensor, "r s"]], Int[Tensor, "r l"]]
"""Puts the original prompt back in front of the new tokens."""


def for_short_prompt(
    call: dict[str, Any], original: Int[Tensor, "b l"], restore: Restore, defaults: GenerationConfig
) -> dict[str, Any]:
    """Arguments of `generate` that mean the same for the short `input_ids` in `call` as the caller meant.

    `max_length` and `min_length` count the prompt and are lowered by the cut; the caller's own streamer, logits
    processors, stopping criteria and `prefix_allowed_tokens_fn` go on to see the original prompt.
    """
    call = dict(call)
    cut = original.shape[1] - call["input_ids"].shape[1]
    for limit, newer in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = setting(limit, call, defaults)
        if value is None or setting(newer, call, defaults) is not None:
            continue
        lowered = max(value - cut, 0)
        if call.get(limit) is None and call.get("generation_config") is not None:
            call["generation_config"] = copy.deepcopy(call["generation_config"])
            setattr(call["generation_config"], limit, lowered)
        else:
            call[limit] = lowered
    if call.get("streamer") is not None:
        call["streamer"] = _Streamer(call["streamer"], original)
    if call.get("logits_processor"):
        call["logits_processor"] = LogitsProcessorList([_Processor(p, restore) for p in call["logits_processor"]])
    if call.get("stopping_criteria"):
        criteria = call["stopping_criteria"]
        criteria = criteria if isinstance(criteria, list) else [criteria]
        call["stopping_criteria"] = StoppingCriteriaList([_Criterion(c, restore) for c in criteria])
    if call.get("prefix_allowed_tokens_fn") is not None:
        allowed, length = call["prefix_allowed_tokens_fn"], call["input_ids"].shape[1]
        # `generate` counts beams of a prompt as one row, but each of its samples as a row.
        beams = (setting("num_beams", call, defaults) or 1) > 1
        samples = 1 if beams else setting("num_return_sequences", call, defaults) or 1

        def allowed_behind_original(row: int, ids: Int[Tensor, " s"]) -> Any:
            return allowed(row, torch.cat((original[row // samples], ids[length:])))

        call["prefix_allowed_tokens_fn"] = allowed_behind_original
    return call


def setting(name: str, call: dict[str, Any], defaults: GenerationConfig) -> Any:
    """What a call of `generate` says about one of its settings, or the model does."""
    for value in (call.get(name), getattr(call.get("generation_config"), name, None), getattr(defaults, name, None)):
        if value is not None:
            return value
    return None


class _Streamer(BaseStreamer):
    """Replaces the first thing put, which is the prompt."""

    def __init__(self, streamer: BaseStreamer, prompt: Int[Tensor, "b l"]) -> None:
        self._streamer = streamer
        self._prompt: Tensor | None = prompt

    def put(self, value: Tensor) -> None:
        if self._prompt is not None:
            value, self._prompt = self._prompt.to(value.device), None
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()


class _Processor(LogitsProcessor):
    def __init__(self, processor: Callable[..., Tensor], restore: Restore) -> None:
        self._processor = processor
        self._restore = restore

    def __call__(self, input_ids: Int[Tensor, "r s"], scores: Float[Tensor, "r v"]) -> Any:
        return self._processor(self._restore(input_ids), scores)


class _Criterion(StoppingCriteria):
    def __init__(self, criterion: Callable[..., Tensor], restore: Restore) -> None:
        self._criterion = criterion
        self._restore = restore
        if hasattr(criterion, "eos_token_id"):
            # `generate` pads finished rows only if it sees a criterion with this attribute.
            self.eos_token_id = criterion.eos_token_id  # type: ignore[attr-defined]

    def __call__(self, input_ids: Int[Tensor, "r s"], scores: Any, **kwargs: Any) -> Any:
        return self._criterion(self._restore(input_ids), scores, **kwargs)
