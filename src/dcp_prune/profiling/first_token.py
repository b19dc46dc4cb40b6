"""One call up to its first new token: how long it takes, and what the key-value cache then holds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dcp_prune.integrations.transformers import ShortInputs, prune_inputs
from dcp_prune.profiling.memory import kv_cache_bytes
from dcp_prune.pruners.base import Pruner


@dataclass(frozen=True)
class FirstToken:
    """One call.

    Attributes:
        milliseconds: from pixels and ids to the first new id.
        cache_bytes: of the key-value cache behind the prefill.
        short: what was pruned; None without a pruner.
    """

    milliseconds: float
    cache_bytes: int
    short: ShortInputs | None


@torch.no_grad()
def first_token(
    model: Any, inputs: Mapping[str, Any], pruner: Pruner | None = None, *, processor: Any = None
) -> FirstToken:
    """Runs the model, pruned or as it is, up to its first new token.

    Args:
        model: in evaluation mode.
        inputs: one prompt with one image, as the processor makes them.
        pruner: None leaves the model as it is.
        processor: as for `prune_inputs`.
    """
    began = now(model.device)
    short = None if pruner is None else prune_inputs(model, inputs, pruner, processor=processor)
    output = model.generate(
        **(inputs if short is None else short.inputs),
        max_new_tokens=1,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    return FirstToken(now(model.device) - began, kv_cache_bytes(output.past_key_values), short)


def now(device: torch.device) -> float:
    """Milliseconds of a clock that has waited for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3
