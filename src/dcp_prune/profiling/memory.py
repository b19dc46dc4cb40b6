"""What a key-value cache really holds, and the most memory that a piece of work takes."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache


def kv_cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values that `cache` holds, over all layers and rows.

    A dynamic cache holds what has been read so far; a static one its whole allocation from the first token on.

    Raises:
        ValueError: the cache holds nothing yet, or keeps no keys and values (a recurrent state, say).
    """
    tensors = [
        tensor
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, Tensor)
    ]
    if not tensors:
        raise ValueError("the cache holds no keys and values; measure it after the prefill")
    return sum(tensor.nbytes for tensor in tensors)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that `work` takes beyond what is held before it, in bytes.

    On a CUDA device as torch allocates it; elsewhere the growth of the resident set, in which small amounts are not
    seen. None where the system does not say.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # memory that lies idle would be used again, and not be seen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = _resident("VmRSS")
    except OSError:
        before = None
    work()
    return None if before is None else max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise OSError(f"{name} is missing")
    return int(found[1]) * 1024
