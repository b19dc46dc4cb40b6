"""`dcp-prune sweep` as people type it."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcp_prune.eval.records import read_records

SWEEP = "sweep --output r --checkpoint weak --processes 1 --limit 3"


def test_a_sweep_leaves_records_and_says_where(dcp_prune: Callable[..., Any]) -> None:
    command = f"{SWEEP} --pruner none --pruner random --num-tokens 8,0 --task reading --distance mmd"
    outcome = dcp_prune(*command.split())
    assert (outcome.code, outcome.out) == (0, "9 answers in r, 9 of them new.\n")
    records = read_records(Path("r"))
    assert set(records.frame["task"]) == {"reading"}
    assert records.cells() == (("none", 0), ("random", 8), ("none", 576))
    assert {"eval.mmd", "run.mmd"} <= set(records.frame.columns)
    again = dcp_prune(*command.split())
    assert again.out == "9 answers in r, 0 of them new.\n"


def test_a_sweep_with_tiles_says_so_in_its_records(dcp_prune: Callable[..., Any]) -> None:
    outcome = dcp_prune(*f"{SWEEP} --tiles --pruner random --num-tokens 20".split())
    assert outcome.code == 0
    records = read_records(Path("r"))
    assert records.manifest["source"]["tiles"] is True
    assert records.cells() == (("random", 20),)
    again = dcp_prune(*f"{SWEEP} --pruner random --num-tokens 20".split())
    assert again.code == 2, "the same folder asks other questions without tiles"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--pruner nobody", "no pruner is named 'nobody'"),
        ("--pruner random@wrong", "random does not read the question"),
        ("--pruner dcp(depth=3)", "no option 'depth'"),
        ("--limit 0", "--limit must be at least 1"),
        ("--processes 0", "--processes must be at least 1"),
        ("--task weather", "the testbed has no task 'weather'"),
        ("--distance farness", "there is no distance 'farness'"),
        ("--seed-range 5", "--seed-range must be A:B"),
        ("--questions mine.jsonl", "--questions and --model belong together"),
        ("--questions mine.jsonl --model testbed-weak", "mine.jsonl cannot be read"),
        ("--questions mine.jsonl --model testbed-weak --tiles", "--tiles are for pictures of the testbed"),
        ("--num-tokens -1", "at least 1"),
    ],
)
def test_what_cannot_be_swept_is_told_before_any_work(
    dcp_prune: Callable[..., Any], arguments: str, complaint: str
) -> None:
    outcome = dcp_prune("sweep", "--output", "r", *arguments.split())
    assert outcome.code == 2
    assert complaint in outcome.err
    assert not Path("r").exists()


def test_without_the_extra_it_says_what_to_install(
    dcp_prune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_polars(name: str, *rest: Any) -> Any:
        if name == "polars":
            raise ModuleNotFoundError("No module named 'polars'", name="polars")
        return real(name, *rest)

    from dcp_prune import eval as package

    for name in [name for name in sys.modules if name.startswith("dcp_prune.eval.records")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(package, "records")
    monkeypatch.setattr(builtins, "__import__", without_polars)
    outcome = dcp_prune(*SWEEP.split())
    assert outcome.code == 2
    assert "need polars, which is not installed; run: pip install 'dcp-prune[eval]'" in outcome.err


def test_an_interrupted_sweep_says_what_is_kept(dcp_prune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dcp_prune.eval.sweep.sweep", interrupt)
    outcome = dcp_prune("sweep", "--output", "records", "--limit", "14")
    assert outcome.code == 130
    assert outcome.err.strip() == (
        "error: interrupted; what was finished is in records, and the same command goes on there"
    )
