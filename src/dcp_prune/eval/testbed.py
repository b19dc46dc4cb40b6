"""Pruners on the testbed's questions: every method answers the very same questions in the same order.

An image is encoded once for all its questions and for all methods that need the same encoder pass; the answer is the
first word that the model would generate, since every answer is one token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.stats import Estimate, accuracy, paired_difference
from dcp_prune.functional.distribution import kappa
from dcp_prune.integrations.transformers import EncodedImages, encode_images, prune_inputs
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import get_pruner, make_pruner
from dcp_prune.testbed.load import prompt
from dcp_prune.testbed.seeds import split_of
from dcp_prune.testbed.world import TASKS, Difficulty, Question, Scene, make_scene
from dcp_prune.tokens import Signal

Work = TypeVar("Work")

ALL_TOKENS = "none"
"""Name under which the unpruned model, and the model without any image, take part."""


@dataclass(frozen=True)
class Method:
    """One contender: a pruner at a budget, the unpruned model (`num_tokens` is None), or no image (0).

    Attributes:
        name: the pruner's registered name, or `ALL_TOKENS`.
        num_tokens: visual tokens that the language model reads; None for all.
        pruner: None where nothing is selected.
    """

    name: str
    num_tokens: int | None
    pruner: Pruner | None = None


@dataclass(frozen=True)
class Answers:
    """What one method answered.

    Attributes:
        method: who.
        num_tokens: visual tokens that the language model read.
        words: ids of the first new token, by question. `q`.
        correct: whether that is the answer, by question. `q`.
        kappa: shift of the features that reached the language model against those of an unpruned encoder pass, by
            question; None without an image. `q`.
        seconds: spent on its own selection and prefill, and on the encoder pass that it used, which others may share.
    """

    method: Method
    num_tokens: int
    words: Int[np.ndarray, "q"]
    correct: Bool[np.ndarray, "q"]
    kappa: Float[np.ndarray, "q"] | None
    seconds: float


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


def plan(names: Sequence[str], budgets: Sequence[int], options: dict[str, Any] | None = None) -> tuple[Method, ...]:
    """The methods for these pruner names and budgets, without duplicates.

    `none` stands for all tokens whatever the budget, and budget 0 for no image whatever the pruner.

    Args:
        names: registered names or `none`.
        budgets: numbers of visual tokens, 0 included.
        options: further fields of every pruner.

    Raises:
        UnknownPrunerError: an unknown name.
        InvalidInputError: no name, no budget, or a budget that is negative or no whole number.
    """
    if not names or not budgets:
        raise InvalidInputError("name at least one pruner and one number of visual tokens")
    for name in names:
        if name != ALL_TOKENS:
            get_pruner(name)
    methods: dict[Method, None] = {}
    if 0 in budgets:
        methods[Method(ALL_TOKENS, 0)] = None
    for budget in budgets:
        for name in names:
            if isinstance(budget, int) and budget == 0:
                continue
            pruner = None if name == ALL_TOKENS else make_pruner(name, num_tokens=budget, **(options or {}))
            methods[Method(name, None if pruner is None else budget, pruner)] = None
    return tuple(methods)


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    methods: Sequence[Method],
    seeds: range,
    limit: int,
    *,
    difficulty: Difficulty = "standard",
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
        images_at_once: images whose questions form one batch.
        progress: called with the questions done and the questions in all.

    Raises:
        InvalidInputError: no seed, no question, seeds of several splits, or an answer that is not one token.
    """
    if limit < 1:
        raise InvalidInputError(f"limit must be at least 1 question, got {limit}")
    split_name(seeds)
    runner = _Runner(model, processor, methods)
    collected: list[list[_Batch]] = [[] for _ in methods]
    used: list[int] = []
    images: list[int] = []
    tasks: list[str] = []
    total = min(limit, len(seeds) * len(make_scene(seeds[0], difficulty).questions))
    progress(0, total)
    for scenes in _batches(seeds, limit, difficulty, images_at_once):
        questions = [question for _, asked in scenes for question in asked]
        owner = [number for number, (_, asked) in enumerate(scenes) for _ in asked]
        batches = runner.run([scene for scene, _ in scenes], questions, owner)
        for results, batch in zip(collected, batches, strict=True):
            results.append(batch)
        images.extend(len(used) + number for number in owner)
        tasks.extend(question.task for question in questions)
        used.extend(scene.seed for scene, _ in scenes)
        progress(len(tasks), total)
    answers = tuple(
        Answers(
            method,
            results[0].num_tokens,
            np.concatenate([batch.words for batch in results]),
            np.concatenate([batch.correct for batch in results]),
            None if results[0].kappa is None else np.concatenate([batch.kappa for batch in results]),  # type: ignore[misc]
            sum(batch.seconds for batch in results),
        )
        for method, results in zip(methods, collected, strict=True)
    )
    return Evaluation(tuple(used), difficulty, np.array(images), np.array(tasks), answers)


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
                "options": {} if a.method.pruner is None else _options(a.method.pruner),
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


