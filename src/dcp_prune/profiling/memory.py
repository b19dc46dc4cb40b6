"""What a key-value cache really holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
