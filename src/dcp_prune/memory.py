"""How much memory is free, and sizes in words."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path


def free_memory(device: str = "cpu") -> int:
    """Bytes that are free, or a number beyond all memory where the system does not say.

    On a CUDA device those that nobody has reserved and those of torch that lie idle; in main memory those that machine
    and container leave.

    Args:
        device: as torch names it; any but a CUDA device is taken for main memory.
    """
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = [sys.maxsize]
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="utf-8"))
        free = [int(found[1]) * 1024] if found else free
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text(encoding="utf-8").strip()).isdigit():
        free.append(int(most) - int(used.read_text(encoding="utf-8")))
    return max(0, min(free))


def in_words(size: int) -> str:
    """A number of bytes for people, such as 1.5 GiB."""
    power = min(max(size, 1).bit_length() - 1, 49) // 10
    value = size / 1024**power
    return f"{value:.{1 if power and value < 100 else 0}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
