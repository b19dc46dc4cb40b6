"""Pruners on the testbed's questions: every method answers the very same questions in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedModel, ProcessorMixin

from dcp_prune.assistant import Assistant
from dcp_prune.eval.asking.runner import Answered, Question, Runner
from dcp_prune.eval.data.testbed import TestbedQuestions, split_name
from dcp_prune.eval.specs import ALL_TOKENS, Method
from dcp_prune.eval.statistics.intervals import Estimate, accuracy, paired_difference
from dcp_prune.testbed.load import DEFAULT_CHECKPOINT
from dcp_prune.testbed.worlds import FIRST


@dataclass(frozen=True)
class Answers:
    """What one method answered.

    Attributes:
        method: who.
        kept: visual tokens that the language model read, by question. `q`.
        words: ids of the first new token, by question. `q`.
        correct: whether that is the answer, by question. `q`.
        kappa: shift of the features that reached the language model against those of an unpruned encoder pass, by
            question; None without an image. `q`.
        seconds: spent on its own selection and prefill, and on the encoder pass that it used, which others may share.
    """

    method: Method
    kept: Int[np.ndarray, "q"]
    words: Int[np.ndarray, "q"]
    correct: Bool[np.ndarray, "q"]
    kappa: Float[np.ndarray, "q"] | None
    seconds: float

    @property
    def num_tokens(self) -> float:
        """Visual tokens of a question: a whole number where all have the same, else their mean."""
        return int(self.kept[0]) if (self.kept == self.kept[0]).all() else float(self.kept.mean())


@dataclass(frozen=True)
class Evaluation:
    """The answers of all methods to the same questions.

    Attributes:
        seeds: of the scenes, ascending.
        difficulty: of the scenes.
        image: position in `seeds` of each question's image. `q`.
        task: of each question. `q`.
        answers: by method.
    """

    seeds: tuple[int, ...]
    difficulty: str
    image: Int[np.ndarray, "q"]
    task: np.ndarray
    answers: tuple[Answers, ...]


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    methods: Sequence[Method],
    seeds: range,
    limit: int,
    *,
    difficulty: str = "standard",
    grid: int = FIRST.grid,
    checkpoint: str = DEFAULT_CHECKPOINT,
    images_at_once: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Lets every method answer the first `limit` questions of these seeds' scenes.

    Args:
        model: a LLaVA that knows the testbed's words, in evaluation mode.
        processor: its processor.
        methods: from `plan`.
        seeds: of the scenes; all in one split.
        limit: questions; fewer if the seeds do not give as many.
        difficulty: of the scenes.
        grid: patches per side of the pictures.
        checkpoint: what the model was loaded from; it says which world it knows.
        images_at_once: images whose questions form one batch.
        progress: called with the questions done and the questions in all.

    Raises:
        InvalidInputError: no seed, no question, seeds of several splits, or an answer that is not one token.
    """
    source = TestbedQuestions(seeds, difficulty, limit, grid=grid, checkpoint=checkpoint)
    runner = Runner(model, processor, methods)
    assistant = Assistant("", model, processor)
    wrong = any(method.text.kind == "wrong" for method in methods)
    collected: list[list[Answered]] = [[] for _ in methods]
    asked: list[Question] = []
    progress(0, source.questions)
    for number, start in enumerate(range(0, source.images, images_at_once)):
        images, questions = source.pose(source.block(number, start, images_at_once), assistant, wrong=wrong)
        for own, answered in zip(collected, runner.run(images, questions), strict=True):
            own.append(answered)
        asked.extend(questions)
        progress(len(asked), source.questions)
    truths = np.array([question.truths[0] for question in asked])
    pictures = {picture: place for place, picture in enumerate(dict.fromkeys(each.picture for each in asked))}
    answers = tuple(
        Answers(
            method,
            np.concatenate([each.kept for each in own]),
            np.concatenate([each.words for each in own]),
            np.concatenate([each.answers for each in own]) == truths,
            None if own[0].kappa is None else np.concatenate([each.kappa for each in own]),  # type: ignore[misc]
            sum(each.seconds for each in own),
        )
        for method, own in zip(methods, collected, strict=True)
    )
    image, task = np.array([pictures[each.picture] for each in asked]), np.array([each.task for each in asked])
    return Evaluation(tuple(seeds[: source.images]), difficulty, image, task, answers)


def summarise(evaluation: Evaluation) -> dict[str, Any]:
    """The result file's content but for the environment: one row per method and task, and all paired differences.

    `results` holds accuracy and mean kappa per task, `all` for the total, with 95 % intervals clustered by image, and
    the `relative_score`, the share of the unpruned model's accuracy, if that took part (`all`: mean over the tasks, as
    in the paper). `paired` holds, for each budget, the first pruner's lead over each other one; `methods` the
    settings and seconds of each.
    """
    tasks = [str(task) for task in dict.fromkeys(evaluation.task)]
    full = next((a for a in evaluation.answers if a.method.name == ALL_TOKENS and a.num_tokens > 0), None)
    first = next((a.method.name for a in evaluation.answers if a.method.pruner is not None), None)
    return {
        "results": [row for answers in evaluation.answers for row in _rows(evaluation, answers, full, tasks)],
        "paired": [
            {
                "pruner": a.method.name,
                "against": b.method.name,
                "num_tokens": a.num_tokens,
                "task": task,
                "difference": estimate.mean,
                "ci95": [estimate.low, estimate.high],
                "n": estimate.n,
            }
            for a, b in combinations(evaluation.answers, 2)
            if a.method.name == first and a.num_tokens == b.num_tokens and b.method.pruner is not None
            for task in ("all", *tasks)
            for estimate in (_difference(evaluation, a, b, task),)
        ],
        "methods": [
            {
                "pruner": a.method.name,
                "num_tokens": a.num_tokens,
                "options": a.method.options,
                "seconds": a.seconds,
            }
            for a in evaluation.answers
        ],
        "questions": {
            "split": split_name(evaluation.seeds),
            "first_seed": evaluation.seeds[0],
            "last_seed": evaluation.seeds[-1],
            "difficulty": evaluation.difficulty,
            "images": len(evaluation.seeds),
            "questions": len(evaluation.task),
        },
    }


def _rows(
    evaluation: Evaluation, answers: Answers, full: Answers | None, tasks: Sequence[str]
) -> Iterator[dict[str, Any]]:
    def share(of: Answers, task: str) -> float:
        return float(of.correct[evaluation.task == task].mean())

    relative = {task: share(answers, task) / share(full, task) for task in tasks if full and share(full, task) > 0}
    for task in ("all", *tasks):
        asked = np.ones(len(evaluation.task), dtype=bool) if task == "all" else evaluation.task == task
        estimate = accuracy(answers.correct[asked], evaluation.image[asked])
        score = float(np.mean(list(relative.values()))) if relative and task == "all" else relative.get(task)
        yield {
            "pruner": answers.method.name,
            "num_tokens": answers.num_tokens,
            "task": task,
            "accuracy": estimate.mean,
            "ci95": [estimate.low, estimate.high],
            "n": estimate.n,
            "kappa": None if answers.kappa is None else float(answers.kappa[asked].mean()),
            "relative_score": score,
        }


def _difference(evaluation: Evaluation, first: Answers, second: Answers, task: str) -> Estimate:
    asked = np.ones(len(evaluation.task), dtype=bool) if task == "all" else evaluation.task == task
    return paired_difference(first.correct[asked], second.correct[asked], evaluation.image[asked])
