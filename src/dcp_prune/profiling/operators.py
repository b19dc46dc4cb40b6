"""How many operators choosing the tokens of one image takes, which is what a GPU waits for: each is a launch.

Counted on a CPU, on the path that a GPU takes. `python -m dcp_prune.profiling.operators --json results/operators.json`
writes the figures that a test holds as ceilings and docs/performance.md shows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from cyclopts import App
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dcp_prune.functional import clustering, selection
from dcp_prune.functional.fused import LARGEST_COVERAGE
from dcp_prune.profiling.benchmark import Report, run_command
from dcp_prune.profiling.selection import make_tokens
from dcp_prune.registry import make_pruner

PRUNERS = ("dcp", "scope", "divprune", "mmtok", "cls_attention")
SETTINGS = ((576, 16), (2880, 80))


@dataclass(frozen=True)
class Operators:
    """What one call dispatches.

    Attributes:
        pruner: its name.
        tokens: visual tokens of the image.
        num_tokens: kept.
        dispatched: operators in all, those that only change shapes included.
        launches: operators that compute something, each a launch on a GPU, with the greedy loops operator by operator.
        fused: the same with the greedy loops as single kernels, where the size lets them be.
    """

    pruner: str
    tokens: int
    num_tokens: int
    dispatched: int
    launches: int
    fused: int


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.dispatched = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.dispatched += 1
        self.launches += not (func.is_view or func.name().startswith(("aten::_unsafe_view", "aten::lift_fresh")))
        return result


def count(pruner: str, tokens: int, num_tokens: int) -> Operators:
    """What one pruner dispatches for one image."""
    image = make_tokens(1, tokens, width=64, encoder_width=64)
    made = make_pruner(pruner, num_tokens=num_tokens)

    def run() -> _Counter:
        with torch.no_grad(), _Counter() as counter:
            made(image)
        return counter

    # On a CPU large matrices are worked on strip by strip.
    with mock.patch.object(clustering, "strips", lambda matrix: (matrix,)):
        loops = run()
        with _kernels_that_cost_one_operator():
            fused = run()
    return Operators(pruner, tokens, num_tokens, loops.dispatched, loops.launches, fused.launches)


@contextmanager
def _kernels_that_cost_one_operator() -> Iterator[None]:
    def picks(similarity: Tensor, *_: Any) -> Tensor:
        return torch.arange(_[-1]).expand(len(similarity), -1)

    kernels = SimpleNamespace(coverage_picks=picks, farthest_picks=picks)
    with (
        mock.patch.dict(sys.modules, {"dcp_prune.functional.kernels": kernels}),
        mock.patch.object(clustering, "coverage_is_fused", _is_small),
        mock.patch.object(selection, "farthest_is_fused", return_value=True),
    ):
        yield


def _is_small(matrix: Tensor) -> bool:
    return matrix.shape[1] == matrix.shape[2] <= LARGEST_COVERAGE


app = App(name="python -m dcp_prune.profiling.operators", help_format="plaintext", version_flags=())


@app.default
def main(*, json: Path | None = None) -> None:
    """Counts the operators of choosing tokens, as a GPU would launch them.

    Args:
        json: file to write the result to.
    """
    report = Report(json, 1)
    counts = [count(pruner, *setting) for setting in SETTINGS for pruner in PRUNERS]
    report.finish(
        "operators of choosing the tokens of one image",
        ("image", "dispatched", "launches", "fused"),
        ([c.pruner, f"{c.tokens} to {c.num_tokens}", str(c.dispatched), str(c.launches), str(c.fused)] for c in counts),
        counts,
    )


def run(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(app, arguments)


if __name__ == "__main__":
    sys.exit(run())
