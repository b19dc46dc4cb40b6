"""Pruned against unpruned answers on a user's own images and questions, without right answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from transformers import LlavaConfig, PreTrainedModel, ProcessorMixin

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.asking.batch import Batch, Question
from dcp_prune.eval.asking.runner import Answered, Runner, Seen
from dcp_prune.eval.data.pictures import PictureQuestion, PictureQuestions
from dcp_prune.eval.data.scoring import normalised
from dcp_prune.eval.specs import ALL_TOKENS, QUESTION, Method
from dcp_prune.images import load_image
from dcp_prune.profiling.first_token import FirstToken, first_token
from dcp_prune.profiling.flops import llava_prefill_flops

TIMED = 5
"""Questions that are asked once more, one at a time, to measure the time to first token and the cache."""


@dataclass(frozen=True)
class Cost:
    """What one prompt costs, with all visual tokens or with a few.

    Attributes:
        visual_tokens: that the language model reads.
        prefill_tokens: of the prompt, visual tokens included; mean over the questions.
        kv_cache_bytes: the cache after the prefill, one prompt; median over the timed ones.
        prefill_flops: of encoder, projector and language model, without the selection; None if this model's are not
            counted.
        first_token_ms: from pixels and ids to the first new id, one prompt at a time; median over the timed ones.
    """

    visual_tokens: int
    prefill_tokens: float
    kv_cache_bytes: int
    prefill_flops: int | None
    first_token_ms: float


@dataclass(frozen=True)
class Agreement:
    """What one method answered, beside the unpruned model.

    Attributes:
        method: who.
        texts: by question.
        same: whether the text equals the unpruned one's, both as `eval.data.scoring.normalised` leaves them. `q`.
        exact: whether it equals it to the letter. `q`.
        divergence: Kullback-Leibler divergence, in nats, of the first new token's distribution from that of the
            unpruned model, which is the reference: sum p_all log(p_all / p_pruned). `q`.
        kappa: shift of the features that the language model read against all of an unpruned encoder pass. `q`.
        cost: of one prompt.
    """

    method: Method
    texts: tuple[str, ...]
    same: Bool[np.ndarray, " q"]
    exact: Bool[np.ndarray, " q"]
    divergence: Float[np.ndarray, " q"]
    kappa: Float[np.ndarray, " q"]
    cost: Cost


@dataclass(frozen=True)
class Comparison:
    """All answers to the same questions.

    Attributes:
        questions: what was asked.
        texts: the unpruned model's answers, by question.
        cost: of one unpruned prompt.
        answers: by method.
    """

    questions: PictureQuestions
    texts: tuple[str, ...]
    cost: Cost
    answers: tuple[Agreement, ...]


def compare(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: PictureQuestions,
    methods: Sequence[Method],
    *,
    prompt: Callable[[str], str],
    max_new_tokens: int = 32,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Asks every question with all visual tokens and with each method's; answers are greedy.

    Args:
        model: a model with an adapter, in evaluation mode.
        processor: its processor.
        questions: from `read_pictures`.
        methods: pruners at budgets below the image's number of tokens.
        prompt: makes a question into a prompt with one image placeholder.
        max_new_tokens: the longest answer, in tokens.
        batch_size: how many questions are answered at once.
        progress: called with the questions done and the questions in all.

    Raises:
        InvalidInputError: a budget that prunes nothing, a number below 1, an image that cannot be read, a model that
            answers with NaN, or too little memory for the batch.
        MissingSignalError: a pruner requires a signal that the model does not give.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise InvalidInputError(f"{name} must be at least 1, got {value}")
    if not questions.asked or not methods:
        raise InvalidInputError("there is nothing to compare; give at least one question and one pruner with a budget")
    for method in methods:
        check_method(method)
    try:
        return _Comparison(model, processor, methods, prompt, max_new_tokens).run(questions, batch_size, progress)
    except torch.OutOfMemoryError:
        raise InvalidInputError(
            f"the device has too little memory for {batch_size} questions at once; give a smaller batch size"
        ) from None


def check_method(method: Method) -> None:
    """Checks that a method can be compared with the unpruned model.

    Raises:
        InvalidInputError: it prunes nothing, reads another text than the question, or has no fixed budget.
    """
    if method.pruner is None:
        raise InvalidInputError("all tokens and no image are not pruners to compare; name one, such as dcp")
    if method.text != QUESTION:
        raise InvalidInputError(f"{method.name}: leave out @{method.text}; the pruner reads the question that is asked")
    if method.is_adaptive:
        raise InvalidInputError(
            f"{method.name}: compare searches among fixed budgets; leave out max_distance and the range"
        )


@dataclass
class _Collected:
    """What is known of one method so far, by question."""

    texts: list[str] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    kappa: list[float] = field(default_factory=list)

    def add(self, answered: Answered, reference: Answered) -> None:
        ours, full = answered.log_probs, reference.log_probs
        assert ours is not None
        assert full is not None
        assert answered.kappa is not None
        self.texts.extend(answered.answers)
        self.divergence.extend((full.exp() * (full - ours)).sum(dim=-1).clamp(min=0).tolist())
        self.kappa.extend(answered.kappa.tolist())


class _Comparison:
    """Answers blocks of questions with the unpruned model and with every method, then times a few of them."""

    def __init__(
        self, model: Any, processor: Any, methods: Sequence[Method], prompt: Callable[[str], str], max_new_tokens: int
    ) -> None:
        self.model, self.processor, self.prompt = model, processor, prompt
        self.methods = (Method(ALL_TOKENS, None), *methods)
        self.runner = Runner(model, processor, self.methods, max_new_tokens=max_new_tokens, log_probs=True)
        self.num_tokens = 0
        self.stages: dict[Method, list[tuple[Any, ...]]] = {method: [] for method in self.methods}
        """By block: (layer, tokens that went on) of each in-encoder stage of a method's pruner."""

    def run(self, questions: PictureQuestions, batch_size: int, progress: Callable[[int, int], None]) -> Comparison:
        collected = [_Collected() for _ in self.methods]
        lengths: list[int] = []
        progress(0, len(questions.asked))
        for block in _blocks(questions.asked, batch_size):
            images = list(dict.fromkeys(asked.image for asked in block))
            seen = self.runner.look([load_image(image).image for image in images])
            self._learn(seen)
            for start in range(0, len(block), batch_size):
                batch = block[start : start + batch_size]
                asked = [self._question(each, images.index(each.image)) for each in batch]
                reference: Answered | None = None
                for own, answered in zip(collected, self.runner.ask(seen, asked), strict=True):
                    reference = reference or answered
                    own.add(answered, reference)
                assert reference is not None
                lengths.extend(reference.prompt_tokens.tolist())
                progress(len(lengths), len(questions.asked))
        full, *costs = self._costs(questions.asked, float(np.mean(lengths)))
        texts = collected[0].texts
        plain = [normalised(text) for text in texts]
        answers = [
            Agreement(
                method,
                tuple(own.texts),
                np.array([normalised(text) == other for text, other in zip(own.texts, plain, strict=True)]),
                np.array([text == other for text, other in zip(own.texts, texts, strict=True)]),
                np.array(own.divergence),
                np.array(own.kappa),
                cost,
            )
            for method, own, cost in zip(self.methods[1:], collected[1:], costs, strict=True)
        ]
        return Comparison(questions, tuple(texts), full, tuple(answers))

    def _question(self, asked: PictureQuestion, image: int) -> Question:
        return Question(key="", image=image, text=None, prompt=self.prompt(asked.question))

    def _learn(self, seen: Seen) -> None:
        """What can be known only with a picture at hand: the number of tokens, and what stages keep of them."""
        self.num_tokens = seen.full.num_original
        for method in self.methods:
            if method.pruner is not None and self._kept(method) >= self.num_tokens:
                raise InvalidInputError(
                    f"{method.name} at {method.num_tokens} tokens prunes nothing, since an image has "
                    f"{self.num_tokens} visual tokens; give smaller budgets"
                )
            stages = seen.stages[method]
            counts = seen.passes[stages][0].stage_tokens
            self.stages[method].append(tuple((s.layer, n) for s, n in zip(stages, counts, strict=True)))

    def _kept(self, method: Method) -> int:
        return self.num_tokens if method.pruner is None else method.pruner.budget.resolve(self.num_tokens)

    def _costs(self, asked: Sequence[PictureQuestion], prefill_tokens: float) -> list[Cost]:
        """Each method's cost on a few questions spread over all of them, taking turns."""
        count = min(TIMED, len(asked))
        chosen = [asked[number * len(asked) // count] for number in range(count)]
        taken: list[list[FirstToken]] = [[] for _ in self.methods]
        for number, each in enumerate([chosen[0], *chosen]):  # the first round pays for one-time work
            batch = Batch(self.model, self.processor, [load_image(each.image).image], [self._question(each, 0)])
            for own, method in zip(taken, self.methods, strict=True):
                sample = first_token(self.model, batch.inputs(with_image=True), method.pruner, processor=self.processor)
                own.extend([sample] * (number > 0))
        return [
            Cost(
                visual_tokens=kept,
                prefill_tokens=prefill_tokens - self.num_tokens + kept,
                kv_cache_bytes=int(median(sample.cache_bytes for sample in own)),
                prefill_flops=self._flops(round(prefill_tokens) - self.num_tokens, kept, method),
                first_token_ms=median(sample.milliseconds for sample in own),
            )
            for method, own in zip(self.methods, taken, strict=True)
            for kept in (self._kept(method),)
        ]

    def _flops(self, text_tokens: int, kept: int, method: Method) -> int | None:
        config = self.model.config
        if not isinstance(config, LlavaConfig):
            return None
        layer: Any = config.vision_feature_layer
        depth: int = config.vision_config.num_hidden_layers  # type: ignore[union-attr]
        # Where the data decide how many tokens a stage keeps, their mean is counted.
        stages = np.mean(self.stages[method], axis=0).round().astype(int).reshape(-1, 2).tolist()
        return llava_prefill_flops(
            config,
            text_tokens=text_tokens,
            visual_tokens=kept,
            stages=[(layer, count) for layer, count in stages],
            # The model computes its whole encoder; a pruned call stops at the layer whose features are read.
            encoder_layers=None if method.pruner is None else layer if layer >= 0 else depth + 1 + layer,
        ).total


def _blocks(asked: Sequence[PictureQuestion], batch_size: int) -> Iterator[list[PictureQuestion]]:
    """Whole images with all their questions, as few as fill a batch: no image is encoded twice."""
    block: list[PictureQuestion] = []
    for _, group in itertools.groupby(asked, key=lambda each: each.image):
        block.extend(group)
        if len(block) >= batch_size:
            yield block
            block = []
    if block:
        yield block
