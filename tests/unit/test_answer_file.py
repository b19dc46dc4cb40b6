"""Files of questions: order, bad lines, and that nothing is lost or doubled when a run is killed.

Run as a script it answers the file in the folder that it is given, slowly.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dcp_prune.assistant import Assistant
from dcp_prune.errors import InvalidInputError
from dcp_prune.eval import answers
from dcp_prune.eval.answers import Answers, answer_file
from dcp_prune.pruners.dcp import DCPPruner

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_llava import build_model, build_processor, make_image

QUESTIONS = ("what is this", "where is the cat", "what is the colour of this dog here", "is there a dog")


def assistant() -> Assistant:
    return Assistant("tiny", build_model(), build_processor())


def run(folder: Path, **options: Any) -> Answers:
    settings: dict[str, Any] = {"model": "tiny", "max_new_tokens": 3, "batch_size": 2, **options}
    pruner = settings.pop("pruner", DCPPruner(num_tokens=4))
    load = settings.pop("load", assistant)
    return answer_file(folder / "questions.jsonl", folder / "answers.jsonl", load, pruner, **settings)


def write(folder: Path, lines: list[Any]) -> None:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(text)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        make_image(number).save(tmp_path / f"{number}.png")
    write(
        tmp_path,
        [{"id": n, "image": f"{n % 3}.png", "question": QUESTIONS[n % len(QUESTIONS)], "more": 1} for n in range(20)],
    )
    return tmp_path


def test_answers_stand_in_the_order_of_the_questions_and_are_those_of_a_question_asked_alone(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = run(folder, progress=lambda now, total: seen.append((now, total)))
    assert (done.questions, done.new, done.faults) == (20, 20, {})
    assert seen == [(0, 20), (8, 20), (16, 20), (20, 20)]
    found = rows(folder)
    assert [row["line"] for row in found] == list(range(1, 21))
    assert [row["id"] for row in found] == list(range(20))
    asker, pruner = assistant(), DCPPruner(num_tokens=4)
    for row in found[:5]:
        view = asker.look(make_image(row["id"] % 3), pruner)
        reply = asker.ask(view, asker.prompt(row["question"]), pruner, max_new_tokens=3)
        assert (row["answer"], row["num_tokens"]) == (reply.text, 4)
    assert not (folder / "answers.jsonl.errors").exists()


def test_prompts_that_run_together_have_one_length(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[str]] = []
    inner = answers.Runner.run

    def watch(self: Any, images: Any, questions: Any) -> Any:
        batches.append([each.prompt for each in questions])
        return inner(self, images, questions)

    monkeypatch.setattr(answers.Runner, "run", watch)
    run(folder)
    assert max(map(len, batches)) == 2
    assert all(len({len(prompt.split()) for prompt in batch}) == 1 for batch in batches)


def test_bad_lines_are_listed_by_their_numbers_and_the_others_answered(folder: Path) -> None:
    good = {"image": "0.png", "question": "what is this"}
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    write(
        folder,
        [good, "{", {"image": "0.png"}, "", {**good, "image": "no.png"}, {**good, "question": "<image> ?"}, good,
         {**good, "image": "broken.png"}, {**good, "question": "dog " * 600}],
    )  # fmt: skip
    done = run(folder)
    assert [row["line"] for row in rows(folder)] == [1, 7]
    lines = (folder / "answers.jsonl.errors").read_text().splitlines()
    assert [line.split()[1].rstrip(":") for line in lines] == ["2", "3", "5", "6", "8", "9"]
    assert set(done.faults) == {2, 3, 5, 6, 8, 9}
    assert "there is no image" in lines[2]
    assert "than the 512 that tiny reads" in lines[5]


def test_a_file_without_a_question_is_refused(folder: Path) -> None:
    write(folder, ["{", "[]"])
    with pytest.raises(InvalidInputError, match="has no line that can be asked"):
        run(folder)


def never() -> Assistant:
    raise AssertionError("nothing is left to ask")


def test_a_run_that_is_done_loads_no_model_and_changes_nothing(folder: Path) -> None:
    run(folder)
    before = (folder / "answers.jsonl").read_bytes()
    assert run(folder, load=never).new == 0
    assert (folder / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pruner": DCPPruner(num_tokens=5)}, "another pruner"),
        ({"model": "other"}, "another model"),
        ({"max_new_tokens": 4}, "another answer length"),
    ],
)
def test_the_output_of_another_run_is_refused_and_left_alone(folder: Path, change: Any, sentence: str) -> None:
    run(folder)
    before = (folder / "answers.jsonl").read_bytes()
    with pytest.raises(InvalidInputError, match=f"belongs to a run with {sentence}; give another --output"):
        run(folder, load=never, **change)
    write(folder, [{"image": "0.png", "question": "what"}])
    with pytest.raises(InvalidInputError, match="another file of questions"):
        run(folder, load=never)
    (folder / "answers.jsonl.run").unlink()
    with pytest.raises(InvalidInputError, match="was not written by such a run"):
        run(folder, load=never)
    assert (folder / "answers.jsonl").read_bytes() == before


def test_a_killed_run_goes_on_with_nothing_lost_or_doubled(folder: Path) -> None:
    whole = folder / "whole"
    whole.mkdir()
    for file in folder.glob("*.*"):
        (whole / file.name).write_bytes(file.read_bytes())
    run(whole)
    output = folder / "answers.jsonl"
    process = subprocess.Popen([sys.executable, __file__, str(folder)])
    deadline = time.monotonic() + 120
    while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = output.read_bytes()
    assert 0 < kept.count(b"\n") < 20
    with output.open("ab") as file:
        file.write(b'{"line": 19, "ans')  # what a kill in the middle of a write leaves
    done = run(folder)
    assert done.new == 20 - kept.count(b"\n")
    assert output.read_bytes() == (whole / "answers.jsonl").read_bytes()


def test_two_runs_do_not_write_one_file(folder: Path) -> None:
    def load() -> Assistant:
        with pytest.raises(InvalidInputError, match="another run writes"):
            run(folder)
        return assistant()

    assert run(folder, load=load).new == 20


if __name__ == "__main__":
    inner = answers._Output.add

    def slowly(self: Any, found: Any) -> None:
        inner(self, found)
        time.sleep(0.5)

    answers._Output.add = slowly  # type: ignore[method-assign]
    os.environ["OMP_NUM_THREADS"] = "1"
    run(Path(sys.argv[1]))
