"""Where a sweep's questions come from: the testbed, or a JSONL file for any supported model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from dcp_prune.assistant import TESTBED_MODELS, Assistant
from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.jsonl import JsonlQuestion, exact_match, open_image
from dcp_prune.eval.methods import Method
from dcp_prune.eval.runner import Asked, Runner
from dcp_prune.eval.sweep import Block, Session, Source, rows_of, weights_sha256
from dcp_prune.eval.testbed import TestbedQuestions, answer_id, answer_scenes, split_name
from dcp_prune.testbed.load import checkpoint_path
from dcp_prune.testbed.tiles import with_tiles

IMAGES_PER_BLOCK = 4
"""Testbed images that are answered together: 56 questions, a few seconds for forty methods."""


@dataclass(frozen=True)
class TestbedSource(Source):
    """The testbed's own questions and a model that was trained on them; an answer is right or wrong.

    Attributes:
        checkpoint: `weak`, `aligned`, or the folder of a model trained on the testbed.
        questions: which ones.
        tiles: whether the model sees an overview and 2 x 2 tiles of each picture, as a LLaVA-NeXT.
    """

    checkpoint: str
    questions: TestbedQuestions
    tiles: bool = False

    __test__ = False  # the name begins like a test's

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        asked = self.questions
        return describe_model(self._model), {
            "kind": "testbed",
            "checkpoint": self.checkpoint,
            "difficulty": asked.difficulty,
            **({"tiles": True} if self.tiles else {}),
            "split": split_name(asked.seeds),
            "first_seed": asked.seeds[0],
            "last_seed": asked.seeds[asked.images - 1],
            "images": asked.images,
            "questions": asked.questions,
            "tasks": list(dict.fromkeys(task for _, task in asked.slots)),
        }

    @cached_property
    def blocks(self) -> tuple[Block, ...]:  # type: ignore[override]
        asked = self.questions
        return tuple(
            Block(
                number,
                images,
                tuple(f"{asked.seeds[i]}/{slot:02d}" for i in images for slot, _ in asked.of_image(i)),
            )
            for number, start in enumerate(range(0, asked.images, IMAGES_PER_BLOCK))
            for images in (range(start, min(start + IMAGES_PER_BLOCK, asked.images)),)
        )

    def check(self, methods: Sequence[Method]) -> None:
        """Every method is fine here: there is always another image with a question of the same slot."""

    def open(self, distances: Sequence[str]) -> Session:
        assistant = _load(self._model)
        if self.tiles:
            assistant = Assistant(self._model, *with_tiles(assistant.model, assistant.processor))
        return _TestbedSession(self.questions, assistant, distances)

    @property
    def _model(self) -> str:
        return f"testbed-{self.checkpoint}" if f"testbed-{self.checkpoint}" in TESTBED_MODELS else self.checkpoint


class _TestbedSession(Session):
    def __init__(self, questions: TestbedQuestions, assistant: Assistant, distances: Sequence[str]) -> None:
        self.questions = questions
        self.assistant = assistant
        self.distances = distances

    def answer(self, block: Block, methods: Sequence[Method]) -> pl.DataFrame:
        runner = Runner(self.assistant.model, self.assistant.processor, methods, distances=self.distances)
        questions, answered = answer_scenes(runner, self.questions, block.items)
        wanted = [answer_id(runner.tokenizer, question.answer) for question, _ in questions]
        keys = [asked.key for _, asked in questions]
        return rows_of(
            list(answered),
            images=[key.partition("/")[0] for key in keys],
            questions=keys,
            tasks=[question.task for question, _ in questions],
            truths=[question.answer for question, _ in questions],
            score=lambda each: (each.words == wanted).astype("float32"),
        )


@dataclass(frozen=True)
class JsonlSource(Source):
    """Questions of a JSONL file for any supported model; answers are generated and compared after normalisation.

    Attributes:
        model: a testbed model's name, a folder, or a hub name.
        path: of the file.
        questions: from `read_questions`, those that are asked.
        batch_size: questions that are answered at once.
        max_new_tokens: where an answer is cut off at the latest.

    Raises:
        InvalidInputError: no question is left, or a number below 1.
    """

    model: str
    path: Path
    questions: tuple[JsonlQuestion, ...]
    batch_size: int = 8
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        if not self.questions:
            raise InvalidInputError(f"no question of {self.path} is left; ask for tasks that it holds")
        for name, value in (("batch_size", self.batch_size), ("max_new_tokens", self.max_new_tokens)):
            if value < 1:
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

    def open(self, distances: Sequence[str]) -> Session:
        return _JsonlSession(self, _load(self.model), distances)

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


class _JsonlSession(Session):
    def __init__(self, source: JsonlSource, assistant: Assistant, distances: Sequence[str]) -> None:
        self.source = source
        self.assistant = assistant
        self.distances = distances

    def answer(self, block: Block, methods: Sequence[Method]) -> pl.DataFrame:
        source, assistant = self.source, self.assistant
        runner = Runner(
            assistant.model,
            assistant.processor,
            methods,
            distances=self.distances,
            max_new_tokens=source.max_new_tokens,
        )
        questions = [source.questions[i] for i in block.items]
        pictures = list(dict.fromkeys(question.image for question in questions))
        first = {question.image: question for question in reversed(questions)}
        wrong = any(method.text.kind == "wrong" for method in methods)
        asked = [
            Asked(
                key=question.id,
                image=pictures.index(question.image),
                text=question.question,
                prompt=assistant.prompt(question.question),
                wrong=source.wrong(question) if wrong else None,
            )
            for question in questions
        ]
        return rows_of(
            list(runner.run([open_image(first[picture]) for picture in pictures], asked)),
            images=[os.path.relpath(question.image, source.path.parent) for question in questions],
            questions=[question.id for question in questions],
            tasks=[question.task for question in questions],
            truths=[" | ".join(question.answers) for question in questions],
            score=lambda each: [
                exact_match(answer, question.answers) for answer, question in zip(each.answers, questions, strict=True)
            ],
        )


def _load(model: str) -> Assistant:
    from transformers.utils import logging

    logging.disable_progress_bar()  # several processes load it, and the sweep has a bar of its own
    return Assistant.load(model)


def describe_model(name: str) -> dict[str, Any]:
    """The manifest's `model`: its name and, where the weights lie on this machine, their SHA-256."""
    folder = checkpoint_path(TESTBED_MODELS[name]) if name in TESTBED_MODELS else Path(name).expanduser()
    return {"name": name, "sha256": weights_sha256(folder) if folder.is_dir() else None}
