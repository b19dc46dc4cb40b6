"""Where a sweep's questions come from: the testbed, or a JSONL file for any supported model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from dcp_prune.assistant import TESTBED_MODELS, Assistant
from dcp_prune.eval.methods import Method
from dcp_prune.eval.runner import Runner
from dcp_prune.eval.sweep import Block, Session, Source, rows_of, weights_sha256
from dcp_prune.eval.testbed import TestbedQuestions, answer_id, answer_scenes, split_name
from dcp_prune.testbed.load import checkpoint_path

IMAGES_PER_BLOCK = 4
"""Testbed images that are answered together: 56 questions, a few seconds for forty methods."""


@dataclass(frozen=True)
class TestbedSource(Source):
    """The testbed's own questions and a model that was trained on them; an answer is right or wrong.

    Attributes:
        checkpoint: `weak`, `aligned`, or the folder of a model trained on the testbed.
        questions: which ones.
    """

    checkpoint: str
    questions: TestbedQuestions

    __test__ = False  # the name begins like a test's

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        asked = self.questions
        return describe_model(self._model), {
            "kind": "testbed",
            "checkpoint": self.checkpoint,
            "difficulty": asked.difficulty,
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
        return _TestbedSession(self.questions, _load(self._model), distances)

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
        questions, answered = answer_scenes(runner, self.questions, block.images)
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


def _load(model: str) -> Assistant:
    from transformers.utils import logging

    logging.disable_progress_bar()  # several processes load it, and the sweep has a bar of its own
    return Assistant.load(model)


def describe_model(name: str) -> dict[str, Any]:
    """The manifest's `model`: its name and, where the weights lie on this machine, their SHA-256."""
    folder = checkpoint_path(TESTBED_MODELS[name]) if name in TESTBED_MODELS else Path(name).expanduser()
    return {"name": name, "sha256": weights_sha256(folder) if folder.is_dir() else None}
