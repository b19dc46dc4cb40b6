"""`compare` end to end, and what it refuses before the model is loaded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dcp_prune.testbed.world import make_scene

Run = Callable[..., Any]
QUESTIONS = ("is there a cat in the picture ?", "how many objects are there ?")


@pytest.fixture
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(3):
        Image.fromarray(make_scene(1_000_000_000 + seed).image).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def ask(dcp_prune: Run, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`ask(content, ...)`: compares on a file of questions with that content."""

    def run(content: str | bytes, *arguments: object, name: str = "questions.txt") -> Any:
        path = tmp_path_factory.mktemp("questions") / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return dcp_prune("compare", "--images", images, "--questions", path, *arguments)

    return run


def _line(image: object, question: object, **more: object) -> str:
    return json.dumps({"image": image, "question": question, **more})


def test_every_question_is_asked_about_every_image_and_counted_once(ask: Run) -> None:
    outcome = ask("\n".join(QUESTIONS), "--num-tokens", "8,32", "--max-new-tokens", "3", "--json", "out.json")
    assert outcome.code == 0, outcome.err
    result = json.loads(Path("out.json").read_text())
    assert (result["images"], result["questions"], len(result["answers"])) == (3, 6, 6)
    assert [row["num_tokens"] for row in result["results"]] == [32, 8]
    for place, row in enumerate(result["results"]):
        same = [answer["pruned"][place]["same"] for answer in result["answers"]]
        assert row["agreement"] == sum(same) / 6
        assert row["agreement_at_least"] <= row["agreement"]
        assert row["exact_agreement"] <= row["agreement"]
        assert row["kl_first_token_nats"] > 0
        assert row["kappa"] > 0
    full = result["all_tokens"]
    assert full["visual_tokens"] == 576
    for row in result["results"]:
        assert full["prefill_tokens"] - row["prefill_tokens"] == 576 - row["visual_tokens"]
        for cost in ("kv_cache_bytes", "prefill_flops"):
            assert row[cost] < full[cost]
        assert row["first_token_ms"] > 0
    assert result["verdicts"][0]["sentence"] in " ".join(outcome.out.split())
    assert "3 images even complete agreement cannot show" in outcome.err
    assert "at least 59 images" in outcome.err


def test_questions_of_one_image_stay_together_and_other_keys_are_ignored(ask: Run) -> None:
    lines = [
        _line("1.png", QUESTIONS[0], answer="yes", id=1),
        _line("0.png", QUESTIONS[0]),
        "",
        _line("1.png", QUESTIONS[1]),
    ]
    outcome = ask("\n".join(lines), "--num-tokens", "16", "--max-new-tokens", "1", "--json", name="questions.jsonl")
    assert outcome.code == 0, outcome.err
    asked = [(Path(row["image"]).name, row["question"]) for row in json.loads(outcome.out)["answers"]]
    assert asked == [("1.png", QUESTIONS[0]), ("1.png", QUESTIONS[1]), ("0.png", QUESTIONS[0])]


