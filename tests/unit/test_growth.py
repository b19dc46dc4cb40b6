"""The bookkeeping of the growth benchmark; what it measures on tiny tokens is of no interest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dcp_prune.profiling import growth
from dcp_prune.profiling.growth import TINY, exponent, measure
from dcp_prune.report.tables import growth as table


def test_the_exponent_of_a_power_law_is_its_power() -> None:
    sizes = [3.0, 10.0, 50.0]
    assert exponent(sizes, [7 * size**1.5 for size in sizes]) == pytest.approx(1.5)


def test_a_machine_that_slows_down_between_rounds_changes_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = [0]

    def take_turns(calls: Any, rounds: Any, clock: Any) -> Any:
        for _ in rounds:
            turn[0] += 1
            yield {name: 3.0 ** turn[0] * (1 if name.endswith(" 0") else 4) for name in calls}

    monkeypatch.setattr(growth, "take_turns", take_turns)
    found = measure(["random"], TINY, runs=3, width=8, encoder_width=8)
    assert [each.along for each in found] == ["tokens", "kept", "images"]
    assert all(each.time_ratios == (1.0, 4.0) for each in found)
    assert all(each.time_exponent == pytest.approx(1.0) for each in found)  # every size is four times the one before


def test_the_command_writes_a_result_from_which_the_table_is_drawn(tmp_path: Path) -> None:
    target = tmp_path / "growth.json"
    assert growth.run(["--tiny", "--runs", "1", "--pruner", "random", "--json", str(target)]) == 0
    assert table(json.loads(target.read_text())).count("\n") == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--pruner", "dpc"], "did you mean dcp"), (["--runs", "0"], "at least one round")],
)
def test_a_wrong_argument_is_one_sentence_and_exit_code_2(arguments, sentence, capsys) -> None:
    assert growth.run(["--tiny", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
