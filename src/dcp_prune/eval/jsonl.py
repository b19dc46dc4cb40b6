"""Questions from a JSONL file, checked before any model is loaded, and the usual way of scoring free answers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dcp_prune.errors import InvalidInputError

_NUMBERS: dict[str, str] = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_ARTICLES = frozenset({"a", "an", "the"})


@dataclass(frozen=True)
class JsonlQuestion:
    """One line: {"id": ..., "image": ..., "question": ..., "answer": ..., "task": ...}.

    Attributes:
        line: its number, from 1.
        id: unique in the file.
        image: path of the picture; in the file relative to the file's folder.
        question: without an image placeholder.
        answers: any of them is right.
        task: the file's name where the line says nothing.
    """

    line: int
    id: str
    image: Path
    question: str
    answers: tuple[str, ...]
    task: str


def read_questions(path: str | Path) -> tuple[JsonlQuestion, ...]:
    """All questions of a JSONL file, in order; empty lines are skipped.

    Raises:
        InvalidInputError: with the number of the line: no JSON, a field that is missing or of a wrong type, an id that
            came before, an image that is missing or none; a task in which no question has an answer; or no question.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidInputError(f"{path} cannot be read: {reason}; give a JSONL file of questions") from None
    found: dict[str, JsonlQuestion] = {}
    opened: set[Path] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        question = _read_line(path, number, line)
        if question.id in found:
            raise InvalidInputError(
                f"{path}, line {number}: the id {question.id!r} came before, in line {found[question.id].line}; "
                "give every question its own id"
            )
        if question.image not in opened:
            _check_image(path, number, question.image)
            opened.add(question.image)
        found[question.id] = question
    if not found:
        raise InvalidInputError(f'{path} holds no question; write one JSON object per line, like {{"id": "1", ...}}')
    _check_tasks(path, tuple(found.values()))
    return tuple(found.values())


def open_image(question: JsonlQuestion) -> Image.Image:
    """The question's picture, RGB.

    Raises:
        InvalidInputError: it cannot be read.
    """
    from dcp_prune.images import load_image

    try:
        return load_image(question.image).image
    except InvalidInputError as error:
        raise InvalidInputError(f"line {question.line}: {error}") from None


def normalised(answer: str) -> str:
    """An answer as VQA benchmarks compare it: lower case, without punctuation and articles, small numbers as digits.

    An answer of nothing but articles keeps them ("a" may be the letter of a choice).
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", answer.lower()).replace("'", "").replace("\u2019", "")
    words = re.sub(r"(?<!\d)[.:]|[.:](?!\d)|[^\w\s.:]|_", " ", text).split()
    kept = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_NUMBERS.get(word, word) for word in kept)


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 if the answer equals any of the truths, both `normalised`, else 0."""
    return float(normalised(answer) in {normalised(truth) for truth in truths})


def _read_line(path: Path, number: int, line: str) -> JsonlQuestion:
    where = f"{path}, line {number}"
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise InvalidInputError(f"{where} is no valid JSON ({error}); write one object per line") from None
    if not isinstance(entry, dict):
        raise InvalidInputError(
            f"{where} holds a {type(entry).__name__}, not an object with id, image, question, answer"
        )
    if isinstance(entry.get("id"), int) and not isinstance(entry["id"], bool):
        entry["id"] = str(entry["id"])  # most benchmarks number their questions
    for field in ("id", "image", "question"):
        _require(where, entry, field, str, "a text")
        if not entry[field].strip():
            raise InvalidInputError(f"{where}: {field} is empty")
    _require(where, entry, "answer", str | list, "a text or a list of texts")
    answers: list[Any] = [entry["answer"]] if isinstance(entry["answer"], str) else entry["answer"]
    if not all(isinstance(answer, str) for answer in answers):
        raise InvalidInputError(f"{where}: answer must be a text or a list of texts, got {entry['answer']!r}")
    task = entry.get("task", path.stem)
    _require(where, {"task": task}, "task", str, "a text")
    return JsonlQuestion(
        number, str(entry["id"]), path.parent / entry["image"], entry["question"], tuple(answers), task
    )


def _require(where: str, entry: dict[str, Any], field: str, kind: Any, name: str) -> None:
    if field not in entry:
        raise InvalidInputError(f"{where} has no {field}; it must be {name}")
    if not isinstance(entry[field], kind):
        raise InvalidInputError(f"{where}: {field} must be {name}, got {entry[field]!r}")


def _check_image(path: Path, number: int, image: Path) -> None:
    if not image.is_file():
        raise InvalidInputError(
            f"{path}, line {number}: there is no image {image}; paths are relative to the folder of the JSONL file"
        )
    try:
        Image.open(image).close()  # reads the header only
    except OSError:
        raise InvalidInputError(f"{path}, line {number}: {image} is no image that can be read") from None


def _check_tasks(path: Path, questions: Sequence[JsonlQuestion]) -> None:
    for task in dict.fromkeys(question.task for question in questions):
        of_task = [question for question in questions if question.task == task]
        if not any(answer.strip() for question in of_task for answer in question.answers):
            raise InvalidInputError(
                f"{path}: no question of the task {task!r} has an answer (first in line {of_task[0].line}), so nobody "
                "could be right; fill in the answers or leave the task out"
            )