def test_several_pruners_share_the_error(ask: Run) -> None:
    arguments = ("--pruner", "random", "--pruner", "uniform", "--num-tokens", "16", "--max-new-tokens", "1", "--json")
    result = json.loads(ask(QUESTIONS[0], *arguments).out)
    assert [verdict["pruner"] for verdict in result["verdicts"]] == ["random", "uniform"]
    assert {verdict["confidence"] for verdict in result["verdicts"]} == {0.975}


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("q.txt", "", "holds no question"),
        ("q.txt", " \n\n", "holds no question"),
        ("q.txt", "what ?\nwho ?\nwhat ?\n", "line 3: the question repeats line 1"),
        ("q.txt", "what ?\nwhat is <image> ?\n", "line 2: the question holds <image>"),
        ("q.txt", b"what ?\n\xff\xfe\n", "line 2: this is not UTF-8"),
        ("q.jsonl", _line("0.png", "what ?") + "\n{nonsense}\n", "line 2 is not valid JSON"),
        ("q.jsonl", "what ?\n", "line 1 is not valid JSON"),
        ("q.jsonl", "[1]\n", "line 1 holds a list, not an object with image, question"),
        ("q.jsonl", '\n{"image": "0.png"}\n', "line 2 has no question; it must be a text"),
        ("q.jsonl", '{"question": "what ?"}\n', "line 1 has no image; it must be a text"),
        ("q.jsonl", _line(7, "what ?"), "line 1: image must be a text, got 7"),
        ("q.jsonl", _line("0.png", None), "line 1: question must be a text, got None"),
        ("q.jsonl", _line("0.png", " "), "line 1: question is empty"),
        ("q.jsonl", _line("gone.png", "what ?"), "there is no image"),
        ("q.jsonl", _line("notes.txt", "what ?"), "line 1: "),
        (
            "q.jsonl",
            f"{_line('0.png', 'what ?')}\n{_line('0.png', 'what ?')}",
            "line 2: this image and",
        ),
        ("q.txt", _line("gone.png", "what ?"), "line 1: there is no image"),
    ],
)
def test_questions_that_cannot_be_used_are_refused_by_line(
    ask: Run, images: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | bytes, cause: str
) -> None:
    (images / "notes.txt").write_text("no image")
    _never_load(monkeypatch)
    _refused(ask(content, name=name), cause)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--num-tokens", "16,many"), "whole numbers separated by commas"),
        (("--num-tokens", "0"), "at least 1"),
        (("--num-tokens", "1.5"), "whole numbers"),
        (("--keep", "1"), "below 1"),
        (("--keep", "0"), "above 0"),
        (("--keep", "nan"), "above 0"),
        (("--pruner", "dpc"), "did you mean dcp"),
        (("--pruner", "none"), "all tokens"),
        (("--pruner", "dcp@wrong"), "leave out @wrong"),
        (("--pruner", "dcp(max_distance=0.4,num_tokens=(4,8))"), "leave out max_distance and the range"),
        (("--max-new-tokens", "0"), "at least 1"),
        (("--batch-size", "0"), "at least 1"),
        (("--json", "missing/out.json"), "does not exist"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(
    ask: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], cause: str
) -> None:
    _never_load(monkeypatch)
    _refused(ask(QUESTIONS[0], *arguments), cause)


def test_folders_and_images_that_cannot_be_used_are_refused_by_name(
    dcp_prune: Run, ask: Run, images: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _never_load(monkeypatch)
    empty = tmp_path_factory.mktemp("empty")
    (empty / "sub").mkdir()
    questions = empty / "questions.txt"
    questions.write_text(QUESTIONS[0])
    for folder, cause in ((empty, "holds no images"), (empty / "gone", "does not exist"), (questions, "is no folder")):
        _refused(dcp_prune("compare", "--images", folder, "--questions", questions), cause)
    _refused(dcp_prune("compare", "--images", images, "--questions", empty / "gone.txt"), "gone.txt cannot be read")
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:500])
    _refused(ask(QUESTIONS[0]), "2.png cannot be decoded")


def test_a_budget_that_prunes_nothing_is_refused(ask: Run) -> None:
    _refused(ask(QUESTIONS[0], "--num-tokens", "16,576"), "576 tokens prunes nothing")


def test_what_is_no_image_is_left_out_aloud(ask: Run, images: Path) -> None:
    (images / "notes.doc").write_text("no image")
    (images / "more").mkdir()
    outcome = ask(QUESTIONS[0], "--num-tokens", "16", "--max-new-tokens", "1")
    assert outcome.code == 0, outcome.err
    assert "notes.doc, more/ in" in outcome.err


def test_an_interrupted_run_leaves_nothing(ask: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dcp_prune.eval.compare._Comparison._costs", interrupted)
    outcome = ask(QUESTIONS[0], "--num-tokens", "16", "--max-new-tokens", "1", "--json", "out.json")
    assert outcome.code == 130
    assert list(Path.cwd().iterdir()) == []


def _never_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("dcp_prune.cli.compare.load_assistant", never)


def _refused(outcome: Any, cause: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert cause in errors[0]
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_picture_whose_name_is_no_utf8_is_asked_about_like_any_other(ask: Run, images: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (images / "0.png").rename(images / name)
    outcome = ask(QUESTIONS[0], "--num-tokens", "8", "--max-new-tokens", "1", "--json", "out.json")
    assert outcome.code == 0, outcome.err
    asked = json.loads(Path("out.json").read_text(encoding="utf-8"))["answers"]
    assert str(images / name) in {answer["image"] for answer in asked}
