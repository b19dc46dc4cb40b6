"""`validate`: what would break a run is said before it starts, and no weights are read for that."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dcp_prune.eval import validate as validate_module
from dcp_prune.testbed.load import checkpoint_path

Run = Callable[..., Any]


@pytest.fixture
def checks(dcp_prune: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`checks(...)["model"]`: state, finding and advice on a subject; the exit code is compared with the problems."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", never)
    monkeypatch.setattr("dcp_prune.testbed.load.load", never)
    monkeypatch.setattr(validate_module, "free_memory", lambda device: 2**33)

    def run(*arguments: object) -> dict[str, Any]:
        outcome = dcp_prune("validate", "--json", *arguments)
        assert outcome.out, outcome.err
        result = json.loads(outcome.out)
        states = [check["state"] for check in result["checks"]]
        assert result["problems"] == states.count("problem")
        assert outcome.code == (1 if "problem" in states else 0)
        found: dict[str, Any] = {}
        for check in result["checks"]:
            if found.get(check["subject"], {}).get("state") != "problem":
                found[check["subject"]] = check
        return found

    return run


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder to spoil."""
    copy = tmp_path_factory.mktemp("models") / "model"
    shutil.copytree(checkpoint_path("weak"), copy)
    return copy


def _spoil(config: Path, **changes: Any) -> None:
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


def test_a_good_plan_has_no_problem(checks: Run, dcp_prune: Run) -> None:
    found = checks("--output", "records", "--processes", "1", "--num-tokens", "16,32", "--task", "counting")
    assert {check["state"] for check in found.values()} == {"ok"}
    assert found["pruner dcp"]["found"].endswith("keeps 16, 32 of 576")
    assert "24 x 24 = 576 visual tokens" in found["adapter"]["found"]
    assert list(Path.cwd().iterdir()) == []
    outcome = dcp_prune("validate", "--output", "records")
    assert outcome.code == 0
    assert "All is well" in outcome.out


def test_a_sweep_is_checked_by_changing_one_word(dcp_prune: Run) -> None:
    from dcp_prune.cli import app

    arguments = (
        "--output records --pruner dcp(text_weight=0) --pruner none --num-tokens 16 --num-tokens 0 --limit 50 "
        "--task counting --checkpoint weak --difficulty crowded --seed-range 1000000000:1000000010 "
        "--distance kappa --distances --processes 1 --compact"
    ).split()
    app.parse_args(["sweep", *arguments])
    outcome = dcp_prune("validate", *arguments)
    assert outcome.code == 0, outcome.out + outcome.err


def test_a_file_that_was_cut_short_is_named(checks: Run, folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    found = checks("--model", folder)["model"]
    assert found["state"] == "problem"
    assert "model.safetensors is cut short" in found["found"]
    assert "fetch these files again" in found["advice"]


def test_missing_parts_of_an_indexed_model_are_named(checks: Run, folder: Path) -> None:
    weights = folder / "model.safetensors"
    (header_bytes,) = struct.unpack("<Q", weights.read_bytes()[:8])
    names = [name for name in json.loads(weights.read_bytes()[8 : 8 + header_bytes]) if name != "__metadata__"]
    weights.rename(folder / "model-00001-of-00002.safetensors")
    where = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert checks("--model", folder)["model"]["state"] == "ok"
    index.write_text(json.dumps({"weight_map": {**where, "more": "model-00002-of-00002.safetensors"}}))
    assert "model-00002-of-00002.safetensors is missing" in checks("--model", folder)["model"]["found"]
    index.write_text(json.dumps({"weight_map": {**where, "more": "model-00001-of-00002.safetensors"}}))
    assert "lacks 1 of its tensors" in checks("--model", folder)["model"]["found"]
    index.write_text("[")
    assert "index.json cannot be read" in checks("--model", folder)["model"]["found"]


def test_a_pointer_in_place_of_weights_is_recognised(checks: Run, folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n")
    assert "Git LFS pointer" in checks("--model", folder)["model"]["found"]


def test_weights_of_a_smaller_model_are_recognised(checks: Run, folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    _spoil(folder / "config.json", text_config={**text, "num_hidden_layers": 9})
    assert checks("--model", folder)["weights"]["state"] == "problem"


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "is a LlamaForCausalLM, which cannot be pruned"),
        ({"architectures": None}, "is a unknown"),
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer is the list"),
        ({"vision_feature_select_strategy": "full"}, "passes on [CLS] like a patch"),
        ({"model_type": "nonsense"}, "config.json cannot be used"),
    ],
)
def test_a_model_without_adapter_is_refused_by_its_config(
    checks: Run, folder: Path, changes: dict[str, Any], cause: str
) -> None:
    _spoil(folder / "config.json", **changes)
    found = checks("--model", folder)
    assert found["adapter"]["state"] == "problem"
    assert cause in found["adapter"]["found"]
    assert found["pruner dcp"]["state"] == "warning"


