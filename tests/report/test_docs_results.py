"""docs/results.md and docs/results-details.md say what the committed records say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dcp_prune.report.pages import main
from dcp_prune.report.results import digest
from dcp_prune.report.tables import draw_table

PROJECT = Path(__file__).parents[2]
PAGES = [PROJECT / "docs" / name for name in ("results.md", "results-details.md")]
TEXT = "".join(page.read_text() for page in PAGES)


def test_the_page_was_drawn_from_the_very_records_that_are_there():
    # A sweep that is still under way has not put its records into one file.
    folders = sorted(path.parent for path in (PROJECT / "results").glob("**/records*.parquet"))
    shown = re.findall(r"\]\(\.\./(results/[^)]+)\) \(([0-9a-f]{12})\)", TEXT)
    assert sorted(shown) == [(folder.relative_to(PROJECT).as_posix(), digest(folder)) for folder in folders]


def test_every_figure_of_the_page_is_there_and_no_other():
    figures = {path.name for path in (PROJECT / "docs" / "figures").glob("*.png")}
    assert figures == set(re.findall(r"\]\(figures/([^)]+)\)", TEXT))


def test_the_matrix_of_models_is_that_of_the_adapters(tmp_path: Path):
    listed = tmp_path / "models.json"
    command = [sys.executable, "-m", "dcp_prune.cli", "list", "--models", "--json", str(listed)]
    subprocess.run(command, check=True, capture_output=True)
    assert listed.read_text() == (PROJECT / "results" / "models.json").read_text(), "run `make report`"
    docs = PROJECT / "docs"
    assert draw_table("models", "../results/models.json", docs) in (docs / "models.md").read_text()


@pytest.mark.slow
def test_rebuilding_the_page_changes_nothing():
    assert main(["--check", *map(str, PAGES)]) == 0
