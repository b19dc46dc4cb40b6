"""`dcp-prune vllm-args`: the printed command is a shell's, and its JSON what the plug-in reads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dcp_prune.integrations.vllm.settings import Settings
from dcp_prune.testbed.load import checkpoint_path

Run = Callable[..., Any]


def overrides_in(command: str) -> dict[str, Any]:
    words = shlex.split(command)
    return json.loads(words[words.index("--hf-overrides") + 1])


def test_the_command_serves_the_model_with_the_settings(dcp_prune: Run) -> None:
    outcome = dcp_prune(
        "vllm-args", "testbed-weak", "--num-tokens", "24", "--pruner", "dcp(text_weight=0.5)", "--turn-end", "it's:"
    )
    assert shlex.split(outcome.out)[:3] == ["vllm", "serve", str(checkpoint_path("weak"))]
    overrides = overrides_in(outcome.out)
    assert overrides["architectures"] == ["DcpLlavaForConditionalGeneration"]
    assert Settings.of(SimpleNamespace(**overrides)) == Settings(
        num_tokens=24, options={"text_weight": 0.5}, turn_end="it's:"
    )


def test_the_command_with_defaults_is_the_shortest(dcp_prune: Run) -> None:
    outcome = dcp_prune("vllm-args", "org/model", "--architecture", "LlavaForConditionalGeneration")
    assert outcome.out == (
        """vllm serve org/model --hf-overrides '{"architectures": ["DcpLlavaForConditionalGeneration"], """
        """"dcp_prune": {"num_tokens": 16}}'\n"""
    )


def test_a_family_is_named_by_its_class(dcp_prune: Run) -> None:
    outcome = dcp_prune("vllm-args", "org/model", "--architecture", "Qwen2_5_VLForConditionalGeneration")
    assert overrides_in(outcome.out)["architectures"] == ["DcpQwen2_5_VLForConditionalGeneration"]


def test_budgets_of_requests_and_metrics_of_workers_are_asked_for(dcp_prune: Run) -> None:
    outcome = dcp_prune("vllm-args", "testbed-weak", "--request-budgets", "--metrics")
    assert outcome.out.startswith("PROMETHEUS_MULTIPROC_DIR=$(mktemp -d) vllm serve ")
    assert outcome.out.endswith(" --trust-request-mm-kwargs\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["testbed-weak", "--pruner", "dpc"], "no pruner is named 'dpc'; did you mean dcp"),
        (["testbed-weak", "--pruner", "dcp@wrong"], "which is for sweeps"),
        (["testbed-weak", "--num-tokens", "0"], "num_tokens must be a whole number of at least 1"),
        (["testbed-weak", "--text-scope", "all"], "text_scope must be one of turn, prompt, none"),
        (["x", "--architecture", "BertModel"], "x is a BertModel, which cannot be pruned in vLLM so far"),
        (["no-such-folder-or-model"], "cannot be read; give the folder of the model"),
    ],
)
def test_what_vllm_would_refuse_is_refused_here(
    dcp_prune: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # its variable was read long ago
    outcome = dcp_prune("vllm-args", *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert sentence in outcome.err


def test_a_vision_tower_that_vllm_does_not_have_is_refused_with_the_way_out(dcp_prune: Run) -> None:
    outcome = dcp_prune("vllm-args", "testbed-natural")
    assert outcome.code != 0
    assert "is a dinov2, which vLLM's LLaVA does not have" in outcome.err
    assert "dcp-prune serve" in outcome.err
