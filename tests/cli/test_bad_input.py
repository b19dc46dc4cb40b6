"""Whatever cannot be done is refused with one sentence, exit code 2, and nothing written."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dcp_prune.testbed.world import make_scene

Run = Callable[..., Any]
ASK = ("--question", "is there a cat in the picture ?")


def _refused(outcome: Any, cause: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    sentences = [line for line in outcome.err.splitlines() if line.strip()]
    assert len(sentences) == 1, outcome.err
    assert sentences[0].startswith("error: ")
    assert cause in sentences[0]
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--num-tokens", "0"), "at least 1"),
        (("--num-tokens", "-3"), "at least 1"),
        (("--num-tokens", "1.5"), "whole number"),
        (("--num-tokens", "many"), "whole number"),
        (("--num-tokens", "16", "--keep-ratio", "0.1"), "not both"),
        (("--keep-ratio", "0"), "(0, 1]"),
        (("--keep-ratio", "1.5"), "(0, 1]"),
        (("--pruner", "dpc"), "did you mean dcp"),
        (("--pruner", "cdpruner"), "CDPruner needs clip_similarity, which LlavaForConditionalGeneration does not give"),
        (("--model", "/no/such/model"), "/no/such/model"),
        (("--model", "nosuchmodel"), "nosuchmodel"),
        (("--model", "."), "config.json"),
        (("--json", "missing/out.json"), "does not exist"),
        (("--json", "."), "folder"),
        (("--max-new-tokens", "0"), "at least 1"),
        (("--colour", "red"), "--colour"),
    ],
)
@pytest.mark.parametrize("command", ["run", "inspect"])
def test_bad_options_are_refused(
    dcp_prune: Run, picture: Path, command: str, arguments: tuple[str, ...], cause: str
) -> None:
    _refused(dcp_prune(command, "--image", picture, *ASK, *arguments), cause)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ((), "either --question or --prompt"),
        ((*ASK, "--prompt", "USER: <image> hello"), "either --question or --prompt"),
        (("--question", ""), "question is empty"),
        (("--question", "   "), "question is empty"),
        (("--question", "what is <image> ?"), "more <image> than images"),
        (("--question", "a" * 60_000), "--question has 60,000 characters; 50,000 are the most"),
        (("--prompt", "<image>" + "a" * 60_000), "--prompt has 60,007 characters"),
        (("--question", "cat " * 5_000), "more than the 2,048 that testbed reads"),
        ((*ASK, "--max-new-tokens", "1000000000"), "1,000,000,000 new ones are asked for"),
        (("--prompt", "USER: what color is the cat ? ASSISTANT:"), "holds no <image>"),
        (("--prompt", "USER: <image> <image> what ? ASSISTANT:"), "holds 2 <image> but 1 image"),
    ],
)
@pytest.mark.parametrize("command", ["run", "inspect"])
def test_bad_questions_are_refused(
    dcp_prune: Run, picture: Path, command: str, arguments: tuple[str, ...], cause: str
) -> None:
    _refused(dcp_prune(command, "--image", picture, *arguments), cause)


def test_bad_images_are_refused(dcp_prune: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.png").write_text("no picture")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.effect_noise((64, 64), 50).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:900])
    causes = (("text", "not an image"), ("dot", "1 x 1"), ("cut", "truncated"), ("gone", "does not exist"))
    for name, cause in causes:
        _refused(dcp_prune("run", "--image", folder / f"{name}.png", *ASK), cause)
        _refused(dcp_prune("inspect", "--image", folder / f"{name}.png", *ASK), cause)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--seed-range", "5"), "A:B"),
        (("--seed-range", "a:b"), "A:B"),
        (("--seed-range", "9:5"), "A:B"),
        (("--seed-range", "999999999:1000000002"), "tuning"),
        (("--seed-range", "5000000000:5000000002"), "no split"),
        (("--limit", "0"), "at least 1"),
        (("--limit", "1e3"), "whole number"),
        (("--num-tokens", "-1"), "at least 1"),
        (("--num-tokens", "2.5"), "whole number"),
        (("--pruner", "rndom"), "did you mean random"),
        (("--difficulty", "hard"), "crowded"),
        (("--checkpoint", "strong"), "strong"),
        (("--json", "missing/out.json"), "does not exist"),
    ],
)
def test_bad_evaluations_are_refused(dcp_prune: Run, arguments: tuple[str, ...], cause: str) -> None:
    _refused(dcp_prune("testbed", "eval", *arguments), cause)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("demo", "--output", "missing/kept.png"), "does not exist"),
        (("demo", "--output", "."), "folder"),
        (("demo", "--images", "0"), "at least 1"),
        (("demo", "--num-tokens", "0"), "at least 1"),
        (("demo", "--json", "missing/out.json"), "does not exist"),
        (("list", "--json", "missing/out.json"), "does not exist"),
        (("lsit",), "list"),
        (("testbed", "evaluate"), "evaluate"),
        (("run", *ASK), "--image"),
        (("serve", "--port", "99999"), "ports go from 0 to 65535"),
        (("serve", "--port", "http"), "whole number"),
        (("serve", "--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid"),
        (("serve", "--pruner", "dpc"), "did you mean dcp"),
        (("serve", "--num-tokens", "0"), "at least 1"),
        (("serve", "/no/such/model", "--port", "0"), "/no/such/model"),
        (("serve", "--port", "0", "--pruner", "cdpruner"), "CDPruner needs clip_similarity"),
    ],
)
def test_other_bad_commands_are_refused(dcp_prune: Run, arguments: tuple[str, ...], cause: str) -> None:
    _refused(dcp_prune(*arguments), cause)


@pytest.mark.parametrize("output", ["missing/kept.png", "."])
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    dcp_prune: Run, picture: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(name: str) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("dcp_prune.cli.ask.load_assistant", never)
    _refused(dcp_prune("inspect", "--image", picture, *ASK, "--output", output), "cannot write")
    _refused(dcp_prune("run", "--image", picture, *ASK, "--json", output), "cannot write")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str) -> None:
        raise AssertionError("the model was loaded")

    for command in ("ask", "compare", "serve"):
        monkeypatch.setattr(f"dcp_prune.cli.{command}.load_assistant", never)


@pytest.mark.parametrize(
    "command",
    [
        "run --image gone.png --question x",
        "run --image {picture}",
        "inspect --image {picture}",
        "inspect --image gone.png --question x",
        "compare --images gone --questions {picture}",
        "compare --images . --questions gone.txt",
        "sweep --output r --model testbed --questions gone.jsonl",
        "serve --port {port}",
        "serve --port 99999",
    ],
)
def test_what_is_wrong_at_first_sight_is_said_before_anything_heavy_is_loaded(
    picture: Path, tmp_path: Path, command: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = command.format(picture=picture, port=taken.getsockname()[1]).split()
        script = (
            "import sys\n"
            "from dcp_prune.cli import main\n"
            "try: main(sys.argv[1:])\n"
            "finally: print([name for name in ('torch', 'transformers', 'polars') if name in sys.modules])"
        )
        command_line = [sys.executable, "-c", script, *words]
        found = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout.strip()) == (2, "[]"), found.stderr
    assert found.stderr.startswith("error: ")


def test_the_testbed_says_once_what_it_knows(dcp_prune: Run, picture: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.png"
    Image.fromarray(make_scene(1_000_000_000).image).save(own)
    assert "knows" not in dcp_prune("run", "--image", own, *ASK, "--max-new-tokens", "1").err
    for image, question, reason in (
        (own, "is there a zebra ?", "testbed does not know zebra, so"),
        (picture, ASK[1], "testbed has never seen pictures like these, so"),
        (picture, "is there a zebra ?", "testbed does not know zebra and has never seen pictures like these, so"),
    ):
        said = dcp_prune("run", "--image", image, "--question", question, "--max-new-tokens", "1").err
        assert said.count("it knows flat drawings of 24 things (cat, dog, fish, bird, ...) and a sign") == 1
        assert reason in said


@pytest.mark.usefixtures("no_model")
def test_an_output_over_an_input_is_refused_and_the_input_stays(
    dcp_prune: Run, picture: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("inputs")
    photo, questions = folder / "photo.png", folder / "questions.txt"
    photo.write_bytes(picture.read_bytes())
    questions.write_text("is there a cat in the picture ?\n")
    before = [photo.read_bytes(), questions.read_bytes()]
    compare = ("compare", "--images", folder, "--questions", questions, "--json")
    for command in (
        ("run", "--image", photo, *ASK, "--json", photo),
        ("inspect", "--image", photo, *ASK, "--output", photo),
        (*compare, questions),
        (*compare, photo),
    ):
        _refused(dcp_prune(*command), "which is read here")
    _refused(dcp_prune("inspect", "--image", photo, *ASK, "--output", "a", "--json", "a"), "they are one file")
    assert [photo.read_bytes(), questions.read_bytes()] == before


def test_a_file_that_is_replaced_is_named(dcp_prune: Run, picture: Path) -> None:
    command = ("run", "--image", picture, *ASK, "--json", "out.json")
    assert "replaced" not in dcp_prune(*command).err
    assert "note: out.json is there already and is replaced" in dcp_prune(*command).err


def test_code_that_comes_with_a_model_is_never_run_nor_asked_about(
    dcp_prune: Run, picture: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("mystery")
    ran = folder / "ran"
    (folder / "config.json").write_text(
        '{"model_type": "mystery", "architectures": ["Mystery"], "auto_map": {"AutoConfig": "mystery.Mystery"}}'
    )
    (folder / "mystery.py").write_text(
        f"from transformers import PretrainedConfig\nopen({str(ran)!r}, 'w')\nclass Mystery(PretrainedConfig): pass\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    _refused(dcp_prune("run", "--image", picture, *ASK, "--model", folder), "brings code of its own")
    assert not ran.exists()
