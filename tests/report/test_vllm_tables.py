"""Tables of vLLM's result files say what was measured, losses included."""

from __future__ import annotations

from typing import Any

from dcp_prune.report.tables import TABLES


def arm(name: str, num_tokens: int, factor: float, loads: bool = True) -> dict[str, Any]:
    ratio = {"ratio": factor, "ratio_ci95": [factor, factor]}
    rate = {"requests_per_second": 2.0 / factor, "ratio": 1 / factor, "ratio_ci95": [1 / factor] * 2}
    return {
        "model": "testbed",
        "arm": name,
        "num_tokens": num_tokens,
        "ttft": {"milliseconds": 1000 * factor, **ratio},
        "request": {"milliseconds": 2000 * factor, **ratio},
        "throughput": {"1": rate} if loads else {},
    }


def test_a_comparison_shows_ratios_and_leaves_open_what_was_not_asked():
    rows = [arm("stock", 576, 1.0), arm("all", 576, 1.25), arm("pruned", 16, 0.5, loads=False)]
    lines = TABLES["vllm"]({"results": rows}).splitlines()
    assert lines[0].endswith("| requests/s, 1 at a time |")
    assert "| stock vLLM | 576 | 1,000 ms | 2,000 ms | 2.0 |" in lines[2]
    assert "| plug-in, nothing pruned | 576 | 1,250 ms: 1.250 [1.250, 1.250] | 2,500 ms: 1.250" in lines[3]
    assert lines[3].endswith("| 1.6: 0.80 [0.80, 0.80] |")
    assert lines[4].endswith("| 16 | 500 ms: 0.500 [0.500, 0.500] | 1,000 ms: 0.500 [0.500, 0.500] |  |")


def test_a_soak_says_which_claims_do_not_hold():
    kind = {"asked": 3, "as_expected": 2, "median_seconds": 0.5, "p95_seconds": None}
    memory = {"warm_up_requests": 1, "after_warm_up": 100.0, "at_end": 120.0, "largest": 130.0}
    result = {
        "kinds": {"plain": kind},
        "resident_mib": memory,
        "requests": 3,
        "planned_requests": 10,
        "seconds": 90.0,
        "concurrency": 32,
        "largest_logprob_difference": 2e-5,
        "asked_again": {"ServerError": 1},
        "cache_misses_of_vllm": 2,
        "holds": {"no crash": True, "memory flat": False},
    }
    drawn = TABLES["soak"](result)
    assert "| plain | 3 | 2 | 0.50 s |  |" in drawn
    assert "3 of 10 planned requests in 1.5 minutes" in drawn
    assert "no crash: yes; memory flat: **no**" in drawn


def test_answers_that_differ_are_listed_below_the_accuracies():
    estimate = {"mean": 0.5, "low": 0.25, "high": 0.75}
    differing = {"question": "7/03", "text": "is it ?", "right": "yes", "vllm": "no", "transformers": "yes"}
    row = {
        "pruner": "none",
        "num_tokens": 576,
        "questions": 500,
        "equal": 500,
        "accuracy": {"vllm": estimate, "transformers": estimate},
        "difference": {"mean": 0.0, "low": -0.01, "high": 0.01},
        "differing": [],
    }
    asked = {"questions": 500, "split": "held-out", "images": 36, "difficulty": "crowded"}
    drawn = TABLES["vllm-answers"]({"results": [row], "questions": asked})
    assert "| all tokens | 576 | 500 of 500 | 50.0 | 50.0 | +0.0 [-1.0, +1.0] |" in drawn
    assert "500 held-out questions about 36 crowded pictures" in drawn
    assert "is it ?" not in drawn
    other = {**row, "pruner": "dcp", "equal": 499, "differing": [{**differing, "logprob_gap": 2e-5}]}
    drawn = TABLES["vllm-answers"]({"results": [row, other], "questions": asked})
    assert "| `dcp` | 7/03 | is it ? | yes | no | yes | 2.0e-05 in logprob |" in drawn
