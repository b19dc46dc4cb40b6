"""Questions of a JSONL file for any supported model, checked before the model is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from dcp_prune.assistant import Assistant
from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.asking.runner import Question
from dcp_prune.eval.data.files import AnsweredLine, check_image, json_lines
from dcp_prune.eval.data.questions import Block, QuestionSet, describe_model, load_quietly
from dcp_prune.eval.data.scoring import exact_match
from dcp_prune.eval.specs import Method


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
    found: dict[str, JsonlQuestion] = {}
    opened: set[Path] = set()
    for number, line in json_lines(path, AnsweredLine):
        place = f"{path}, line {number}"
        answers = (line.answer,) if isinstance(line.answer, str) else tuple(line.answer)
        image = path.parent / line.image
        question = JsonlQuestion(number, str(line.id), image, line.question, answers, line.task or path.stem)
        if question.id in found:
            raise InvalidInputError(
                f"{place}: the id {question.id!r} came before, in line {found[question.id].line}; "
                "give every question its own id"
            )
        if image not in opened:
            check_image(image, place, path.parent)
            opened.add(image)
        found[question.id] = question
    _check_tasks(path, tuple(found.values()))
    return tuple(found.values())


@dataclass(frozen=True)
class JsonlQuestions(QuestionSet):
    """Questions of a JSONL file for any supported model; answers are generated and compared after normalisation.

    Attributes:
        model: a testbed model's name, a folder, or a hub name.
        path: of the file.
        questions: from `read_questions`, those that are asked.
        batch_size: questions that are answered at once.
        max_new_tokens: where an answer is cut off at the latest; None takes its first token.

    Raises:
        InvalidInputError: no question is left, or a number below 1.
    """

    model: str
    path: Path
    questions: tuple[JsonlQuestion, ...]
    batch_size: int = 8
    max_new_tokens: int | None = 16

    def __post_init__(self) -> None:
        if not self.questions:
            raise InvalidInputError(f"no question of {self.path} is left; ask for tasks that it holds")
        for name, value in (("batch_size", self.batch_size), ("max_new_tokens", self.max_new_tokens)):
            if value is not None and value < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {value}")

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        asked = "\n".join(repr((q.id, q.question, q.answers, q.task)) for q in self.questions)
        return describe_model(self.model), {
            "kind": "jsonl",
            "path": str(self.path),
            "sha256": hashlib.sha256(asked.encode()).hexdigest(),
            "images": len(self._by_image),
            "questions": len(self.questions),
            "tasks": list(dict.fromkeys(question.task for question in self.questions)),
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
        }

    @cached_property
    def blocks(self) -> tuple[Block, ...]:  # type: ignore[override]
        starts = range(0, len(self.questions), self.batch_size)
        return tuple(
            Block(number, items, tuple(self.questions[i].id for i in items))
            for number, start in enumerate(starts)
            for items in (range(start, min(start + self.batch_size, len(self.questions))),)
        )

    def check(self, methods: Sequence[Method]) -> None:
        """The condition `wrong` needs a second image."""
        if len(self._by_image) < 2:
            for method in methods:
                if method.text.kind == "wrong":
                    raise InvalidInputError(
                        f"{method.name}: all questions of {self.path} are about one image, so none is about another; "
                        "leave out @wrong"
                    )

    def load(self) -> Assistant:
        return load_quietly(self.model)

    def pose(self, block: Block, assistant: Assistant, *, wrong: bool) -> tuple[list[Any], list[Question]]:
        own = [self.questions[i] for i in block.items]
        first = {question.image: question for question in reversed(own)}
        pictures = list(dict.fromkeys(question.image for question in own))
        asked = [
            Question(
                key=question.id,
                image=pictures.index(question.image),
                text=question.question,
                prompt=assistant.prompt(question.question),
                wrong=self.wrong(question) if wrong else None,
                picture=os.path.relpath(question.image, self.path.parent),
                task=question.task,
                truths=question.answers,
            )
            for question in own
        ]
        return [open_image(first[picture]) for picture in pictures], asked

    def score(self, answer: str, truths: Sequence[str]) -> float:
        return exact_match(answer, truths)

    @cached_property
    def _by_image(self) -> dict[Path, list[JsonlQuestion]]:
        found: dict[Path, list[JsonlQuestion]] = {}
        for question in self.questions:
            found.setdefault(question.image, []).append(question)
        return found

    def wrong(self, question: JsonlQuestion) -> str | None:
        """The question of the same slot of the next image in the file; None if there is no other image."""
        images = list(self._by_image)
        if len(images) < 2:
            return None
        slot = self._by_image[question.image].index(question)
        other = self._by_image[images[(images.index(question.image) + 1) % len(images)]]
        return other[slot % len(other)].question


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


def _check_tasks(path: Path, questions: Sequence[JsonlQuestion]) -> None:
    for task in dict.fromkeys(question.task for question in questions):
        of_task = [question for question in questions if question.task == task]
        if not any(answer.strip() for question in of_task for answer in question.answers):
            raise InvalidInputError(
                f"{path}: no question of the task {task!r} has an answer (first in line {of_task[0].line}), so nobody "
                "could be right; fill in the answers or leave the task out"
            )
