"""These tests need vLLM and so an environment of their own: `make test-vllm`, which fails without it; elsewhere they
are not seen. Engines run inside the test's process, on checkpoints that are made here."""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # compiling the gathering of logprobs takes longer than all else
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "dcp_prune",
}

MISSING = find_spec("vllm") is None
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_configure() -> None:
    if MISSING and os.environ.get("DCP_PRUNE_TEST_VLLM"):
        raise pytest.UsageError("vLLM is not installed, so nothing of it would be tested; run: make test-vllm")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`testbed`, and tiny random ones, as they are on the hub: with the inner names of CLIP towers."""
    from checkpoints import as_on_the_hub, make_deep, make_next, make_qwen

    from dcp_prune.testbed.load import checkpoint_path

    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "testbed": as_on_the_hub(checkpoint_path("weak"), folder / "testbed"),
        "deep": as_on_the_hub(make_deep(folder / "deep-made"), folder / "deep"),
        "next": as_on_the_hub(make_next(folder / "next-made"), folder / "next"),
        "qwen": make_qwen(folder / "qwen"),
    }


@pytest.fixture(scope="module")
def start(checkpoints: dict[str, Path]) -> Callable[..., Any]:
    """`start("testbed", num_tokens=16, enable_prefix_caching=False)`: an engine; settings of pruning go to the plug-in.

    Equal calls of a module get the same engine, with empty caches. Without any setting the model is the stock one.
    """
    from engines import Engine

    engines: dict[str, Engine] = {}

    def start(checkpoint: str, **options: Any) -> Engine:
        key = repr((checkpoint, options))
        if key not in engines:
            engines[key] = Engine(checkpoints[checkpoint], **options)
        engines[key].forget()
        return engines[key]

    return start
