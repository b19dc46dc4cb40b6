"""Questions of one's own: what is wrong with a file is said before a model is loaded, with the number of the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dcp_prune.assistant import Assistant
from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.data import jsonl as jsonl_module
from dcp_prune.eval.data.jsonl import JsonlQuestions, read_questions
from dcp_prune.eval.data.scoring import exact_match, normalised
from dcp_prune.eval.records import read_records
from dcp_prune.eval.specs import plan
from dcp_prune.eval.sweep import sweep
from dcp_prune.integrations.transformers import prune_inputs
from dcp_prune.registry import make_pruner


def make_image(seed: int) -> Image.Image:
    blocks = torch.randint(0, 256, (6, 6, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(blocks.repeat_interleave(14, 0).repeat_interleave(14, 1).numpy())


def _line(number: int, **changes: Any) -> dict[str, Any]:
    line = {"id": f"q{number}", "image": f"{number % 3}.png", "question": f"what is {'red blue'.split()[number % 2]}"}
    return {**line, "answer": ["red", "a dog"], "task": "colour" if number % 2 else "thing"} | changes


def _write(folder: Path, *lines: Any) -> Path:
    for seed in range(3):
        make_image(seed).save(folder / f"{seed}.png")
    path = folder / "mine.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_file_is_read_in_order(tmp_path: Path) -> None:
    bare = {"id": 7, "image": "1.png", "question": "what", "answer": "red"}
    questions = read_questions(_write(tmp_path, _line(0), "", bare))
    assert [(q.line, q.id, q.task) for q in questions] == [(1, "q0", "thing"), (3, "7", "mine")]
    assert questions[0].answers == ("red", "a dog")
    assert questions[1].answers == ("red",)
    assert questions[1].image == tmp_path / "1.png"


def test_marks_and_separators_of_unicode_end_no_line(tmp_path: Path) -> None:
    odd = json.dumps(_line(1, question="what\u2028is\x85this"), ensure_ascii=False)
    questions = read_questions(_write(tmp_path, "\ufeff" + json.dumps(_line(0)), "\ufeff" + odd))
    assert [(q.line, q.question) for q in questions] == [(1, "what is red"), (2, "what\u2028is\x85this")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"id": "a", ', "line 2 is not valid JSON"),
        ("[1, 2]", "line 2 holds a list"),
        (_line(1, image="none.png"), r"line 2: there is no image .*none\.png"),
        (_line(1, image="mine.jsonl"), "line 2: .*is not an image"),
        (_line(1, image="x" * 5000), r"line 2: there is no image .*xxx\.\.\."),
        (_line(1, image="a\0.png"), "line 2: there is no image"),
        (_line(1, image="\ud800.png"), "line 2 is not valid JSON"),
        ('{"id": ' + "[" * 100_000, "line 2 is not valid JSON"),
        (_line(1, question="x" * 60_000), "line 2: question has 60,000 characters"),
        (_line(1, image=""), "line 2: image is empty"),
        (_line(1, question=3), "line 2: question must be a text, got 3"),
        (_line(1, question=" "), "line 2: question is empty"),
        (_line(1, answer=3), "line 2: answer must be a text or a list of texts, got 3"),
        (_line(1, answer=["red", 3]), "line 2: answer must be"),
        (_line(1, task=None), "line 2: task must be a text, got None"),
        (_line(1, id=True), "line 2: id must be a text, got True"),
        ({"id": "b", "image": "0.png", "question": "what"}, "line 2 has no answer"),
        (_line(0), "line 2: the id 'q0' came before, in line 1"),
        (_line(1, answer=[]), r"no question of the task 'colour' has an answer \(first in line 2\)"),
        (_line(1, answer=["", " "]), "no question of the task 'colour' has an answer"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, line: Any, complaint: str) -> None:
    with pytest.raises(InvalidInputError, match=complaint):
        read_questions(_write(tmp_path, _line(0), line))


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="holds no question"):
        read_questions(_write(tmp_path, ""))
    with pytest.raises(InvalidInputError, match="cannot be read: No such file"):
        read_questions(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("The Dog.", "dog"),
        ("upper-left", "upper left"),
        ("a", "a"),
        ("1,000 cats!", "1000 cats"),
        ("3.5", "3.5"),
        ("at 10:30", "at 10:30"),
        ("Three", "3"),
        ("don't know", "dont know"),
        (" ", ""),
    ],
)
def test_answers_are_compared_without_case_punctuation_and_articles(answer: str, plain: str) -> None:
    assert normalised(answer) == plain


def test_any_of_the_right_answers_counts() -> None:
    assert exact_match("A dog", ["cat", "dog"]) == 1.0
    assert exact_match("dogs", ["cat", "dog"]) == 0.0


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, pristine_model: Any, processor: Any) -> Assistant:
    assistant = Assistant("toy", pristine_model, processor)
    monkeypatch.setattr(jsonl_module, "load_quietly", lambda name: assistant)
    return assistant


METHODS = plan(["none", "cls_attention", "mmtok", "dcp", "mmtok@none", "dcp@none", "mmtok@wrong"], [0, 4])


def test_a_sweep_gives_the_answers_that_single_questions_get(tmp_path: Path, loaded: Assistant) -> None:
    path = _write(tmp_path, *(_line(number) for number in range(5)))
    questions = read_questions(path)
    sweep(JsonlQuestions("toy", path, questions, batch_size=2, max_new_tokens=3), METHODS, tmp_path / "r")
    rows = read_records(tmp_path / "r").frame.to_dicts()
    assert len(rows) == 5 * len(METHODS)
    model, processor = loaded.model, loaded.processor
    other_of = (1, 2, 0, 4, 2)  # the same slot of the next image, which is 0, 1, 2, 0, 1 here
    for row in rows:
        question = next(q for q in questions if q.id == row["question"])
        other = questions[other_of[questions.index(question)]]
        prompt = loaded.prompt(question.question)
        images = None if row["num_tokens"] == 0 else make_image(int(question.image.stem))
        text = prompt if images else " ".join(prompt.replace("<image>", "").split())
        inputs: Any = processor(images=images, text=text, return_tensors="pt")  # type: ignore[operator]
        if row["pruner"] != "none":
            seen = {"question": question.question, "none": "", "wrong": other.question}[row["text"]]
            if row["text"] == "none" and row["pruner"] == "mmtok":
                continue  # without a text MMTok alone refuses; the sweep gives it one without words
            pruner = make_pruner(row["pruner"], num_tokens=4)
            inputs = prune_inputs(model, inputs, pruner, processor=processor, text=seen).inputs
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]  # type: ignore[operator]
        assert row["answer"] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip(), row  # type: ignore[attr-defined]
        assert row["score"] == exact_match(row["answer"], question.answers)
        assert row["truth"] == "red | a dog"
        assert (row["kappa"] is None) == (row["num_tokens"] == 0)


def test_the_model_and_the_file_are_in_the_manifest(tmp_path: Path, loaded: Assistant) -> None:
    path = _write(tmp_path, _line(0), _line(1))
    sweep(JsonlQuestions("toy", path, read_questions(path)), METHODS[:1], tmp_path / "r")
    manifest = read_records(tmp_path / "r").manifest
    assert manifest["model"] == {"name": "toy", "sha256": None}
    assert manifest["source"]["questions"] == 2
    assert manifest["source"]["tasks"] == ["thing", "colour"]


def test_another_images_question_needs_another_image(tmp_path: Path, loaded: Assistant) -> None:
    path = _write(tmp_path, _line(0), _line(3))
    with pytest.raises(InvalidInputError, match="about one image"):
        sweep(JsonlQuestions("toy", path, read_questions(path)), METHODS, tmp_path / "r")


def test_an_image_that_is_cut_short_is_named_with_its_line(tmp_path: Path, loaded: Assistant) -> None:
    path = _write(tmp_path, _line(0), _line(1))
    picture = tmp_path / "1.png"
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(InvalidInputError, match=r"line 2: .*1\.png"):
        sweep(JsonlQuestions("toy", path, read_questions(path)), METHODS[:1], tmp_path / "r")
