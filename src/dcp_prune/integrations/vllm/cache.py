"""Encoded images of earlier questions: a least-recently-used cache bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class LRUCache(Generic[T]):
    """Keeps what was used last, as long as all of it together has at most `capacity` bytes; 0 keeps nothing.

    Every rank of a tensor-parallel group sees the same calls, so their caches hold the same entries.

    Attributes:
        hits, lookups: counted since it was built.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.hits = self.lookups = self.size = 0
        self._entries: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> T | None:
        self.lookups += 1
        entry = self._entries.get(key)
        if entry is None:
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Hashable, value: T, size: int) -> None:
        """Adds an entry of `size` bytes and drops those not used for longest; one above the capacity is not kept."""
        if size > self.capacity:
            return
        if key in self._entries:
            self.size -= self._entries.pop(key)[1]
        self._entries[key] = (value, size)
        self.size += size
        while self.size > self.capacity:
            _, (_, freed) = self._entries.popitem(last=False)
            self.size -= freed


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a nest of dataclasses, mappings and sequences."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if is_dataclass(value):
        return sum(tensor_bytes(getattr(value, each.name)) for each in fields(value))
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0
