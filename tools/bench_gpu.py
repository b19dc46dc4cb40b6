"""Everything that only a GPU can tell, in one command of at most eight minutes.

    PYTHONPATH=src python tools/bench_gpu.py                      # on a machine with a GPU
    PYTHONPATH=src python tools/bench_gpu.py --tiny --device cpu   # tries the command out, in a minute

It needs the files of this checkout, torch with CUDA, and what the lines below name. For a machine without a network:

    pip download --dest build/wheels --python-version 3.12 --only-binary=:all: \
        'transformers>=5.19,<6' jaxtyping cyclopts pydantic pillow pytest                                # here
    pip install --no-index --find-links build/wheels transformers jaxtyping cyclopts pydantic pillow pytest   # there

The record is written after every cell, so a run that is cut off is a result as well. A cell is a model with random
weights in bfloat16, an implementation of attention and a batch: its pruners at every budget, the limit and the unpruned
model take turns. A cell that fails, for want of memory say, is recorded with its error, and cells for which no time is
left are named. Decoding runs without CUDA graphs.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from dcp_prune.environment import environment
from dcp_prune.errors import DcpPruneError
from dcp_prune.eval.evaluate import evaluate
from dcp_prune.eval.specs import plan
from dcp_prune.files import check_writable, to_json, write_atomically
from dcp_prune.integrations.transformers import get_adapter
from dcp_prune.profiling.architectures import build_model, get_architecture, make_inputs, move
from dcp_prune.profiling.latency import measure, variants
from dcp_prune.registry import make_pruner
from dcp_prune.testbed.load import load
from dcp_prune.testbed.seeds import HELD_OUT
from dcp_prune.testbed.worlds import world_of

PRUNERS = ("dcp", "dcp_progressive", "scope", "cls_attention")
MODELS = ("llava-1.5-7b", "qwen2.5-vl-7b", "llava-next-7b")
BATCHES = (8, 1, 32)
BUDGETS = (16, 64, 576)
SPARE = 60.0
"""Seconds that are kept for a cell that has begun when the time is up."""


@dataclass(frozen=True)
class Cell:
    """What is measured together."""

    model: str
    attention: str
    batch: int


class Record:
    """The result file, written anew after every addition."""

    def __init__(self, path: Path, **about: Any) -> None:
        self.path = path
        self.content: dict[str, Any] = {**about, "environment": environment(), "cells": [], "left_out": []}
        self.write()

    def write(self) -> None:
        write_atomically(self.path, to_json(self.content).encode())


def cells(tiny: bool) -> Iterator[Cell]:
    """The most telling ones first."""
    backends = ["sdpa"] + (["flash_attention_2"] if is_flash_attn_2_available() else [])
    for model in ("tiny",) if tiny else MODELS:
        for attention in backends:
            for batch in (2, 1) if tiny else BATCHES:
                yield Cell(model, attention, batch)


def run_cell(cell: Cell, model: Any, *, runs: int, budgets: tuple[int, ...]) -> list[dict[str, Any]]:
    """The costs of one cell."""
    architecture = get_architecture(cell.model)
    inputs = move(make_inputs(model, architecture, batch=cell.batch), model)
    total = max(map(len, get_adapter(model).layouts(inputs)))
    signals = get_adapter(model).signals
    pruners = [
        (name, pruner)
        for budget in budgets
        if budget < total
        for name in PRUNERS
        for pruner in (make_pruner(name, num_tokens=budget),)
        if pruner.requires <= signals
    ]
    return [asdict(cost) for cost in measure(model, inputs, variants(pruners, total), runs=runs, new_tokens=5)]


def testbed_agrees(device: str, questions: int) -> dict[str, Any]:
    """Answers of the shipped testbed on this device and on the CPU: how many differ, with and without pruning."""
    methods = plan(["none", "dcp"], [16])
    found: dict[str, Any] = {}
    for place in dict.fromkeys(("cpu", device)):
        model, processor = load()
        model.to(place)  # type: ignore[arg-type]
        evaluation = evaluate(model, processor, methods, HELD_OUT, questions, grid=world_of("natural").grid)
        found[place] = evaluation.answers
    first, last = found["cpu"], found[device]
    return {
        "questions": questions,
        "methods": [method.name for method in methods],
        "accuracy_cpu": [float(answers.correct.mean()) for answers in first],
        "accuracy_device": [float(answers.correct.mean()) for answers in last],
        "answers_that_differ": [int((one.words != other.words).sum()) for one, other in zip(first, last, strict=True)],
    }


def gpu_tests(device: str) -> dict[str, Any]:
    """How the tests ended that need a GPU."""
    if not device.startswith("cuda"):
        return {"ran": False, "why": "there is no GPU"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/unit/test_kernels.py"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return {"ran": True, "exit_code": done.returncode, "end": done.stdout[-2000:]}


def attempt(step: Any, *given: Any, **named: Any) -> dict[str, Any]:
    """What a step found, or why it failed: one step never costs the others."""
    began = time.monotonic()
    try:
        result = {"result": step(*given, **named)}
    except (DcpPruneError, RuntimeError, OSError, ImportError, ValueError, subprocess.SubprocessError) as error:
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    return {**result, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a model that takes no time, to try the command out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else None)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("results/gpu.json"))
    args = parser.parse_args()
    began = time.monotonic()
    device = args.device or ("cpu" if args.tiny else None)
    if device is None:
        sys.exit("error: torch sees no GPU here; --tiny tries the command out on the CPU")
    path = args.json if args.json != parser.get_default("json") or not args.tiny else Path("build/gpu-tiny.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = torch.float32 if args.tiny else torch.bfloat16
    record = Record(check_writable(path), device=device, dtype=str(dtype)[6:], tiny=args.tiny, runs=args.runs)
    for name, step in (
        ("tests", lambda: attempt(gpu_tests, device)),
        ("testbed", lambda: attempt(testbed_agrees, device, 20 if args.tiny else 400)),
    ):
        record.content[name] = step()
        record.write()
        print(name, record.content[name], flush=True)
    if device.startswith("cuda"):
        # What is still running then is cut off; all that was finished is on the disk.
        threading.Timer(max(1.0, args.minutes * 60 - (time.monotonic() - began)), os._exit, [0]).start()
    built: tuple[Any, ...] = ()
    model: Any = None
    for cell in cells(args.tiny):
        if time.monotonic() - began > args.minutes * 60 - SPARE:
            record.content["left_out"].append(asdict(cell))
            record.write()
            continue
        if built != (cell.model, cell.attention):
            model = None
            gc.collect()
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
            made = attempt(build_model, get_architecture(cell.model).config(), dtype, cell.attention, device)
            model, built = made.pop("result", None), (cell.model, cell.attention)
            if model is None:
                record.content["cells"].append({**asdict(cell), **made})
                record.write()
        if model is None:
            continue
        found = attempt(run_cell, cell, model, runs=args.runs, budgets=(4, 16) if args.tiny else BUDGETS)
        record.content["cells"].append({**asdict(cell), **found})
        record.write()
        print(cell, f"{found['seconds']} s", found.get("error", f"{len(found.get('result', []))} rows"), flush=True)
    record.content["seconds"] = round(time.monotonic() - began, 1)
    record.write()
    print(f"wrote {path}; left out for want of time: {len(record.content['left_out'])} cells", flush=True)
    if device.startswith("cuda"):
        os._exit(0)  # the timer runs on


if __name__ == "__main__":
    main()
