"""Lap times that cost no host sync: CUDA events on a GPU, the wall clock elsewhere."""

from __future__ import annotations

import time

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
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(begin, float) and isinstance(end, float):
                span = end - begin
            else:
                assert isinstance(begin, torch.cuda.Event)
                assert isinstance(end, torch.cuda.Event)
                end.synchronize()
                span = begin.elapsed_time(end)
            total[name] = total.get(name, 0.0) + span
        return total
