"""The bookkeeping of the selection benchmark; what it measures on tiny tokens is of no interest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dcp_prune.profiling import selection
from dcp_prune.profiling.selection import SETTINGS, TINY, make_tokens, measure
from dcp_prune.registry import list_pruners
from dcp_prune.report.tables import selection as table

PROJECT = Path(__file__).parents[2]
AUTHORS = PROJECT / "results" / "selection-authors.json"


def test_the_settings_are_those_of_the_authors_times():
    published = json.loads(AUTHORS.read_text())["results"]
    assert {(row["images"], row["tokens"], row["num_tokens"]) for row in published} == {
        (setting.images, setting.tokens, setting.num_tokens) for setting in SETTINGS
    }
    assert {row["pruner"] for row in published} <= set(list_pruners())


def test_the_tokens_carry_every_signal_and_are_always_the_same():
    first, again = (make_tokens(2, 16, width=8, encoder_width=8) for _ in range(2))
    assert first.encoder is not None
    assert again.encoder is not None
    assert all(value is not None for name, value in vars(first.encoder).items() if name != "mask")
    assert first.text is not None
    assert first.clip_similarity is not None
    assert first.features.equal(again.features)
    assert first.encoder.features.equal(again.encoder.features)


def test_every_pruner_is_timed_in_every_round_and_medians_are_reported(monkeypatch):
    calls: list[str] = []

    def time(pruner, tokens):
        calls.append(type(pruner).__name__)
        return (1000.0, 2000.0) if len(calls) <= 2 else (3.0, 4.0)

    monkeypatch.setattr(selection, "_time", time)
    costs = measure(["random", "uniform"], TINY[:1], runs=3, width=8, encoder_width=8)
    assert all(sorted(calls[start : start + 2]) == ["RandomPruner", "UniformPruner"] for start in range(0, 6, 2))
    assert len(calls) == 6
    assert [(cost.pruner, cost.cpu_ms, cost.wall_ms) for cost in costs] == [("random", 3.0, 4.0), ("uniform", 3.0, 4.0)]


def test_the_call_that_warms_up_is_not_timed(monkeypatch):
    calls: list[float] = []
    clock = iter(range(100))
    monkeypatch.setattr(selection.time, "process_time", lambda: float(next(clock)))
    monkeypatch.setattr(selection.time, "perf_counter", lambda: 0.0)
    cpu, _ = selection._time(lambda tokens: calls.append(next(clock)), None)  # type: ignore[arg-type]
    assert len(calls) == 2
    assert cpu == 2000.0, "one tick of the call that counts, one of reading the clock"


def test_the_command_writes_a_result_from_which_the_table_is_drawn(tmp_path, capsys):
    target = tmp_path / "selection.json"
    assert selection.run(["--tiny", "--runs", "1", "--json", str(target)]) == 0
    output = capsys.readouterr().out
    assert "left out dcp_progressive: it works inside the encoder" in output
    result = json.loads(target.read_text())
    assert {row["pruner"] for row in result["results"]} == set(list_pruners()) - {"dcp_progressive", "flowcut"}
    assert {row["images"] for row in result["results"]} == {1, 2}
    assert result["environment"]["threads"] == 1
    assert table(result).count("\n") == 1 + len(list_pruners()) - 2


def row(cpu_ms: float, **more: object) -> dict[str, object]:
    return {
        "pruner": "scope",
        "images": 1,
        "tokens": 576,
        "num_tokens": 16,
        "cpu_ms": cpu_ms,
        "wall_ms": 2 * cpu_ms,
        **more,
    }


@pytest.mark.parametrize(
    ("ours", "verdict"), [(10.0, "2.0 x faster"), (19.5, "equal"), (20.5, "equal"), (30.0, "1.5 x slower")]
)
def test_the_verdict_goes_by_cpu_time_and_calls_a_tie_a_tie(ours, verdict):
    drawn = table({"results": [row(ours)], "authors": {"results": [row(20.0, one_sequence=True)]}})
    assert drawn.splitlines()[-1].endswith(f" | 20 (40)* | {verdict} |")


def test_without_the_authors_times_there_is_no_verdict():
    assert table({"results": [row(20.0)], "authors": None}).splitlines()[-1] == "| `scope` | 20 (40) |  |  |"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--pruner", "dpc"], "did you mean dcp"),
        (["--json", "/no/such/folder/x.json"], "does not exist; create it first"),
        (["--runs", "0"], "at least one round"),
        (["--authors", "/no/such/file.json"], "holds no times to compare with"),
        (["--authors", str(AUTHORS), "--json", str(AUTHORS)], "which is read here"),
        (["--authors", str(PROJECT / "results" / "published.json")], "holds no times to compare with"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_exit_code_2(arguments, sentence, capsys):
    assert selection.run(["--tiny", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
