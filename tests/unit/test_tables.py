"""Tables show what the result files hold, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dcp_prune.environment import environment
from dcp_prune.errors import InvalidInputError
from dcp_prune.report.tables import cost, draw_table, published

PROJECT = Path(__file__).parents[2]

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


def test_the_cost_table_shows_ratios_and_the_share_of_selecting():
    assert cost(COST).splitlines()[2:] == [
        "| all tokens | 576 | 4,000 ms | 1.00 x |  | 3.00 MiB | 2,000 GFLOP |",
        "| `dcp` | 16 | 1,000 ms | 4.00 x | 1.2 % | 0.50 MiB | 500 GFLOP |",
    ]


def test_published_numbers_are_drawn_from_the_paper_and_named_as_such():
    result = json.loads((PROJECT / "results" / "published.json").read_text())
    assert published(result).splitlines()[:3] == [
        "| method | 64 tokens | 32 tokens | 16 tokens |",
        "| --- | ---: | ---: | ---: |",
        "| dcp | 96.3 | 94.4 | 92.1 |",
    ]
    assert "arXiv 2606.16633" in draw_table("published", "results/published.json", PROJECT).splitlines()[-1]


def test_the_line_below_a_table_says_what_was_measured_with_what_and_where_the_numbers_are(tmp_path):
    (tmp_path / "cost.json").write_text(json.dumps({**COST, "description": "A tiny model."}))
    last = draw_table("cost", "cost.json", tmp_path).splitlines()[-1]
    assert last.startswith("<sub>A tiny model. Source: [`cost.json`](cost.json); torch ")


def test_a_result_that_is_not_there_yet_is_said_to_be_missing(tmp_path):
    assert draw_table("cost", "results/q.json", tmp_path) == "*Not measured yet: no `results/q.json`.*"


@pytest.mark.parametrize("content", ['{"results": [{}]}', "[]", "{"])
def test_a_file_without_such_results_is_one_sentence(tmp_path, content):
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(InvalidInputError, match=r"q\.json holds no cost results"):
        draw_table("cost", "q.json", tmp_path)
