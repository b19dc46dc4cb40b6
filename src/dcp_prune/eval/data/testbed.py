"""Questions of the testbed about its own pictures; a model that was trained on them answers with one word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dcp_prune.assistant import TESTBED_MODELS, Assistant
from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.asking.runner import Question
from dcp_prune.eval.data.questions import Block, QuestionSet, describe_model, load_quietly
from dcp_prune.testbed.load import DEFAULT_CHECKPOINT, prompt
from dcp_prune.testbed.seeds import split_of
from dcp_prune.testbed.tiles import with_tiles
from dcp_prune.testbed.worlds import World, world_of

GRID = 24
"""Patches per side of the pictures that the models of both worlds know."""
IMAGES_PER_BLOCK = 4
"""Images that are answered together: 56 questions, a few seconds for forty methods."""


@dataclass(frozen=True)
class TestbedQuestions(QuestionSet):
    """The first `limit` questions of these seeds' scenes, the same and in the same order for everybody.

    Attributes:
        seeds: of the scenes; all in one split.
        difficulty: of the scenes.
        limit: questions in all; fewer if the seeds do not give as many.
        tasks: only questions of these; () is all.
        grid: patches per side of the pictures; where that is more than the model knows, it sees an overview and 2 x 2
            tiles, as a LLaVA-NeXT.
        checkpoint: who answers: one that comes with the package, or the folder of a model trained on the testbed.

    Raises:
        InvalidInputError: no seed, no question, seeds of several splits, a task or difficulty that its world lacks.
    """

    seeds: range
    difficulty: str
    limit: int
    tasks: tuple[str, ...] = ()
    grid: int = GRID
    checkpoint: str = DEFAULT_CHECKPOINT

    __test__ = False  # the name begins like a test's

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise InvalidInputError(f"limit must be at least 1 question, got {self.limit}")
        split_name(self.seeds)
        self.world.check(self.difficulty)
        for task in self.tasks:
            if task not in self.world.tasks:
                raise InvalidInputError(f"the testbed has no task {task!r}; it has {', '.join(self.world.tasks)}")

    @cached_property
    def world(self) -> World:
        """The world that who answers was trained on."""
        return world_of(self.checkpoint)

    def scene(self, number: int) -> Any:
        """The scene of `seeds[number]`."""
        return self.world.make_scene(self.seeds[number], self.difficulty, self.grid)

    @cached_property
    def slots(self) -> tuple[tuple[int, str], ...]:
        """Place among a scene's questions, and task, of those that are asked; the same in every scene."""
        every = enumerate(question.task for question in self.scene(0).questions)
        return tuple((slot, task) for slot, task in every if not self.tasks or task in self.tasks)

    @property
    def questions(self) -> int:
        """How many there are."""
        return min(self.limit, len(self.seeds) * len(self.slots))

    @property
    def images(self) -> int:
        """How many scenes they are about."""
        return -(-self.questions // len(self.slots))

    def asked(self, scene: Any, number: int, place: int, *, wrong: bool = False) -> list[Question]:
        """The questions about the scene of `seeds[number]`, which is image `place` of a batch.

        Args:
            scene: it; the last one may be asked less.
            number: its position in `seeds`.
            place: its position in the batch.
            wrong: whether the questions of the next scene are needed too.
        """
        following = self.world.make_scene(scene.seed + 1, self.difficulty, self.grid).questions if wrong else None
        slots = self.slots[: max(0, self.questions - number * len(self.slots))]
        return [
            Question(
                key=f"{scene.seed}/{slot:02d}",
                image=place,
                text=scene.questions[slot].text,
                prompt=prompt(scene.questions[slot].text),
                wrong=following[slot].text if following else None,
                picture=str(scene.seed),
                task=task,
                truths=(scene.questions[slot].answer,),
            )
            for slot, task in slots
        ]

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return describe_model(self._model), {
            "kind": "testbed",
            "checkpoint": self.checkpoint,
            "difficulty": self.difficulty,
            **({"tiles": True} if self.grid != GRID else {}),
            "split": split_name(self.seeds),
            "first_seed": self.seeds[0],
            "last_seed": self.seeds[self.images - 1],
            "images": self.images,
            "questions": self.questions,
            "tasks": list(dict.fromkeys(task for _, task in self.slots)),
        }

    @cached_property
    def blocks(self) -> tuple[Block, ...]:  # type: ignore[override]
        starts = range(0, self.images, IMAGES_PER_BLOCK)
        return tuple(self.block(number, start, IMAGES_PER_BLOCK) for number, start in enumerate(starts))

    def block(self, number: int, start: int, images: int) -> Block:
        """Questions about that many scenes from `seeds[start]` on."""
        scenes = range(start, min(start + images, self.images))
        keys = (f"{self.seeds[at]}/{slot:02d}" for at in scenes for slot, _ in self.slots)
        left = self.questions - start * len(self.slots)
        return Block(number, scenes, tuple(keys)[:left])

    def pose(self, block: Block, assistant: Assistant, *, wrong: bool) -> tuple[list[Any], list[Question]]:
        tokenizer: Any = assistant.processor.tokenizer  # type: ignore[attr-defined]
        scenes = [self.scene(number) for number in block.items]
        questions = [
            question
            for place, (number, scene) in enumerate(zip(block.items, scenes, strict=True))
            for question in self.asked(scene, number, place, wrong=wrong)
        ]
        for answer in dict.fromkeys(question.truths[0] for question in questions):
            answer_id(tokenizer, answer)
        return [scene.image for scene in scenes], questions

    def score(self, answer: str, truths: Sequence[str]) -> float:
        return float(answer in truths)

    def load(self) -> Assistant:
        assistant = load_quietly(self._model)
        if self.grid == GRID:
            return assistant
        return Assistant(self._model, *with_tiles(assistant.model, assistant.processor))

    @property
    def _model(self) -> str:
        return f"testbed-{self.checkpoint}" if f"testbed-{self.checkpoint}" in TESTBED_MODELS else self.checkpoint


def answer_id(tokenizer: Any, answer: str) -> int:
    """The token of a one-word answer.

    Raises:
        InvalidInputError: it is not a single token of this model.
    """
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise InvalidInputError(
            f"the answer {answer!r} is not a single token of this model; use one trained on the testbed's words"
        )
    return ids[0]


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
            f"seeds {seeds[0]} to {seeds[-1]} reach from the {first} into the {last} split; choose seeds of one split"
        )
    return first
