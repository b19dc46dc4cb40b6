"""Documents show what the result files hold, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.environment import environment
from dcp_prune.report.tables import cost, main, paired, published, quality, rebuild, tasks

PROJECT = Path(__file__).parents[2]


def row(pruner: str, num_tokens: int | None, accuracy: float, task: str = "all", kappa: float | None = None) -> dict:
    ci95 = [accuracy - 0.01, accuracy + 0.01]
    return {
        "pruner": pruner,
        "num_tokens": num_tokens,
        "task": task,
        "accuracy": accuracy,
        "ci95": ci95,
        "n": 1000,
        "kappa": kappa,
    }


QUALITY = {
    "results": [
        row("random", 16, 0.5, kappa=0.164),
        row("random", 64, 0.75, kappa=0.05),
        row("dcp", 16, 0.875, kappa=1.3),
        row("dcp", 16, 0.25, task="counting", kappa=1.3),
        row("none", 576, 0.95, kappa=0.0),
        row("none", 0, 0.3),
    ],
    "environment": environment(),
}
COST = {
    "results": [
        {
            "pruner": "none",
            "num_tokens": 576,
            "ttft_ms": 4000.0,
            "ttft_ratio": 1.0,
            "selection_share": None,
            "kv_cache_bytes": 3 * 2**20,
            "prefill_flops": 2_000_000_000_000,
        },
        {
            "pruner": "dcp",
            "num_tokens": 16,
            "ttft_ms": 1000.0,
            "ttft_ratio": 0.25,
            "selection_share": 0.0125,
            "kv_cache_bytes": 2**19,
            "prefill_flops": 500_000_000_000,
        },
    ],
    "environment": environment(),
}
DOCUMENT = "before\n<!-- table:begin quality results/q.json -->\nold\n<!-- table:end -->\nafter\n"


@pytest.fixture
def document(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "q.json").write_text(json.dumps(QUALITY))
    path = tmp_path / "README.md"
    path.write_text(DOCUMENT)
    return path


def test_the_quality_table_goes_from_the_upper_bound_over_the_best_pruner_to_the_floor():
    assert quality(QUALITY).splitlines() == [
        "| pruner | 64 tokens | 16 tokens | kappa at 16 |",
        "| --- | ---: | ---: | ---: |",
        "| all tokens | 95.0 [94.0, 96.0] |  | 0.00 |",
        "| `dcp` |  | 87.5 [86.5, 88.5] | 1.30 |",
        "| `random` | 75.0 [74.0, 76.0] | 50.0 [49.0, 51.0] | 0.16 |",
        "| no image | 30.0 [29.0, 31.0] |  |  |",
    ]


def test_the_cost_table_shows_ratios_and_the_share_of_selecting():
    assert cost(COST).splitlines()[2:] == [
        "| all tokens | 576 | 4,000 ms | 1.00 x |  | 3.00 MiB | 2,000 GFLOP |",
        "| `dcp` | 16 | 1,000 ms | 4.00 x | 1.2 % | 0.50 MiB | 500 GFLOP |",
    ]


def test_the_task_table_shows_the_smallest_budget_beside_the_bounds():
    assert tasks(QUALITY).splitlines() == [
        "| at 16 tokens | all | counting |",
        "| --- | ---: | ---: |",
        "| `random` | 50.0 |  |",
        "| `dcp` | 87.5 | 25.0 |",
        "| all tokens | 95.0 |  |",
        "| no image | 30.0 |  |",
    ]


def test_the_paired_table_shows_signed_leads_in_points():
    lead = {"pruner": "dcp", "against": "random", "num_tokens": 16, "difference": 0.125, "ci95": [-0.01, 0.26]}
    result = {"paired": [{**lead, "task": "all"}, {**lead, "task": "counting", "difference": 0.5}]}
    assert paired(result).splitlines() == [
        "| lead of `dcp` over | 16 tokens |",
        "| --- | ---: |",
        "| `random` | +12.5 [-1.0, +26.0] |",
    ]


def test_published_numbers_are_drawn_from_the_paper_and_named_as_such():
    result = json.loads((PROJECT / "results" / "published.json").read_text())
    assert published(result).splitlines()[:3] == [
        "| method | 64 tokens | 32 tokens | 16 tokens |",
        "| --- | ---: | ---: | ---: |",
        "| dcp | 96.3 | 94.4 | 92.1 |",
    ]
    text = rebuild("<!-- table:begin published results/published.json -->\n<!-- table:end -->", PROJECT)
    assert "arXiv 2606.16633" in text.splitlines()[-2]


def test_the_source_line_says_which_questions_were_asked(document):
    asked = {"questions": 1000, "images": 63, "split": "held-out", "difficulty": "crowded"}
    result = {**QUALITY, "questions": asked, "checkpoint": "weak"}
    (document.parent / "results" / "q.json").write_text(json.dumps(result))
    text = rebuild(DOCUMENT, document.parent)
    assert "1,000 questions about 63 held-out images, difficulty `crowded`, checkpoint `weak`; 95 % intervals." in text


def test_a_document_is_rewritten_between_the_marks_only_and_then_counts_as_up_to_date(document):
    assert main(["--check", str(document)]) == 1
    assert document.read_text() == DOCUMENT  # checking writes nothing
    assert main([str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n<!-- table:begin quality results/q.json -->\n| pruner |")
    assert text.endswith("<!-- table:end -->\nafter\n")
    assert "old" not in text
    assert "[`results/q.json`](results/q.json)" in text
    assert main(["--check", str(document)]) == 0


def test_a_changed_result_makes_the_document_stale(document):
    main([str(document)])
    changed = {**QUALITY, "results": [row("dcp", 16, 0.9, kappa=1.2)]}
    (document.parent / "results" / "q.json").write_text(json.dumps(changed))
    assert main(["--check", str(document)]) == 1


def test_a_result_that_is_not_there_yet_is_said_to_be_missing(tmp_path):
    assert "*Not measured yet: no `results/q.json`.*" in rebuild(DOCUMENT, tmp_path)


def test_an_unknown_kind_of_table_and_a_broken_result_are_one_sentence(document):
    with pytest.raises(InvalidInputError, match="the kinds are cost, paired, published, quality, selection, tasks"):
        rebuild(DOCUMENT.replace("quality", "quantity"), document.parent)
    (document.parent / "results" / "q.json").write_text('{"results": [{}]}')
    with pytest.raises(InvalidInputError, match=r"q\.json holds no quality results"):
        rebuild(DOCUMENT, document.parent)


def test_the_command_refuses_a_missing_document_with_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "dcp_prune.report.tables", str(tmp_path / "none.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("there is no document")
    assert done.stderr.count("\n") == 1
