"""Where releases of vLLM differ, and which of them are known to work."""

from __future__ import annotations

import re
import warnings
from importlib import import_module

from dcp_prune.errors import UnsupportedModelError

OLDEST, NEWEST = (0, 31), (0, 32)
"""Minor releases of vLLM that the tests of this plug-in were run with, both included."""


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
            f"vLLM {version} cannot load LLaVA beside the transformers that dcp-prune needs (5.19 or newer); "
            f"install {known}"
        )
    if found is None or release > NEWEST:
        warnings.warn(
            f"dcp-prune was tested with vLLM {known}, and this is {version}; compare some answers first", stacklevel=2
        )
