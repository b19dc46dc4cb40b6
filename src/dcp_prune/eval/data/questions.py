"""What a sweep needs of its questions: blocks of them, and a model that answers a block."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcp_prune.eval.specs import Method

if TYPE_CHECKING:
    import polars as pl

    from dcp_prune.assistant import Assistant
    from dcp_prune.eval.asking.runner import Answered, Question


@dataclass(frozen=True)
class Block:
    """Questions that are answered together.

    Attributes:
        number: position among the blocks of its set.
        items: positions in the set of what is loaded for it.
        questions: ids of its questions, in order.
    """

    number: int
    items: range
    questions: tuple[str, ...]


class QuestionSet(ABC):
    """Questions and the name of the model that answers them. Picklable; `open` loads the model, once per process."""

    max_new_tokens: int | None = None
    """Where an answer is cut off; None if its first token is the answer."""

    @abstractmethod
    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The manifest's `model` and `source`; equal descriptions mean equal questions in equal order."""

    @property
    @abstractmethod
    def blocks(self) -> tuple[Block, ...]:
        """All questions, in order."""

    def check(self, methods: Sequence[Method]) -> None:  # noqa: B027  # most questions serve every method
        """Refuses methods that these questions cannot serve.

        Raises:
            InvalidInputError: in one sentence.
        """

    def load(self) -> Assistant:
        """The model."""
        raise NotImplementedError

    def pose(self, block: Block, assistant: Assistant, *, wrong: bool) -> tuple[list[Any], list[Question]]:
        """The images of a block, RGB, and its questions; with those of another image if `wrong`."""
        raise NotImplementedError

    def score(self, answer: str, truths: Sequence[str]) -> float:
        """What an answer is worth, 0 to 1."""
        raise NotImplementedError

    def open(self, distances: Sequence[str]) -> Session:
        """Loads the model."""
        return _ModelSession(self, self.load(), distances)


class Session(ABC):
    """A loaded model that answers blocks."""

    @abstractmethod
    def answer(self, block: Block, methods: Sequence[Method]) -> pl.DataFrame:
        """One row per method and question, methods in order, as in `records.SCHEMA`."""


class _ModelSession(Session):
    def __init__(self, questions: QuestionSet, assistant: Assistant, distances: Sequence[str]) -> None:
        self.questions = questions
        self.assistant = assistant
        self.distances = distances

    def answer(self, block: Block, methods: Sequence[Method]) -> pl.DataFrame:
        from dcp_prune.eval.asking.runner import Runner

        wrong = any(method.text.kind == "wrong" for method in methods)
        images, questions = self.questions.pose(block, self.assistant, wrong=wrong)
        runner = Runner(
            self.assistant.model,
            self.assistant.processor,
            methods,
            distances=self.distances,
            max_new_tokens=self.questions.max_new_tokens,
        )
        return _rows(questions, runner.run(images, questions), self.questions.score)


def _rows(
    questions: Sequence[Question], answered: Iterable[Answered], score: Callable[[str, Sequence[str]], float]
) -> pl.DataFrame:
    import polars as pl  # of the extra `eval`, without which questions can be asked all the same

    frames = []
    for each in answered:
        method, q = each.method, len(questions)
        scores = [score(answer, own.truths) for answer, own in zip(each.answers, questions, strict=True)]
        frames.append(
            pl.DataFrame(
                {
                    "method": [method.name] * q,
                    "pruner": [method.registered or method.name] * q,
                    "num_tokens": pl.Series(
                        [each.num_tokens if method.num_tokens is None else method.num_tokens] * q, dtype=pl.Int32
                    ),
                    "kept": pl.Series(each.kept, dtype=pl.Int32),
                    "text": [str(method.text)] * q,
                    "image": [own.picture for own in questions],
                    "question": [own.key for own in questions],
                    "task": [own.task for own in questions],
                    "truth": [" | ".join(own.truths) for own in questions],
                    "answer": each.answers,
                    "score": pl.Series(scores, dtype=pl.Float32),
                    "kappa": pl.Series([None] * q if each.kappa is None else each.kappa, dtype=pl.Float32),
                    **{name: pl.Series(values, dtype=pl.Float32) for name, values in each.distances.items()},
                }
            )
        )
    return pl.concat(frames, how="diagonal")


def load_quietly(model: str) -> Assistant:
    """A model without the progress bars of transformers: several processes load it, and the sweep has its own bar."""
    from transformers.utils import logging

    from dcp_prune.assistant import Assistant

    logging.disable_progress_bar()
    return Assistant.load(model)


def describe_model(name: str) -> dict[str, Any]:
    """The manifest's `model`: its name and, where the weights lie on this machine, their SHA-256."""
    from dcp_prune.assistant import TESTBED_MODELS
    from dcp_prune.testbed.load import checkpoint_path

    folder = checkpoint_path(TESTBED_MODELS[name]) if name in TESTBED_MODELS else Path(name).expanduser()
    return {"name": name, "sha256": weights_sha256(folder) if folder.is_dir() else None}


def weights_sha256(folder: Path) -> str:
    """Of a model's weight files, names and contents."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
