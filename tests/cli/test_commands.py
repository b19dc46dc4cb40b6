"""Commands end to end: what they print, what they write, and that both agree."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcp_prune import __version__
from dcp_prune.eval import evaluate as evaluation_module
from dcp_prune.eval.evaluate import Answers, Evaluation
from dcp_prune.eval.specs import Method
from dcp_prune.models import supported_architectures
from dcp_prune.registry import list_pruners, make_pruner
from dcp_prune.testbed.world import TASKS

Run = Callable[..., Any]
SNAPSHOTS = Path(__file__).parent / "snapshots"
QUESTION = "what color is the clock ?"


def _matches(name: str, text: str) -> None:
    """Compares with a stored text; to renew it on purpose, delete the file and run the test twice."""
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    path = SNAPSHOTS / f"{name}.txt"
    if not path.exists():
        path.write_text(text)
        pytest.fail(f"{path.name} did not exist and was written; read it and run the test again")
    assert text == path.read_text()


@pytest.mark.parametrize(
    "command",
    [
        "",
        "demo",
        "run",
        "inspect",
        "list",
        "testbed",
        "testbed eval",
        "sweep",
        "report",
        "compare",
        "validate",
        "serve",
        "vllm-args",
        "completion",
    ],
)
def test_help_reads_as_it_did(dcp_prune: Run, command: str) -> None:
    outcome = dcp_prune(*command.split(), "--help")
    assert outcome.code == 0
    _matches(f"help-{command.replace(' ', '-') or 'all'}", outcome.out)


def test_the_version_names_what_decides_answers(dcp_prune: Run) -> None:
    outcome = dcp_prune("--version")
    assert outcome.code == 0
    names = ("torch", "transformers")
    assert outcome.out.startswith(f"dcp-prune {__version__} (")
    assert all(f"{name} {version(name)}" in outcome.out for name in names)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(("words", "completed"), [("insp", "inspect"), ("inspect --num", "--num-tokens")])
def test_bash_completes_commands_and_options(dcp_prune: Run, words: str, completed: str) -> None:
    Path("completion.sh").write_text(dcp_prune("completion", "bash").out)
    place = len(words.split())
    line = f"COMP_WORDS=(dcp-prune {words}); COMP_CWORD={place}; _dcp_prune; echo ${{COMPREPLY[@]}}"
    shown = subprocess.run(
        ["bash", "-c", f"source completion.sh; {line}"], check=True, capture_output=True, text=True
    ).stdout
    assert completed in shown.split()


def test_the_list_names_every_pruner_and_model_and_its_json_agrees(dcp_prune: Run) -> None:
    outcome = dcp_prune("list")
    listed = json.loads(dcp_prune("list", "--json").out)
    assert [row["name"] for row in listed["pruners"]] == list(list_pruners())
    assert {"testbed-weak", "LlavaForConditionalGeneration"} <= {row["name"] for row in listed["models"]}
    words = outcome.out.split()
    for row in listed["pruners"] + listed["models"]:
        assert row["name"] in words
        assert row["summary"].split()[0] in words


def test_the_matrix_of_models_is_drawn_from_the_flags_of_their_adapters(dcp_prune: Run) -> None:
    outcome = dcp_prune("list", "--models")
    rows = {row["name"]: row for row in json.loads(dcp_prune("list", "--models", "--json").out)["models"]}
    assert set(rows) == set(supported_architectures())
    lines = {line.split()[0]: line for line in outcome.out.splitlines() if line.strip()}
    for name, row in rows.items():
        assert row["saliency"] in lines[name]
        assert all(pruner in lines[name] for pruner in row["refused_pruners"])
    assert rows["LlavaNextForConditionalGeneration"]["tiles"]
    assert rows["VideoLlavaForConditionalGeneration"]["in_encoder"] == "yes"
    assert rows["LlavaOnevisionForConditionalGeneration"]["in_encoder"] == "images"
    assert not rows["PaliGemmaForConditionalGeneration"]["videos"]
    assert rows["PaliGemmaForConditionalGeneration"]["refused_pruners"]["flowcut"] == "its encoder has no [CLS] token"


def test_run_answers_and_writes_the_same_as_json(dcp_prune: Run, picture: Path) -> None:
    outcome = dcp_prune("run", "--image", picture, "--question", QUESTION, "--json", "run.json")
    assert outcome.code == 0
    result = json.loads(Path("run.json").read_text())
    assert outcome.out.startswith(result["answer"][:20])
    assert "16 of 576 visual tokens" in outcome.out
    assert result["num_tokens"] == len(result["indices"]) == 16
    assert result["num_original"] == len(result["assignment"]) == 576
    assert result["prefill_tokens"] < 40
    assert result["kappa"] > 0
    assert result["milliseconds"]["first_token"] > 0
    assert result["environment"]["packages"]["torch"]


def test_json_on_the_screen_is_all_there_is_on_the_screen(dcp_prune: Run, picture: Path) -> None:
    for form in (("--json",), ("--json", "-"), ("--json", "--max-new-tokens", "2")):
        outcome = dcp_prune("run", "--image", picture, "--question", QUESTION, "--pruner", "random", *form)
        assert json.loads(outcome.out)["pruner"] == "random"
    assert list(Path.cwd().iterdir()) == []


def test_a_pruner_that_cannot_do_without_the_question_finds_it_in_the_prompt(dcp_prune: Run, picture: Path) -> None:
    outcome = dcp_prune("run", "--image", picture, "--question", QUESTION, "--pruner", "mmtok", "--json", "run.json")
    assert outcome.code == 0, outcome.err
    other = dcp_prune(
        "run", "--image", picture, "--question", "how many dogs ?", "--pruner", "mmtok", "--json", "2.json"
    )
    assert other.code == 0
    kept = [json.loads(Path(name).read_text())["indices"] for name in ("run.json", "2.json")]
    assert len(kept[0]) == 16
    assert kept[0] != kept[1]


def test_run_without_a_pruner_reads_all_tokens(dcp_prune: Run, picture: Path) -> None:
    outcome = dcp_prune("run", "--image", picture, "--question", QUESTION, "--pruner", "none", "--json")
    result = json.loads(outcome.out)
    assert (result["num_tokens"], result["kappa"]) == (576, 0.0)


def test_a_share_of_the_tokens_can_be_asked_for(dcp_prune: Run, picture: Path) -> None:
    outcome = dcp_prune("run", "--image", picture, "--question", QUESTION, "--keep-ratio", "0.125", "--json")
    assert json.loads(outcome.out)["num_tokens"] == 72


def test_a_whole_prompt_gives_the_answer_of_its_question(dcp_prune: Run, picture: Path) -> None:
    asked = dcp_prune("run", "--image", picture, "--question", QUESTION, "--json")
    given = dcp_prune("run", "--image", picture, "--prompt", f"USER: <image> {QUESTION} ASSISTANT:", "--json")
    assert json.loads(given.out)["answer"] == json.loads(asked.out)["answer"]
    assert json.loads(given.out)["indices"] == json.loads(asked.out)["indices"]


def test_remarks_about_image_and_words_go_to_stderr(dcp_prune: Run, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    outcome = dcp_prune("run", "--image", "moving.gif", "--question", "is the zebra red ?", "--max-new-tokens", "1")
    assert outcome.code == 0
    assert "note: moving.gif holds 2 frames; only the first is used" in outcome.err
    assert "does not know zebra" in outcome.err


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])  # tests of images have the others
def test_every_kind_of_image_can_be_inspected(dcp_prune: Run, tmp_path: Path, mode: str) -> None:
    name = "kind.tiff"
    image = Image.effect_noise((40, 70), 60)
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / name)
    outcome = dcp_prune("inspect", "--image", name, "--question", QUESTION, "--max-new-tokens", "1")
    assert outcome.code == 0, outcome.err
    assert Image.open("kept.png").width > 1000


def test_inspect_draws_what_its_json_says(dcp_prune: Run, picture: Path) -> None:
    outcome = dcp_prune(
        "inspect", "--image", picture, "--question", QUESTION, "--output", "out.png", "--json", "out.json",
        "--max-new-tokens", "1", "--num-tokens", "8",
    )  # fmt: skip
    assert outcome.code == 0
    result = json.loads(Path("out.json").read_text())
    assert len(result["indices"]) == 8
    with Image.open("out.png") as drawn:
        drawn.load()
        page = np.asarray(drawn.convert("RGB")).astype(int)
    assert drawn.width == 4 * 384 + 5 * 20
    # The third panel: kept patches look like the first panel's, the others do not.
    top = next(y for y in range(60, 160) if (page[y, 20:400] != 255).any(axis=-1).mean() > 0.9)
    for index in range(0, 576, 7):
        y, x = top + 16 * (index // 24), 16 * (index % 24)
        first = page[y + 4 : y + 12, 20 + x + 4 : 20 + x + 12]
        third = page[y + 4 : y + 12, 828 + x + 4 : 828 + x + 12]
        assert np.array_equal(first, third) == (index in result["indices"])
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["out.json", "out.png"]


def test_demo_shows_every_method_and_its_picture(dcp_prune: Run) -> None:
    outcome = dcp_prune("demo", "--images", "2", "--json", "demo.json")
    assert outcome.code == 0
    result = json.loads(Path("demo.json").read_text())
    assert [m["method"] for m in result["methods"]] == ["all", "dcp", "random"]
    assert [m["visual_tokens"] for m in result["methods"]] == [576, 16, 16]
    assert len(result["questions"]) == 4
    for question in result["questions"]:
        assert question["text"] in outcome.out
        assert question["seed"] >= 1_000_000_000
    with Image.open("demo/kept.png") as sheet:
        sheet.load()
        assert sheet.width > 1000


def _fixed_evaluation(*_: Any, **__: Any) -> Evaluation:
    rng = np.random.default_rng(0)
    n = 14 * 20
    answers = []
    for name, tokens, share, kappa in (
        ("none", 0, 0.3, None),
        ("none", 576, 0.95, 0.0),
        ("dcp", 16, 0.9, 1.05),
        ("random", 16, 0.5, 0.15),
    ):
        pruner = None if name == "none" else make_pruner(name, num_tokens=tokens)
        right = rng.random(n) < share
        shift = None if kappa is None else np.full(n, kappa)
        kept = np.full(len(right), tokens)
        answers.append(Answers(Method(name, tokens, pruner), kept, right.astype(int), right, shift, 1.5))
    seeds = tuple(range(1_000_000_000, 1_000_000_020))
    task = np.array([task for task in TASKS for _ in range(2)] * 20)
    return Evaluation(seeds, "crowded", np.repeat(np.arange(20), 14), task, tuple(answers))


def test_the_evaluation_reads_as_it_did(dcp_prune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_module, "evaluate", _fixed_evaluation)
    outcome = dcp_prune("testbed", "eval", "--json", "out.json")
    _matches("testbed-eval", outcome.out)
    result = json.loads(Path("out.json").read_text())
    assert result["questions"]["split"] == "held-out"
    row = next(r for r in result["results"] if (r["pruner"], r["task"]) == ("dcp", "all"))
    assert set(row) >= {"pruner", "num_tokens", "task", "accuracy", "ci95", "n", "kappa"}
    assert f"{100 * row['accuracy']:.1f}" in outcome.out
    assert row["ci95"][0] < row["accuracy"] < row["ci95"][1]


def test_the_evaluation_runs_on_a_model(dcp_prune: Run) -> None:
    arguments = "--pruner dcp --pruner random --num-tokens 16 --num-tokens 0 --limit 15 --difficulty crowded"
    outcome = dcp_prune("testbed", "eval", *arguments.split(), "--json", "out.json")
    assert outcome.code == 0, outcome.err
    result = json.loads(Path("out.json").read_text())
    totals = {(r["pruner"], r["num_tokens"]): r for r in result["results"] if r["task"] == "all"}
    assert set(totals) == {("none", 0), ("dcp", 16), ("random", 16)}
    assert all(row["n"] == 15 for row in totals.values())
    assert totals["none", 0]["kappa"] is None
    assert result["questions"] == {
        "split": "held-out",
        "first_seed": 1_000_000_000,
        "last_seed": 1_000_000_001,
        "difficulty": "crowded",
        "images": 2,
        "questions": 15,
    }
    assert re.search(r"dcp - random at 16 tokens: [+-]\d", outcome.out)


def test_an_evaluation_that_fails_leaves_an_old_result_alone(dcp_prune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out.json").write_text("old")

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation_module, "evaluate", fail)
    outcome = dcp_prune("testbed", "eval", "--json", "out.json")
    assert outcome.code == 130
    assert Path("out.json").read_text() == "old"
    assert [path.name for path in Path.cwd().iterdir()] == ["out.json"]


def test_a_file_of_questions_is_answered_and_a_second_run_has_nothing_to_do(
    dcp_prune: Run, picture: Path, tmp_path: Path
) -> None:
    line = json.dumps({"image": str(picture), "question": "what is here ?"})
    (tmp_path / "questions.jsonl").write_text(f"{line}\n{{\n{line}\n")
    command = ("run", "--batch-file", "questions.jsonl", "--output", "answers.jsonl", "--max-new-tokens", "2")
    outcome = dcp_prune(*command)
    assert outcome.code == 0, outcome.err
    assert "2 new answers" in outcome.out
    assert "1 lines could not be asked; answers.jsonl.errors says why" in outcome.err
    assert [json.loads(row)["line"] for row in (tmp_path / "answers.jsonl").read_text().splitlines()] == [1, 3]
    assert "0 new answers" in dcp_prune(*command).out
    refused = dcp_prune(*command, "--num-tokens", "8")
    assert (refused.code, "belongs to a run with another pruner" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "give --image with a question, or --batch-file"),
        (("--batch-file", "q.jsonl"), "--batch-file needs --output"),
        (("--batch-file", "q.jsonl", "--output", "a.jsonl", "--question", "what ?"), "leave --image, --question"),
        (("--batch-file", "q.jsonl", "--output", "a.jsonl"), "q.jsonl cannot be read"),
        (("--image", "x.png", "--question", "what ?", "--output", "a.jsonl"), "--output is for the answers"),
    ],
)
def test_run_takes_one_question_or_a_file(dcp_prune: Run, arguments: Any, sentence: str) -> None:
    outcome = dcp_prune("run", *arguments)
    assert outcome.code == 2
    assert sentence in outcome.err


def test_the_app_names_a_taken_port_and_the_next_free_one(dcp_prune):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = dcp_prune("app", "--port", port)
    assert outcome.code == 2
    assert f"port {port} on 127.0.0.1 is taken; use --port " in outcome.err


def test_the_app_says_what_to_install(dcp_prune, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    outcome = dcp_prune("app", "--port", 17860)
    assert outcome.code == 2
    assert "pip install 'dcp-prune[app]'" in outcome.err