def test_missing_files_beside_the_weights_are_named(checks: Run, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert checks("--model", folder)["processor"]["state"] == "warning"
    (folder / "tokenizer.json").unlink()
    assert checks("--model", folder)["processor"]["state"] == "problem"
    (folder / "model.safetensors").unlink()
    assert "there are no weights" in checks("--model", folder)["model"]["found"]
    (folder / "config.json").unlink()
    assert "has no config.json" in checks("--model", folder)["model"]["found"]


@pytest.mark.parametrize("name", ["/no/such/model", "nosuchmodel", "a/b/c"])
def test_a_model_that_is_nowhere_is_said_to_be(checks: Run, name: str) -> None:
    assert f"there is no model at {name}" in checks("--model", name)["model"]["found"]


def test_a_hub_model_that_is_not_here_needs_the_hub(checks: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = checks("--model", "org/not-in-any-cache")["model"]
    assert found["state"] == "problem"
    assert "HF_HUB_OFFLINE" in found["found"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    assert "cannot be reached" in checks("--model", "org/not-in-any-cache")["model"]["found"]


def test_a_hub_model_is_judged_by_its_config_and_its_download_by_the_disk(
    checks: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    files = [
        SimpleNamespace(rfilename="model.safetensors", size=2**60),
        SimpleNamespace(rfilename="pytorch_model.bin", size=2**60),
    ]
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(folder / "config.json"))
    found = checks("--model", "org/model")
    assert "1048576 TiB to download" in found["model"]["found"]
    assert found["adapter"]["state"] == "ok"
    assert found["pruner dcp"]["state"] == "ok"
    assert found["disk for the model"]["state"] == "problem"


@pytest.mark.parametrize(
    ("arguments", "subject", "cause"),
    [
        (("--pruner", "dpc"), "pruner dpc", "did you mean dcp"),
        (("--pruner", "dcp(colour=1)"), "pruner dcp(colour=1)", "has no option 'colour'"),
        (("--pruner", "random@wrong"), "pruner random@wrong", "does not read the question"),
        (("--pruner", "cdpruner"), "pruner cdpruner", "CDPruner needs clip_similarity"),
        (("--pruner", "dcp(max_distance=0.4)"), "pruner dcp(max_distance=0.4)", "no range to pick from"),
        (("--pruner", "mmtok(num_tokens=(4,8))"), "pruner mmtok(num_tokens=(4,8))", "which all pruners share"),
        (("--pruner", "dcp(schedule=((10, 100),))"), "pruner dcp(schedule=((10, 100),))", "at 16 tokens: schedule"),
        (("--num-tokens", "600"), "budget", "600 prunes nothing: that is more than"),
        (("--num-tokens", "-1"), "budget", "-1 visual tokens cannot be kept"),
        (("--task", "count"), "task", "no task count"),
        (("--tasks", "gqa"), "benchmarks", "lmms-eval is not installed"),
        (("--questions", "gone.jsonl"), "questions", "gone.jsonl cannot be read"),
        (("--output", "missing/folder"), "output", "missing does not exist"),
    ],
)
def test_what_would_break_the_run_is_a_problem(
    checks: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], subject: str, cause: str
) -> None:
    monkeypatch.setattr(validate_module, "BENCHMARKS", "not_installed_anywhere")
    found = checks(*arguments)[subject]
    assert found["state"] == "problem"
    assert cause in found["found"]


def test_a_budget_of_its_own_is_tried_as_well(checks: Run) -> None:
    label = "dcp(max_distance=0.4,num_tokens=(4,64))"
    found = checks("--pruner", label, "--num-tokens", "16,8")[f"pruner {label}"]
    assert (found["state"], "keeps up to 64 of 576" in found["found"]) == ("ok", True)


def test_a_budget_of_all_tokens_is_a_warning(checks: Run) -> None:
    found = checks("--num-tokens", "16,576")["budget"]
    assert (found["state"], "prunes nothing" in found["found"]) == ("warning", True)


def test_too_little_memory_for_all_processes_is_a_problem(checks: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_module, "free_memory", lambda device: 2**28)
    assert checks("--batch-size", "1", "--processes", "1")["memory"]["state"] == "ok"
    assert checks("--batch-size", "1", "--processes", "8")["memory"]["state"] == "problem"


def test_benchmarks_are_looked_up_in_the_installed_package(
    checks: Run, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path_factory.mktemp("site")
    tasks = site / "lmms_eval" / "tasks" / "gqa"
    tasks.mkdir(parents=True)
    (site / "lmms_eval" / "__init__.py").write_text("raise AssertionError('imported')")
    (tasks / "gqa.yaml").write_text('dataset_path: x\ntask: "gqa"\ndoc_to_text: !function utils.text\n')
    (tasks / "group.yaml").write_text("group: everything\ntask:\n  - gqa\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    assert checks("--tasks", "gqa,everything")["benchmarks"]["state"] == "ok"
    found = checks("--tasks", "gqa,gqq")["benchmarks"]
    assert (found["state"], found["advice"]) == ("problem", "did you mean gqa?")


def test_a_bad_line_of_the_data_is_named(checks: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("data")
    Image.effect_noise((64, 64), 50).save(place / "a.png")
    line = json.dumps({"id": "1", "task": "look", "image": "a.png", "question": "what ?", "answer": "noise"})
    (place / "data.jsonl").write_text(f"{line}\n")
    assert checks("--questions", place / "data.jsonl")["questions"]["state"] == "ok"
    found = checks("--questions", place / "data.jsonl", "--task", "read")["questions"]["found"]
    assert "no question of the task read" in found
    (place / "data.jsonl").write_text(f"{line}\nnonsense\n")
    assert "line 2" in checks("--questions", place / "data.jsonl")["questions"]["found"]


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--limit", "0"), "at least 1"),
        (("--num-tokens", "many"), "whole numbers"),
        (("--seed-range", "5"), "A:B"),
        (("--json", "missing/out.json"), "does not exist"),
    ],
)
def test_options_that_mean_nothing_are_refused(dcp_prune: Run, arguments: tuple[str, ...], cause: str) -> None:
    outcome = dcp_prune("validate", *arguments)
    assert outcome.code == 2
    assert cause in outcome.err
