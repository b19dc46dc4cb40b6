"""One call up to its first new token, and a few more: how long each takes, and what the key-value cache then holds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from dcp_prune.integrations.transformers import ShortInputs, prune_inputs
from dcp_prune.profiling.memory import kv_cache_bytes
from dcp_prune.pruners.base import Pruner


@dataclass(frozen=True)
class FirstToken:
    """One call.

    Attributes:
        milliseconds: from pixels and ids to the first new id.
        cache_bytes: of the key-value cache at the end: behind the prefill where one token was asked for.
        short: what was pruned; None without a pruner.
        per_token_ms: of each further token; None where there is none.
    """

    milliseconds: float
    cache_bytes: int
    short: ShortInputs | None
    per_token_ms: float | None = None


class TokenClock(StoppingCriteria):
    """Never stops anything; notes when each new token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.times.append(now(input_ids.device))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def first_token(
    model: Any,
    inputs: Mapping[str, Any],
    pruner: Pruner | None = None,
    *,
    processor: Any = None,
    new_tokens: int = 1,
) -> FirstToken:
    """Runs the model, pruned or as it is, up to its first new token or beyond.

    Args:
        model: in evaluation mode.
        inputs: prompts with images, as the processor makes them.
        pruner: None leaves the model as it is.
        processor: as for `prune_inputs`.
        new_tokens: exactly as many are generated.
    """
    began = now(model.device)
    short = None if pruner is None else prune_inputs(model, inputs, pruner, processor=processor)
    clock = TokenClock()
    output = model.generate(
        **(inputs if short is None else short.inputs),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        return_dict_in_generate=True,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    first, last = clock.times[0], clock.times[-1]
    return FirstToken(
        milliseconds=first - began,
        cache_bytes=kv_cache_bytes(output.past_key_values),
        short=short,
        per_token_ms=(last - first) / (new_tokens - 1) if new_tokens > 1 else None,
    )


def now(device: torch.device) -> float:
    """Milliseconds of a clock that has waited for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3
