"""The bookkeeping of `measure` on a model that takes no time; what it measures there is of no interest."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import prune_inputs
from dcp_prune.profiling import latency
from dcp_prune.profiling.architectures import ARCHITECTURES, build_model, get_architecture, make_inputs
from dcp_prune.profiling.counting import Hollow
from dcp_prune.profiling.latency import LIMIT, NONE, Sample, check_memory, measure, median_interval, variants
from dcp_prune.profiling.memory import peak_bytes
from dcp_prune.pruners.dcp import ACGR, AnchorContextStage, DCPPruner
from dcp_prune.pruners.random import RandomPruner

PATCHES, TEXT = 64, 20
TINY = ARCHITECTURES["tiny"]


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(TINY.config())


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, Any]:
    return make_inputs(model, TINY, batch=2, text_tokens=TEXT)


@pytest.mark.parametrize(
    ("name", "vision", "total", "tokens"),
    [
        ("vit-l-1b", 0.3e9, 1.34e9, 576),
        ("llava-1.5-7b", 0.3e9, 7.06e9, 576),
        ("llava-next-7b", 0.3e9, 7.06e9, 2928),
        ("qwen2.5-vl-7b", 0.68e9, 8.29e9, 1296),
    ],
)
def test_an_architecture_has_the_sizes_of_its_model(name, vision, total, tokens):
    architecture = get_architecture(name)
    with torch.device("meta"):
        model = build_model(architecture.config(), device="meta")
    tower = model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower
    assert sum(each.numel() for each in tower.parameters()) == pytest.approx(vision, rel=0.02)
    assert sum(each.numel() for each in model.parameters()) == pytest.approx(total, rel=0.02)
    ids = make_inputs(model, architecture)["input_ids"]
    assert (ids == model.config.image_token_id).sum() == tokens


def run_of(times: dict[str, float], calls: list[str]):
    def run(model, inputs, variant, short, new_tokens, processor):
        calls.append(variant.name)
        slow = 100.0 if len(calls) <= 3 else 1.5 ** ((len(calls) - 1) // 3)  # the warm-up; then slower every round
        time = slow * times[variant.name]
        return Sample(time, time / 2, time / 10 if variant.kind == "pruned" else None)

    return run


def test_all_variants_run_in_every_round_and_a_machine_that_slows_down_changes_no_ratio(model, inputs, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(latency, "_run", run_of({NONE: 8.0, "random": 2.5, LIMIT: 2.0}, calls))
    chosen = variants([("random", RandomPruner(num_tokens=4))], PATCHES)
    none, pruned, limit = measure(model, inputs, chosen, runs=3)
    assert all(sorted(calls[start : start + 3]) == sorted([NONE, LIMIT, "random"]) for start in range(0, 12, 3))
    assert len(calls) == 12
    assert (none.ttft_ratio, pruned.ttft_ratio, limit.ttft_ratio) == pytest.approx((1.0, 2.5 / 8, 0.25))
    assert (none.limit_share, limit.limit_share) == (None, 1.0)
    assert pruned.limit_share == pytest.approx(0.8)
    assert pruned.selection_share == pytest.approx(0.1)
    assert pruned.prefill_ms == pytest.approx(0.4 * pruned.ttft_ms)
    assert none.selection_share is None


def test_every_budget_has_a_limit_of_its_own():
    pruners = [
        ("a", RandomPruner(num_tokens=4)),
        ("b", RandomPruner(num_tokens=4)),
        ("b", RandomPruner(keep_ratio=0.5)),
    ]
    limits = [each.pruner for each in variants(pruners, PATCHES) if each.kind == "limit" and each.pruner]
    assert [each.num_tokens for each in limits] == [4, 32]


def test_a_pruned_call_reads_fewer_tokens_in_every_count(model, inputs):
    pruners = [("dcp", DCPPruner(num_tokens=4)), ("staged", DCPPruner(num_tokens=4, acgr=ACGR(schedule=((1, 16),))))]
    none, dcp, staged, limit = measure(model, inputs, variants(pruners, PATCHES), runs=1, new_tokens=3)
    assert (none.num_tokens, dcp.num_tokens, limit.num_tokens) == (PATCHES, 4, 4)
    per_token = none.kv_cache_bytes / (PATCHES + TEXT)
    assert dcp.kv_cache_bytes == limit.kv_cache_bytes == per_token * (4 + TEXT)
    flops = [cost.prefill_flops or 0 for cost in (staged, dcp, limit, none)]
    assert 0 < flops[0] < flops[1] == flops[2] < flops[3]
    assert (none.encoder_tokens, dcp.encoder_tokens) == (PATCHES, PATCHES)
    assert staged.encoder_tokens == (2 * PATCHES + 2 * 16) / 4  # four layers in use; the stage acts behind the second
    for cost in (none, dcp, staged, limit):
        assert (cost.per_token_ms or 0) > 0
        assert cost.encoder_ms + (cost.selection_ms or 0) + cost.prefill_ms == pytest.approx(cost.ttft_ms)


def test_selecting_inside_the_encoder_counts_as_selecting(model, inputs, monkeypatch):
    reduce = AnchorContextStage.reduce

    def slow(stage, tokens):
        time.sleep(0.05)
        return reduce(stage, tokens)

    monkeypatch.setattr(AnchorContextStage, "reduce", slow)
    pruner = DCPPruner(num_tokens=4, acgr=ACGR(schedule=((0, 32), (1, 16))))
    record = prune_inputs(model, inputs, pruner).record
    assert record is not None
    assert record.milliseconds["select"] > 100


@pytest.mark.parametrize(("count", "low", "high"), [(1, 0, 0), (5, 0, 4), (7, 0, 6), (9, 1, 7), (20, 5, 14)])
def test_the_interval_of_a_median_are_the_order_statistics_of_the_binomial(count, low, high):
    assert median_interval(list(range(count))) == (low, high)


def test_the_peak_of_some_work_is_what_it_holds_at_most():
    def work() -> None:
        torch.ones(64 * 2**20, dtype=torch.uint8)

    peak = peak_bytes(work, torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not say how much memory a process holds")
    assert 60 * 2**20 < peak < 100 * 2**20


def test_a_model_that_does_not_fit_is_refused_with_what_it_needs(monkeypatch):
    hollow = Hollow(type(build_model(TINY.config(), device="meta")), TINY.config())
    monkeypatch.setattr(latency, "free_memory", lambda device: 1000)
    with pytest.raises(InvalidInputError, match=r"take 3\d\d KiB in float32, and 1000 bytes are free"):
        check_memory(hollow, 1, 10, "cpu")
