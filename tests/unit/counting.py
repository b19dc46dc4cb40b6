"""A sweep's questions without a model: tests of what is kept when a sweep is stopped need many answers at no cost.

Run as a script it sweeps 40 blocks into the folder that it is given, in as many processes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.data.questions import Block, QuestionSet, Session
from dcp_prune.eval.specs import Method, plan
from dcp_prune.eval.sweep import sweep

METHODS = plan(["none", "random", "uniform"], [0, 8, 16])


@dataclass(frozen=True)
class CountingQuestions(QuestionSet):
    """Blocks of three questions; `fails` makes one block go wrong: `error`, `refusal` or `death`."""

    num_blocks: int = 5
    seconds: float = 0.0
    fails: str = ""
    name: str = "counting"

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"name": "nobody", "sha256": None}, {"kind": self.name, "questions": 3 * self.num_blocks}

    @cached_property
    def blocks(self) -> tuple[Block, ...]:  # type: ignore[override]
        return tuple(
            Block(b, range(3 * b, 3 * b + 3), tuple(f"q{i}" for i in range(3 * b, 3 * b + 3)))
            for b in range(self.num_blocks)
        )

    def open(self, distances: Sequence[str]) -> Session:
        return _Counting(self)


class _Counting(Session):
    def __init__(self, questions: CountingQuestions) -> None:
        self.questions = questions

    def answer(self, block: Block, methods: Sequence[Method]) -> pl.DataFrame:
        time.sleep(self.questions.seconds)
        if self.questions.fails and block.number == 2:
            if self.questions.fails == "death":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"error": ValueError("something odd"), "refusal": InvalidInputError("not like this")}[
                self.questions.fails
            ]
        rows = [
            {
                "method": method.name,
                "pruner": method.registered or method.name,
                "num_tokens": 576 if method.num_tokens is None else method.num_tokens,
                "text": str(method.text),
                "image": f"i{block.number}",
                "question": question,
                "task": "counting",
                "truth": "three",
                "answer": "four",
                "score": 0.0,
                "kappa": None if method.num_tokens == 0 else 0.123456,
            }
            for method in methods
            for question in block.questions
        ]
        return pl.DataFrame(rows, schema_overrides={"num_tokens": pl.Int32, "score": pl.Float32, "kappa": pl.Float32})


if __name__ == "__main__":
    sweep(CountingQuestions(40, seconds=0.05), METHODS, Path(sys.argv[1]), processes=int(sys.argv[2]))
