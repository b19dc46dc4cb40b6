"""What a measured number depends on besides the code that made it; every result file carries it."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

import torch

_PACKAGES = ("dcp-prune", "torch", "transformers", "numpy", "pillow")


class Environment(TypedDict):
    """Where and with what a result was made; plain JSON values, and nothing that names the machine or its user.

    `packages` maps a distribution to its version, None where it is not installed. `commit` is the checkout's git
    commit, with `+changes` behind it if tracked files differ from it, None outside a checkout. `threads` are those
    that torch uses within one operation, `cores` those that this process may run on.
    """

    python: str
    platform: str
    packages: dict[str, str | None]
    commit: str | None
    cpu: str
    cores: int
    threads: int
    gpus: list[str]


def environment() -> Environment:
    """The manifest of this process; imports no package that is not loaded already."""
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages={name: _version(name) for name in _PACKAGES},
        commit=_commit(Path(__file__).parents[2]),
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        gpus=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    )


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's name as its maker writes it, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit(root: Path) -> str | None:
    """The commit of the checkout at `root`; None if `root` is no checkout, as for an installed wheel."""
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return f"{commit}+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
