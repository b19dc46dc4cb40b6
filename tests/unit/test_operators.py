"""Choosing tokens dispatches no more operators than the committed figures say; those are the ceilings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dcp_prune.profiling.operators import count

COMMITTED = json.loads((Path(__file__).parents[2] / "results" / "operators.json").read_text())["results"]


@pytest.mark.parametrize("row", COMMITTED, ids=lambda row: f"{row['pruner']}-{row['tokens']}")
def test_no_pruner_dispatches_more_operators_than_it_did(row) -> None:
    found = count(row["pruner"], row["tokens"], row["num_tokens"])
    for name in ("dispatched", "launches", "fused"):
        assert getattr(found, name) <= row[name], f"{name}: `make report` draws the figures; find what was added"


@pytest.mark.parametrize("pruner", ["dcp", "scope"])
def test_with_fused_loops_the_launches_do_not_depend_on_how_many_tokens_are_kept(pruner) -> None:
    few, many = (count(pruner, 576, kept) for kept in (16, 64))
    assert few.fused == many.fused
    assert few.launches < many.launches
