"""The benchmark's bookkeeping on a model that takes no time; what it measures there is of no interest."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dcp_prune.errors import MissingSignalError
from dcp_prune.integrations.transformers import prune_inputs
from dcp_prune.profiling import latency
from dcp_prune.profiling.latency import NONE, Sample, build_config, build_model, make_inputs, measure
from dcp_prune.pruners.dcp import ACGR, AnchorContextStage, DCPPruner
from dcp_prune.pruners.random import RandomPruner
from dcp_prune.report.tables import cost

PATCHES = 64


@pytest.fixture(scope="module")
def model():
    return build_model(build_config(tiny=True))


def test_the_benchmark_model_has_the_promised_sizes():
    with torch.device("meta"):
        model = build_model(build_config())
    language = sum(tensor.numel() for tensor in model.model.language_model.parameters())
    vision = sum(tensor.numel() for tensor in model.model.vision_tower.parameters())
    assert 0.95e9 < language < 1.1e9  # one billion
    assert 0.30e9 < vision < 0.31e9  # CLIP ViT-L/14
    assert latency._image(model.config) == (336, 576)


def test_every_pruner_runs_in_every_round_and_the_first_round_does_not_count(model, monkeypatch):
    calls: list[str] = []

    def run(model, inputs, pruner):
        calls.append(NONE if pruner is None else type(pruner).__name__)
        slow = len(calls) <= 2  # the warm-up
        time = 1000.0 if slow else 8.0 if pruner is None else 2.0
        return Sample(ttft=time, encoder=time / 2, selection=None if pruner is None else time / 10, cache_bytes=1)

    monkeypatch.setattr(latency, "_run", run)
    none, pruned = measure(model, {}, {"random": RandomPruner(num_tokens=4)}, runs=3)
    assert all(sorted(calls[start : start + 2]) == ["RandomPruner", NONE] for start in range(0, 8, 2))
    assert len(calls) == 8
    assert (none.ttft_ms, pruned.ttft_ms) == (8.0, 2.0)
    assert (none.ttft_ratio, pruned.ttft_ratio) == (1.0, 0.25)
    assert pruned.selection_share == pytest.approx(0.1)
    assert none.selection_share is None


def test_a_machine_that_slows_down_between_rounds_does_not_change_the_ratio(model, monkeypatch):
    calls = []

    def run(model, inputs, pruner):
        calls.append(pruner)
        # Both runs of a round are equally slow.
        time = 1.5 ** ((len(calls) - 1) // 2) * (8.0 if pruner is None else 2.0)
        return Sample(ttft=time, encoder=time, selection=None if pruner is None else time / 50, cache_bytes=1)

    monkeypatch.setattr(latency, "_run", run)
    _, pruned = measure(model, {}, {"random": RandomPruner(num_tokens=4)}, runs=5)
    assert pruned.ttft_ratio == pytest.approx(0.25)
    assert pruned.selection_share == pytest.approx(0.02)


def test_a_pruned_run_reads_fewer_tokens_and_all_its_selecting_is_counted(model):
    inputs = make_inputs(model)
    none, dcp = measure(model, inputs, {"dcp": DCPPruner(num_tokens=4)}, runs=1)
    assert (none.num_tokens, dcp.num_tokens) == (PATCHES, 4)
    per_token = none.kv_cache_bytes / (PATCHES + latency.TEXT_TOKENS)
    assert dcp.kv_cache_bytes == per_token * (4 + latency.TEXT_TOKENS)
    assert dcp.prefill_flops < none.prefill_flops
    assert dcp.selection_ms is not None
    assert dcp.selection_share is not None
    assert 0 < dcp.selection_ms < dcp.ttft_ms
    assert 0 < dcp.selection_share < 1


def test_selecting_inside_the_encoder_counts_as_selecting(model, monkeypatch):
    reduce = AnchorContextStage.reduce

    def slow(stage, tokens):
        time.sleep(0.05)
        return reduce(stage, tokens)

    monkeypatch.setattr(AnchorContextStage, "reduce", slow)
    pruner = DCPPruner(num_tokens=4, acgr=ACGR(schedule=((0, 32), (1, 16))))
    record = prune_inputs(model, make_inputs(model), pruner).record
    assert record is not None
    assert record.milliseconds["select"] > 100


def test_the_command_writes_a_result_from_which_the_cost_table_is_drawn(tmp_path: Path, capsys):
    target = tmp_path / "latency.json"
    arguments = ["--tiny", "--runs", "1", "--pruner", "dcp_progressive", "--num-tokens", "4", "--json", str(target)]
    assert latency.run(arguments) == 0
    result = json.loads(target.read_text())
    assert [row["pruner"] for row in result["results"]] == ["none", "dcp_progressive"]
    assert result["environment"]["packages"]["torch"]
    assert cost(result).count("\n") == 3
    assert "4 of 64 visual tokens" in capsys.readouterr().out


@dataclass(frozen=True, kw_only=True)
class KeylessPruner(RandomPruner):
    """Asks for what no model gives."""

    def score(self, tokens):
        raise MissingSignalError("KeylessPruner needs the moon, which these tokens do not carry")


def test_a_pruner_that_the_model_cannot_serve_is_left_out_aloud_unless_it_was_asked_for(monkeypatch, capsys):
    pruners = {"random": RandomPruner, "keyless": KeylessPruner}
    monkeypatch.setattr(latency, "list_pruners", lambda: tuple(pruners))
    monkeypatch.setattr(latency, "make_pruner", lambda name, num_tokens: pruners[name](num_tokens=num_tokens))
    assert latency.run(["--tiny", "--runs", "1", "--num-tokens", "4"]) == 0
    output = capsys.readouterr().out
    assert "left out keyless: KeylessPruner needs the moon" in output
    assert "random" in output
    assert latency.run(["--tiny", "--runs", "1", "--num-tokens", "4", "--pruner", "keyless"]) == 2
    assert "needs the moon" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--pruner", "dpc"], "did you mean dcp"),
        (["--num-tokens", "0"], "num_tokens must be at least 1"),
        (["--json", "/no/such/folder/x.json"], "does not exist; create it first"),
        (["--runs", "0"], "at least one round"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_exit_code_2(arguments, sentence, capsys):
    assert latency.run(["--tiny", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
