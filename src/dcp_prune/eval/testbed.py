"""Pruners on the testbed's questions: every method answers the very same questions in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedModel, ProcessorMixin

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.methods import ALL_TOKENS, Method, plan
from dcp_prune.eval.runner import Answered, Asked, Runner
from dcp_prune.eval.stats import Estimate, accuracy, paired_difference
from dcp_prune.testbed.load import prompt
from dcp_prune.testbed.seeds import split_of
from dcp_prune.testbed.world import GRID, TASKS, Difficulty, Question, Scene, make_scene

__all__ = [
    "ALL_TOKENS",
    "Answers",
    "Evaluation",
    "Method",
    "TestbedQuestions",
    "evaluate",
    "plan",
    "split_name",
    "summarise",
]


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
    difficulty: Difficulty
    image: Int[np.ndarray, "q"]
    task: np.ndarray
    answers: tuple[Answers, ...]


@dataclass(frozen=True)
class TestbedQuestions:
    """The first `limit` questions of these seeds' scenes, the same and in the same order for everybody.

    Attributes:
        seeds: of the scenes; all in one split.
        difficulty: of the scenes.
        limit: questions in all; fewer if the seeds do not give as many.
        tasks: only questions of these; () is all.
        grid: patches per side of the pictures.

    Raises:
        InvalidInputError: no seed, no question, seeds of several splits, or an unknown task.
    """

    seeds: range
    difficulty: Difficulty
    limit: int
    tasks: tuple[str, ...] = ()
    grid: int = GRID

    __test__ = False  # the name begins like a test's

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise InvalidInputError(f"limit must be at least 1 question, got {self.limit}")
        split_name(self.seeds)
        for task in self.tasks:
            if task not in TASKS:
                raise InvalidInputError(f"the testbed has no task {task!r}; it has {', '.join(TASKS)}")

    @cached_property
    def slots(self) -> tuple[tuple[int, str], ...]:
        """Place among a scene's questions, and task, of those that are asked; the same in every scene."""
        questions = self.scene(0).questions
        return tuple(
            (slot, question.task)
            for slot, question in enumerate(questions)
            if not self.tasks or question.task in self.tasks
        )

    def scene(self, number: int) -> Scene:
        """The scene of `seeds[number]`."""
        return self._scene(self.seeds[number])

    def _scene(self, seed: int) -> Scene:
        return make_scene(seed, self.difficulty, self.grid)

    @property
    def questions(self) -> int:
        """How many there are."""
        return min(self.limit, len(self.seeds) * len(self.slots))

    @property
    def images(self) -> int:
        """How many scenes they are about."""
        return -(-self.questions // len(self.slots))

    def of_image(self, number: int) -> tuple[tuple[int, str], ...]:
        """Slots and tasks asked about the scene of `seeds[number]`; the last scene may be asked less."""
        return self.slots[: max(0, self.questions - number * len(self.slots))]

    def asked(self, scene: Scene, number: int, place: int, *, wrong: bool) -> list[tuple[Question, Asked]]:
        """The questions about the scene of `seeds[number]`, which is image `place` of a batch.

        Args:
            scene: it.
            number: its position in `seeds`.
            place: its position in the batch.
            wrong: whether the questions of the next scene are needed too.
        """
        following = self._scene(scene.seed + 1).questions if wrong else None
        return [
            (
                (question := scene.questions[slot]),
                Asked(
                    key=f"{scene.seed}/{slot:02d}",
                    image=place,
                    text=question.text,
                    prompt=prompt(question.text),
                    wrong=following[slot].text if following else None,
                ),
            )
            for slot, _ in self.of_image(number)
        ]


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    methods: Sequence[Method],
    seeds: range,
    limit: int,
    *,
    difficulty: Difficulty = "standard",
    grid: int = GRID,
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
        images_at_once: images whose questions form one batch.
        progress: called with the questions done and the questions in all.

    Raises:
        InvalidInputError: no seed, no question, seeds of several splits, or an answer that is not one token.
    """
    source = TestbedQuestions(seeds, difficulty, limit, grid=grid)
    runner = Runner(model, processor, methods)
    collected: list[list[tuple[Answered, Bool[np.ndarray, "q"]]]] = [[] for _ in methods]
    images: list[int] = []
    tasks: list[str] = []
    progress(0, source.questions)
    for start in range(0, source.images, images_at_once):
        numbers = range(start, min(start + images_at_once, source.images))
        questions, answered = answer_scenes(runner, source, numbers)
        wanted = np.array([answer_id(runner.tokenizer, question.answer) for question, _ in questions])
        for results, answers in zip(collected, answered, strict=True):
            results.append((answers, answers.words == wanted))
        images.extend(start + asked.image for _, asked in questions)
        tasks.extend(question.task for question, _ in questions)
        progress(len(tasks), source.questions)
    answers = tuple(
        Answers(
            method,
            np.concatenate([each.kept for each, _ in results]),
            np.concatenate([each.words for each, _ in results]),
            np.concatenate([correct for _, correct in results]),
            None if results[0][0].kappa is None else np.concatenate([each.kappa for each, _ in results]),  # type: ignore[misc]
            sum(each.seconds for each, _ in results),
        )
        for method, results in zip(methods, collected, strict=True)
    )
    return Evaluation(tuple(seeds[: source.images]), difficulty, np.array(images), np.array(tasks), answers)


def answer_scenes(
    runner: Runner, source: TestbedQuestions, numbers: Sequence[int]
) -> tuple[list[tuple[Question, Asked]], Iterator[Answered]]:
    """The questions about the scenes of `source.seeds[numbers]`, and what each method of the runner makes of them."""
    wrong = any(method.text.kind == "wrong" for method in runner.methods)
    scenes = [source.scene(number) for number in numbers]
    questions = [
        pair
        for place, (number, scene) in enumerate(zip(numbers, scenes, strict=True))
        for pair in source.asked(scene, number, place, wrong=wrong)
    ]
    return questions, runner.run([scene.image for scene in scenes], [asked for _, asked in questions])


def answer_id(tokenizer: Any, answer: str) -> int:
    """The token of a one-word answer.

    Raises:
        InvalidInputError: it is no single token of this model.
    """
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise InvalidInputError(
            f"the answer {answer!r} is no single token of this model; use one trained on the testbed's words"
        )
    return ids[0]


def summarise(evaluation: Evaluation) -> dict[str, Any]:
    """The result file's content but for the environment: one row per method and task, and all paired differences.

    `results` holds accuracy and mean kappa per task, `all` for the total, with 95 % intervals clustered by image, and
    the `relative_score`, the share of the unpruned model's accuracy, if that took part (`all`: mean over the tasks, as
    in the paper). `paired` holds, for each budget, the first pruner's lead over each other one; `methods` the
    settings and seconds of each.
    """
    tasks = [task for task in TASKS if (evaluation.task == task).any()]
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


def split_name(seeds: Sequence[int]) -> str:
    """`training`, `tuning` or `held-out`, whichever all these seeds belong to.

    Raises:
        InvalidInputError: there is no seed, or they lie in several splits or in none.
    """
    if not seeds:
        raise InvalidInputError("the seed range is empty; give A:B with A below B")
    try:
        first, last = split_of(seeds[0]), split_of(seeds[-1])
    except ValueError as error:
        raise InvalidInputError(str(error)) from None
    if first != last:
        raise InvalidInputError(
            f"seeds {seeds[0]} to {seeds[-1]} reach from the {first} into the {last} split; stay within one"
        )
    return first


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
