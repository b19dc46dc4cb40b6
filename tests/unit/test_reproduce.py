"""tools/reproduce.py: what it tells one to run exists, and it says rightly which cells of a finished run agree."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from dcp_prune import make_pruner

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("reproduce", PROJECT / "tools" / "reproduce.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduce"] = module
    spec.loader.exec_module(module)
    return module


def write_run(folder: Path, name: str, pruner: str, scores: dict[str, float], **config: Any) -> None:
    """A result file as lmms-eval 0.7.3 writes it, with scores in the units of the published tables."""
    gqa, mme, pope, sqa, text = (scores.get(each) for each in ("GQA", "MME", "POPE", "SQA", "TextVQA"))
    results: dict[str, Any] = {}
    for task, value in (("gqa", gqa), ("scienceqa_img", sqa), ("textvqa_val_ocr", text)):
        if value is not None:
            results[task] = {"alias": task, "exact_match,none": value / 100, "exact_match_stderr,none": 0.01}
    if mme is not None:
        results["mme"] = {"mme_perception_score,none": mme - 300, "mme_cognition_score,none": 300.0}
    if pope is not None:
        results["pope"] = {"pope_accuracy,none": 0.5, "pope_f1_score,none": pope / 100}
    arguments = f"pretrained=llava-hf/llava-1.5-7b-hf,dtype=float16,{pruner}"
    data = {"results": results, "config": {"model_args": arguments, "limit": None, **config}}
    (folder / f"{name}_results.json").write_text(json.dumps(data))


def published(tool: Any, pruner: str, num_tokens: int | None) -> dict[str, float]:
    cells = [each for each in tool.expected() if (each.model, each.pruner) == ("llava-1.5-7b", pruner)]
    return {each.benchmark: each.value for each in cells if each.num_tokens == num_tokens}


def test_a_run_with_the_published_scores_agrees_in_every_cell(tool: Any, tmp_path: Path) -> None:
    write_run(tmp_path, "a", "pruner=none", published(tool, "none", None))
    write_run(tmp_path, "b", "pruner=dcp_progressive,num_tokens=16", published(tool, "dcp_progressive", 16))
    write_run(tmp_path, "c", "pruner=visionzip,num_tokens=15,cls_in_budget=true", published(tool, "visionzip", 16))
    lines, agrees = tool.compare(tool.read_runs(tmp_path))
    assert agrees
    assert lines[-1] == "17 of 17 cells with a published score agree with it."


def test_a_cell_beyond_its_tolerance_is_named_and_the_exit_code_is_one(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = published(tool, "dcp", 16)
    write_run(
        tmp_path, "a", "pruner=dcp,num_tokens=16", scores | {"POPE": scores["POPE"] - 1.6, "GQA": scores["GQA"] + 1.4}
    )
    assert tool.app(["check", str(tmp_path)]) == 1
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[3] for row in rows if "**no**" in row] == ["POPE"]
    assert sum("| yes |" in row for row in rows) == 4


def test_another_option_is_another_method_and_is_not_held_against_the_published_one(tool: Any, tmp_path: Path) -> None:
    write_run(tmp_path, "a", "pruner=dcp,num_tokens=16,text_weight=0", {"GQA": 10.0})
    lines, _ = tool.compare(tool.read_runs(tmp_path))
    assert "`dcp(text_weight=0)`" in lines[2]
    assert "nothing published" in lines[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 8}, "measured with --limit 8"),
        ({"model_args": "pretrained=someone/other,pruner=none"}, "say which one with --model"),
        ({"model_args": "pretrained=llava-hf/llava-1.5-7b-hf,pruner=dcp,keep_ratio=0.1"}, "no num_tokens"),
    ],
)
def test_a_run_that_cannot_be_compared_is_refused_with_the_reason(
    tool: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_run(tmp_path, "a", "pruner=none", {"GQA": 61.9}, **change)
    with pytest.raises(tool.UnusableError, match=message):
        tool.read_runs(tmp_path)


def test_a_folder_without_runs_is_refused(tool: Any, tmp_path: Path) -> None:
    with pytest.raises(tool.UnusableError, match=r"no \*_results\.json"):
        tool.read_runs(tmp_path)


def test_every_method_that_the_commands_name_can_be_made(tool: Any) -> None:
    for name, model in tool.MODELS.items():
        text = "\n".join(tool._commands(name, "out", 1))
        assert model.pretrained in text
        for pruner in model.pruners:
            assert re.search(rf"\b{pruner}\b", text)
            options = {"cls_in_budget": True} if pruner in tool.COUNTS_CLS else {}
            make_pruner(pruner, num_tokens=model.budgets[0], **options)
        for path in re.findall(r"tools/[\w/.]+", text):
            assert (PROJECT / path).exists()


def test_the_page_shows_what_the_tool_prints(tool: Any) -> None:
    assert tool.app(["page", "--check"]) == 0
