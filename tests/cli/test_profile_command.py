"""`dcp-prune profile` on a model that takes no time, and what it counts without running anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcp_prune.report.tables import cost

TINY = ("--model", "random:tiny")
QUICK = ("profile", "--runs", "1", "--new-tokens", "2")


def test_it_shows_a_table_and_writes_json_from_which_the_page_is_drawn_and_a_plot(
    dcp_prune: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = dcp_prune(
        *QUICK,
        *TINY,
        "--num-tokens",
        "4",
        "--batch",
        "2",
        "--pruner",
        "dcp",
        "--json",
        "cost.json",
        "--plot",
        "cost.png",
    )
    assert outcome.code == 0, outcome.err
    assert "of memory for its weights in float32" in outcome.err
    result = json.loads((tmp_path / "cost.json").read_text())
    assert [row["pruner"] for row in result["results"]] == ["none", "dcp", "limit"]
    assert (result["batch"], result["environment"]["packages"]["torch"] is None) == (2, False)
    for row in result["results"]:
        assert f"{row['num_tokens']:,}" in outcome.out
        assert f"{1 / row['ttft_ratio']:.2f} x" in outcome.out
    assert cost(result).count("\n") == 4
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_with_a_processor_is_profiled_as_well(dcp_prune: Callable[..., Any]) -> None:
    outcome = dcp_prune("profile", "--runs", "1", "--new-tokens", "1", "--json")
    assert outcome.code == 0, outcome.err
    none, dcp, limit = json.loads(outcome.out)["results"]
    assert (none["num_tokens"], dcp["num_tokens"], limit["num_tokens"]) == (576, 16, 16)
    assert dcp["kv_cache_bytes"] == limit["kv_cache_bytes"] < none["kv_cache_bytes"]


def test_a_dry_run_counts_every_picture_and_loads_no_weights(
    dcp_prune: Callable[..., Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dcp_prune.assistant import Blueprint

    monkeypatch.delattr(Blueprint, "load")
    outcome = dcp_prune(
        "profile", "--json", "--pruner", "dcp", "--pruner", "dcp_progressive", "--dry-run", picture, picture
    )
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)["results"]
    assert [row["pruner"] for row in rows] == ["none", "dcp", "dcp_progressive"] * 2
    none, dcp, staged = rows[:3]
    assert none["prompt_tokens"] - dcp["prompt_tokens"] == 576 - 16
    per_token = none["kv_cache_bytes"] / none["prompt_tokens"]
    assert dcp["kv_cache_bytes"] == dcp["prompt_tokens"] * per_token
    assert none["encoder_flops"] == dcp["encoder_flops"] > staged["encoder_flops"]
    assert none["prefill_flops"] > dcp["prefill_flops"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--model", "random:tinny"), "did you mean tiny"),
        (("--model", "random:zzz"), "there are tiny, vit-l-1b, llava-1.5-7b"),
        (("--model", "/no/such/folder"), "there is no model at /no/such/folder"),
        ((*TINY, "--pruner", "dpc"), "did you mean dcp"),
        ((*TINY, "--num-tokens", "64"), "dcp would keep all 64 visual tokens of an image, so nothing is pruned"),
        (("--dtype", "int3"), "--dtype int3 is unknown; use float32, bfloat16, float16"),
        (("--attention", "flush"), "--attention flush is unknown; use sdpa, eager, flash_attention_2"),
        (("--attention", "flash_attention_2"), "needs a GPU and the package flash-attn; use sdpa"),
        (("--device", "abacus"), "--device abacus is unknown; use cpu or cuda"),
        (("--device", "cuda:99"), "asks for a GPU, and torch sees"),
        (("--num-tokens", "0"), "--num-tokens must be at least 1"),
        (("--batch", "0"), "--batch must be at least 1"),
        (("--question-length", "2"), "--question-length must be at least 3"),
        (("--plot", "times.svg"), "give a name that ends in .png"),
        (("--json", "/no/such/folder/x.json"), "does not exist; create it first"),
        ((*TINY, "--dry-run", "photo.jpg"), "random:tiny has no processor"),
        (("--dry-run", "photo.jpg"), "photo.jpg does not exist"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_nothing_is_written(
    dcp_prune: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    before = list(tmp_path.iterdir())
    outcome = dcp_prune(*QUICK, *arguments)
    assert outcome.code == 2
    assert sentence in outcome.err
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == before


def test_a_model_that_does_not_fit_says_how_much_it_needs(
    dcp_prune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dcp_prune.profiling import latency

    monkeypatch.setattr(latency, "free_memory", lambda device: 2**30)
    outcome = dcp_prune("profile", "--model", "random:llava-1.5-7b")
    assert outcome.code == 2
    assert "take 26.9 GiB in float32, and 1.0 GiB are free; take --dtype bfloat16" in outcome.err
