"""Where releases of vLLM differ, and which of them are known to work."""

from __future__ import annotations

import re
import warnings
from importlib import import_module

from dcp_prune.errors import UnsupportedModelError

OLDEST, NEWEST = (0, 29), (0, 33)
"""Minor releases of vLLM that this plug-in was written for, both included."""


def check_version(version: str | None = None) -> None:
    """Refuses a vLLM that lacks what the plug-in builds on, and warns of one that nobody has tried.

    Args:
        version: default: of the vLLM that is installed.

    Raises:
        UnsupportedModelError: older than `OLDEST`.
    """
    if version is None:
        version = str(import_module("vllm").__version__)
    found = re.match(r"(\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else NEWEST
    known = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    if release < OLDEST:
        raise UnsupportedModelError(
            f"vLLM {version} loses the question on its way to the model, so nothing can be chosen for it; "
            f"install {known}"
        )
    if found is None or release > NEWEST:
        warnings.warn(f"dcp-prune knows vLLM {known}, and this is {version}; compare some answers first", stacklevel=2)
