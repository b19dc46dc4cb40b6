"""`report`: what it writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

Run = Callable[..., Any]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Two pruners at one budget on twelve questions about six images."""
    folder = tmp_path / "records"
    (folder / "parts").mkdir(parents=True)
    frames, methods = [], []
    for label, budget, right in (("none", 576, 12), ("none", 0, 3), ("dcp", 16, 11), ("random", 16, 6)):
        frames.append(
            pl.DataFrame(
                {
                    "method": label, "pruner": label, "num_tokens": budget, "text": "question",
                    "image": [f"i{number // 2}" for number in range(12)], "question": [f"q{n}" for n in range(12)],
                    "task": ["counting", "reading"] * 6, "truth": "yes", "answer": "yes",
                    "score": (np.arange(12) < right).astype(np.float32), "kappa": None if budget == 0 else 0.1,
                },
                schema_overrides={"num_tokens": pl.Int32, "kappa": pl.Float32},
            )
        )  # fmt: skip
        methods.append({"method": label, "pruner": label, "num_tokens": budget, "text": "question", "options": {}})
    pl.concat(frames).write_parquet(folder / "parts" / "000000-0.parquet")
    source = {"kind": "testbed", "checkpoint": "weak", "difficulty": "crowded", "questions": 12, "split": "held-out"}
    manifest = {"version": 1, "model": {}, "source": source, "methods": methods, "distances": [], "environment": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_report_is_one_command(dcp_prune: Run, records: Path) -> None:
    outcome = dcp_prune("report", records, "--output", "new/report", "--resamples", "100")
    assert outcome.code == 0, outcome.err
    assert outcome.out == "new/report/report.md: 2 figures, 12 tables\n"
    page = Path("new/report/report.md").read_text()
    assert "](../../records)" in page
    assert "| `dcp` |" in page
    assert (Path("new/report") / "tables" / "leads-weak-crowded.tex").read_text().startswith(r"\begin{tabular}")
    with_same_records = dcp_prune("report", records.parent, "--output", "again", "--resamples", "100")
    assert with_same_records.code == 0
    assert Path("again/tables/aims.md").read_bytes() == Path("new/report/tables/aims.md").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--output", "out"), "name at least one folder"),
        (("nowhere", "--output", "out"), "nowhere holds no records"),
        (("records", "--output", "records/manifest.json"), "it is a file; name a folder"),
        (("records", "--output", "records/manifest.json/deeper"), "cannot make the folder"),
        (("records", "--output", "out", "--resamples", "10"), "from 100 to 50000, got 10"),
        (("records", "--output", "out", "--resamples", "1000000000000"), "from 100 to 50000"),
        (("records",), "--output"),
    ],
)
def test_what_cannot_be_reported_is_one_sentence(
    dcp_prune: Run, records: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    outcome = dcp_prune("report", *arguments)
    assert outcome.code == 2
    assert sentence in outcome.err
    assert outcome.err.count("\n") == 1
    assert not Path("out/report.md").exists()


def test_help_says_what_the_folder_gets(dcp_prune: Run) -> None:
    outcome = dcp_prune("report", "--help")
    assert outcome.code == 0
    assert "report.md" in outcome.out
    assert "--resamples" in outcome.out