@dataclass(frozen=True)
class _Batch:
    num_tokens: int
    words: Int[np.ndarray, "q"]
    correct: Bool[np.ndarray, "q"]
    kappa: Float[np.ndarray, "q"] | None
    seconds: float


class _Runner:
    """Answers batches of questions with every method, sharing encoder passes and, where it can, prefixes."""

    def __init__(self, model: PreTrainedModel, processor: Any, methods: Sequence[Method]) -> None:
        self.model = model
        self.processor = processor
        self.methods = methods
        self.tokenizer = processor.tokenizer
        self.image_id: int = model.config.image_token_id  # type: ignore[attr-defined]
        self.stages: dict[Method, Any] = {}

    @torch.inference_mode()
    def run(self, scenes: Sequence[Scene], questions: Sequence[Question], owner: Sequence[int]) -> Iterator[_Batch]:
        """One batch per method, in order; `owner` is the position of each question's scene."""
        pixels = self.processor.image_processor([s.image for s in scenes], return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.model.device)
        prompts = self.tokenizer([prompt(question.text) for question in questions])["input_ids"]
        wanted = torch.tensor([self._answer_id(question.answer) for question in questions], device=pixels.device)
        index = torch.tensor(owner, device=pixels.device)
        passes = self._passes(pixels)
        full = passes[()][0]  # no stages: what the model sees unpruned
        for method in self.methods:
            encoded, spent = passes[self.stages[method]]
            (words, features), seconds = _timed(
                lambda method=method, encoded=encoded: self._answer(method, encoded, pixels, prompts, index)
            )
            shift = None
            if features is not None:
                reference = full.tokens.features
                shift = kappa(features, reference if len(features) == len(reference) else reference[index])
                shift = (shift if len(shift) == len(index) else shift[index]).cpu().numpy()
            yield _Batch(
                num_tokens=0 if features is None else features.shape[1],
                words=words.cpu().numpy(),
                correct=(words == wanted).cpu().numpy(),
                kappa=shift,
                seconds=seconds + spent,
            )

    def _passes(self, pixels: Float[Tensor, "i c y x"]) -> dict[Any, tuple[EncodedImages, float]]:
        """One encoder pass, and its seconds, for each configuration of in-encoder stages that any method has."""
        if not self.stages:  # which stages a pruner has is for the encoder's depth to say
            for method in self.methods:
                wanted = () if method.pruner is None else (method.pruner,)
                self.stages[method] = encode_images(self.model, pixels[:1], *wanted).stages
        groups: dict[Any, list[Pruner]] = {(): []}
        for method, stages in self.stages.items():
            groups.setdefault(stages, []).extend([] if method.pruner is None else [method.pruner])
        return {
            stages: _timed(lambda pruners=pruners: encode_images(self.model, pixels, *pruners))
            for stages, pruners in groups.items()
        }

    def _answer(
        self,
        method: Method,
        encoded: EncodedImages,
        pixels: Tensor,
        prompts: Sequence[list[int]],
        index: Int[Tensor, "q"],
    ) -> tuple[Int[Tensor, "q"], Float[Tensor, "r k d"] | None]:
        """Id of each question's first new token, and the features that the language model read: `r` is the number of
        images where the question does not matter, else the number of questions."""
        if method.num_tokens == 0:
            rows = [[token for token in row if token != self.image_id] for row in prompts]
            return self._first_word(self._padded(rows)), None
        num_tokens = encoded.tokens.num_original
        if not _selects(method, num_tokens):
            prefix = self._prefix(prompts, len(pixels), num_tokens)
            return self._after_image({**prefix, "pixel_values": pixels}, prompts, index), encoded.tokens.features
        pruner = method.pruner
        assert pruner is not None
        if Signal.TEXT not in pruner.requires | pruner.optional:
            short = prune_inputs(self.model, self._prefix(prompts, len(pixels), num_tokens), pruner, encoded=encoded)
            return self._after_image(short.inputs, prompts, index), short.features
        inputs = self._padded([self._expanded(row, num_tokens) for row in prompts])
        short = prune_inputs(self.model, inputs, pruner, processor=self.processor, encoded=encoded.select(index))
        return self._first_word(short.inputs), short.features

    def _prefix(self, prompts: Sequence[list[int]], images: int, num_tokens: int) -> dict[str, Tensor]:
        """All that comes before the question, once per image; it is the same in every prompt."""
        start = prompts[0][: prompts[0].index(self.image_id) + 1]
        return self._padded([self._expanded(start, num_tokens)] * images)

    def _after_image(
        self, prefix: dict[str, Any], prompts: Sequence[list[int]], index: Int[Tensor, "q"]
    ) -> Int[Tensor, "q"]:
        """The image is prefilled once, its questions continue from copies of the cache."""
        cache = self.model(**prefix, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_select_indices(index)
        questions = self._padded([row[row.index(self.image_id) + 1 :] for row in prompts], right=True)
        mask = torch.cat((prefix["attention_mask"][index], questions["attention_mask"]), dim=1)
        logits = self.model(input_ids=questions["input_ids"], attention_mask=mask, past_key_values=cache).logits
        last = questions["attention_mask"].sum(dim=1) - 1
        return logits[torch.arange(len(index), device=index.device), last].argmax(dim=-1)

    def _first_word(self, inputs: dict[str, Any]) -> Int[Tensor, "q"]:
        return self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(dim=-1)

    def _expanded(self, row: Sequence[int], num_tokens: int) -> list[int]:
        at = list(row).index(self.image_id)
        return [*row[:at], *[self.image_id] * num_tokens, *row[at + 1 :]]

    def _padded(self, rows: Sequence[Sequence[int]], *, right: bool = False) -> dict[str, Tensor]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id or 0, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            columns = slice(0, len(row)) if right else slice(width - len(row), width)
            ids[number, columns] = torch.tensor(row)
            mask[number, columns] = 1
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def _answer_id(self, answer: str) -> int:
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise InvalidInputError(
                f"the answer {answer!r} is no single token of this model; use one trained on the testbed's words"
            )
        return ids[0]


def _selects(method: Method, num_tokens: int) -> bool:
    return method.pruner is not None and method.pruner.budget.resolve(num_tokens) < num_tokens


def _timed(work: Callable[[], Work]) -> tuple[Work, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def _batches(
    seeds: range, limit: int, difficulty: Difficulty, images_at_once: int
) -> Iterator[list[tuple[Scene, tuple[Question, ...]]]]:
    batch: list[tuple[Scene, tuple[Question, ...]]] = []
    for seed in seeds:
        if limit <= 0:
            break
        scene = make_scene(seed, difficulty)
        asked = scene.questions[:limit]
        limit -= len(asked)
        batch.append((scene, asked))
        if len(batch) == images_at_once:
            yield batch
            batch = []
    if batch:
        yield batch


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


def _options(pruner: Pruner) -> dict[str, Any]:
    """The pruner's whole configuration but its budget, as plain JSON values."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not np.isfinite(value):
            return str(value)
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return {name: plain(value) for name, value in asdict(pruner).items() if name not in ("num_tokens", "keep_ratio")}


def _difference(evaluation: Evaluation, first: Answers, second: Answers, task: str) -> Estimate:
    asked = np.ones(len(evaluation.task), dtype=bool) if task == "all" else evaluation.task == task
    return paired_difference(first.correct[asked], second.correct[asked], evaluation.image[asked])
