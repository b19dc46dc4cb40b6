"""Lap times that cost no host sync: CUDA events on a GPU, the wall clock elsewhere."""

from __future__ import annotations

import time
from itertools import accumulate, pairwise
from typing import Any

import torch


class Stopwatch:
    """Starts when built; each `lap` ends one named stretch, and times add up under equal names."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.lap("start")

    def lap(self, name: str) -> None:
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter() * 1e3
        self._marks.append((name, mark))

    def milliseconds(self) -> dict[str, float]:
        """Name -> milliseconds; waits for the GPU."""
        total: dict[str, float] = {}
        for (name, _), span in zip(self._marks[1:], self._spans(), strict=True):
            total[name] = total.get(name, 0.0) + span
        return total

    def _spans(self) -> list[float]:
        spans = []
        for (_, begin), (_, end) in pairwise(self._marks):
            if isinstance(begin, float) and isinstance(end, float):
                spans.append(end - begin)
            else:
                assert isinstance(begin, torch.cuda.Event)
                assert isinstance(end, torch.cuda.Event)
                end.synchronize()
                spans.append(begin.elapsed_time(end))
        return spans

    def __getstate__(self) -> dict[str, Any]:
        """Plain numbers, since CUDA events belong to their process."""
        names, spans = [name for name, _ in self._marks], self._spans()
        return {"_cuda": False, "_marks": list(zip(names, accumulate(spans, initial=0.0), strict=True))}
