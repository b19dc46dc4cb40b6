"""Pruned against unpruned answers on a user's own images and questions, without knowing what is right.

An image is encoded once for all its questions and for all pruners that need the same encoder pass. Whether a budget
keeps the wanted agreement is decided from the largest budget down, see `decide`.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from transformers import LlavaConfig, PreTrainedModel, ProcessorMixin

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.data.scoring import normalised
from dcp_prune.eval.specs import QUESTION, Method
from dcp_prune.eval.statistics.bounds import fewest_images, images_needed, share_lower_bound
from dcp_prune.eval.statistics.intervals import CONFIDENCE
from dcp_prune.functional.distribution import kappa
from dcp_prune.images import load_image
from dcp_prune.integrations.question import Question
from dcp_prune.integrations.shortening import shorten
from dcp_prune.integrations.transformers import EncodedImages, encode_images, encoder_stages
from dcp_prune.profiling.flops import llava_prefill_flops
from dcp_prune.profiling.memory import kv_cache_bytes
from dcp_prune.pruners.base import Pruner
from dcp_prune.pruners.uniform import UniformPruner

TIMED = 5
"""Questions that are asked once more, one at a time, to measure the time to first token and the cache."""
MARKER = "<image>"
ALL = UniformPruner(keep_ratio=1.0)
"""Stands for the unpruned model: keeps every token as it is."""


@dataclass(frozen=True)
class Asked:
    """One question about one image."""

    image: Path
    question: str


@dataclass(frozen=True)
class Work:
    """What is to be asked, the questions about one image next to each other.

    Attributes:
        asked: every question with its image.
        notes: one sentence for each thing in the files that was left out or changed.
    """

    asked: tuple[Asked, ...]
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[Path, ...]:
        """Every image, once, in the order of `asked`."""
        return tuple(dict.fromkeys(asked.image for asked in self.asked))

    @property
    def cluster(self) -> Int[np.ndarray, " q"]:
        """The position in `images` of each question's image. `q`."""
        place = {image: number for number, image in enumerate(self.images)}
        return np.array([place[asked.image] for asked in self.asked])


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
class Answers:
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
        work: what was asked.
        texts: the unpruned model's answers, by question.
        cost: of one unpruned prompt.
        answers: by method.
    """

    work: Work
    texts: tuple[str, ...]
    cost: Cost
    answers: tuple[Answers, ...]


@dataclass(frozen=True)
class Verdict:
    """The smallest budget of one pruner that surely keeps the wanted agreement.

    Attributes:
        pruner: its name.
        keep: the wanted share of equal answers.
        confidence: with which the statement holds.
        num_tokens: the budget; None if none was shown to.
        tested: budgets from the largest down to the first that failed, if any did.
        measured: the smallest budget whose observed agreement, and that of all larger ones, is at least `keep`,
            however unsure; None if there is none.
        images_needed: about how many images like these would show the next budget that comes into question; None
            if none comes into question, or if no number would.
        sentence: all of this in words.
    """

    pruner: str
    keep: float
    confidence: float
    num_tokens: int | None
    tested: tuple[int, ...]
    measured: int | None
    images_needed: int | None
    sentence: str


def read_work(images: Path, questions: Path) -> Work:
    """Reads the questions and finds their images; opens none of them, see `check_images`.

    Args:
        images: a folder.
        questions: a text file with one question a line, each asked about every image in the folder; or JSON lines with
            the keys `image` (a path, relative ones below the folder) and `question`, others being ignored.

    Raises:
        InvalidInputError: a file or folder that is missing or empty, or a line that cannot be used, with its number.
    """
    if not images.is_dir():
        what = "is no folder" if images.exists() else "does not exist"
        raise InvalidInputError(f"the folder of images {images} {what}; give the folder that holds the images")
    lines = _lines(questions)
    if questions.suffix.lower() in (".jsonl", ".ndjson") or lines[0][1].startswith("{"):
        return Work(_from_json_lines(lines, images, questions))
    seen: dict[str, int] = {}
    for number, line in lines:
        place = f"{questions}, line {number}"
        _check_question(line, place)
        if line in seen:
            raise InvalidInputError(f"{place}: the question repeats line {seen[line]}; ask it once")
        seen[line] = number
    found, notes = _images_in(images, questions)
    return Work(tuple(Asked(image, question) for image in found for question in seen), notes)


def check_images(work: Work, progress: Callable[[int, int], None] = lambda done, total: None) -> tuple[str, ...]:
    """Opens every image once; returns what `load_image` remarks about them.

    Raises:
        InvalidInputError: an image that cannot be used, by name.
    """
    notes: list[str] = []
    for number, image in enumerate(work.images):
        notes.extend(load_image(image).notes)
        progress(number + 1, len(work.images))
    return tuple(notes)


def compare(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    work: Work,
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
        work: from `read_work`.
        methods: pruners at budgets below the image's number of tokens.
        prompt: makes a question into a prompt with one image placeholder.
        max_new_tokens: where an answer is cut off at the latest.
        batch_size: questions that are answered at once.
        progress: called with the questions done and the questions in all.

    Raises:
        InvalidInputError: a budget that prunes nothing, a number below 1, an image that cannot be read, a model that
            answers with NaN, or too little memory for the batch.
        MissingSignalError: a pruner requires a signal that the model does not give.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise InvalidInputError(f"{name} must be at least 1, got {value}")
    if not work.asked or not methods:
        raise InvalidInputError("there is nothing to compare; give at least one question and one pruner with a budget")
    for method in methods:
        check_method(method)
    runner = _Runner(model, processor, methods, prompt, max_new_tokens)
    try:
        return runner.run(work, batch_size, progress)
    except torch.OutOfMemoryError:
        raise InvalidInputError(
            f"the device has too little memory for {batch_size} questions at once; give a smaller batch size"
        ) from None


def decide(comparison: Comparison, keep: float) -> tuple[Verdict, ...]:
    """For each pruner, the smallest budget that keeps the wanted agreement, and how sure that is.

    Budgets are tested one after the other from the largest down, each at the full confidence: does the lower bound of
    its agreement reach `keep`? The first that fails ends it, and the last that passed is the answer. A wrong answer
    needs the first budget on the way that is really too small to pass its own test, which happens with at most
    1 - confidence, so no correction for the number of budgets is due (fixed-sequence testing, Maurer, Hothorn and
    Lehmacher 1995). Several pruners share the error equally (Bonferroni).

    Args:
        comparison: from `compare`.
        keep: the wanted share of answers that stay the same, in (0, 1).

    Raises:
        InvalidInputError: `keep` lies outside (0, 1).
    """
    check_keep(keep)
    names = dict.fromkeys(answers.method.name for answers in comparison.answers)
    confidence = 1 - (1 - CONFIDENCE) / len(names)
    return tuple(_verdict(comparison, name, keep, confidence) for name in names)


def check_method(method: Method) -> None:
    """Makes sure that a method can be compared with the unpruned model.

    Raises:
        InvalidInputError: it prunes nothing, reads another text than the question, or has no fixed budget.
    """
    if method.pruner is None:
        raise InvalidInputError("all tokens, and no image, are no pruner to compare; name one, such as dcp")
    if method.text != QUESTION:
        raise InvalidInputError(f"{method.name}: leave out @{method.text}; the pruner reads the question that is asked")
    if method.is_adaptive:
        raise InvalidInputError(
            f"{method.name}: the smallest budget is looked for among fixed ones; leave out max_distance and the range"
        )


def check_keep(keep: float) -> None:
    """Makes sure that `keep` is a share that can be shown.

    Raises:
        InvalidInputError: it is not.
    """
    if not 0 < keep < 1:
        raise InvalidInputError(
            f"the wanted agreement must be a share above 0 and below 1, got {keep}; no number of questions shows 1"
        )


def too_few(work: Work, keep: float, pruners: int = 1) -> str | None:
    """Says, before anything is run, if even complete agreement could not show `keep` with so few images."""
    needed = fewest_images(keep, confidence=1 - (1 - CONFIDENCE) / pruners)
    images = len(work.images)
    if images >= needed:
        return None
    return (
        f"with {_count(images, 'image')} even complete agreement cannot show that {_percent(keep)} of the answers stay "
        f"the same; that takes at least {_count(needed, 'image')}, however many questions are asked about each"
    )


def summarise(comparison: Comparison, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The result file's content but for model and environment: `results` per method, `verdicts`, every answer."""
    work = comparison.work
    sure = {verdict.pruner: verdict.confidence for verdict in verdicts}
    return {
        "images": len(work.images),
        "questions": len(work.asked),
        "all_tokens": asdict(comparison.cost),
        "results": [
            {
                "pruner": answers.method.name,
                "num_tokens": answers.method.num_tokens,
                "agreement": float(answers.same.mean()),
                "agreement_at_least": share_lower_bound(
                    answers.same, work.cluster, confidence=sure[answers.method.name]
                ),
                "confidence": sure[answers.method.name],
                "exact_agreement": float(answers.exact.mean()),
                "kl_first_token_nats": float(answers.divergence.mean()),
                "kl_first_token_nats_median": float(np.median(answers.divergence)),
                "kappa": float(answers.kappa.mean()),
                **asdict(answers.cost),
            }
            for answers in comparison.answers
        ],
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "answers": [
            {
                "image": str(asked.image),
                "question": asked.question,
                "all_tokens": comparison.texts[at],
                "pruned": [
                    {
                        "pruner": answers.method.name,
                        "num_tokens": answers.method.num_tokens,
                        "answer": answers.texts[at],
                        "same": bool(answers.same[at]),
                        "kl_first_token_nats": float(answers.divergence[at]),
                        "kappa": float(answers.kappa[at]),
                    }
                    for answers in comparison.answers
                ],
            }
            for at, asked in enumerate(work.asked)
        ],
    }


@dataclass(frozen=True)
class _Replies:
    texts: list[str]
    first: Float[Tensor, "b w"]
    """Log-probabilities of the first new token."""
    features: Float[Tensor, "b k d"]
    mask: Bool[Tensor, "b k"]


class _Runner:
    """Answers blocks of questions with every method, sharing encoder passes."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        methods: Sequence[Method],
        prompt: Callable[[str], str],
        max_new_tokens: int,
    ) -> None:
        self.model: Any = model
        self.processor = processor
        self.methods = methods
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.image_id: int = self.model.config.image_token_id
        self.stages: dict[Method, Any] = {}
        self.stage_tokens: dict[Any, list[tuple[int, ...]]] = {}
        self.num_tokens = 0

    @torch.inference_mode()
    def run(self, work: Work, batch_size: int, progress: Callable[[int, int], None]) -> Comparison:
        pixels = self._pixels(work.images[:1])
        self._learn(pixels)
        lengths: list[int] = []
        full: list[str] = []
        pruned: list[list[tuple[str, float, float]]] = [[] for _ in self.methods]
        progress(0, len(work.asked))
        for block in _blocks(work.asked, batch_size):
            images = list(dict.fromkeys(asked.image for asked in block))
            passes = self._passes(self._pixels(images))
            for start in range(0, len(block), batch_size):
                batch = block[start : start + batch_size]
                inputs = self._inputs([asked.question for asked in batch])
                lengths.extend(inputs["attention_mask"].sum(dim=1).tolist())
                index = [images.index(asked.image) for asked in batch]
                shared = {stages: encoded.select(index) for stages, encoded in passes.items()}
                reference = self._answer(inputs, ALL, shared[()])
                full.extend(reference.texts)
                for place, method in enumerate(self.methods):
                    replies = self._answer(inputs, _pruner(method), shared[self.stages[method]])
                    divergence = (reference.first.exp() * (reference.first - replies.first)).sum(dim=-1).clamp(min=0)
                    shift = kappa(replies.features, reference.features, kept_mask=replies.mask)
                    pruned[place].extend(zip(replies.texts, divergence.tolist(), shift.float().tolist(), strict=True))
                progress(len(full), len(work.asked))
        costs = self._costs(work, float(np.mean(lengths)))
        plain = [normalised(text) for text in full]
        answers = []
        for method, rows, cost in zip(self.methods, pruned, costs[1:], strict=True):
            texts, divergence, shift = zip(*rows, strict=True)
            answers.append(
                Answers(
                    method,
                    texts,
                    np.array([normalised(text) == other for text, other in zip(texts, plain, strict=True)]),
                    np.array([text == other for text, other in zip(texts, full, strict=True)]),
                    np.array(divergence),
                    np.array(shift),
                    cost,
                )
            )
        return Comparison(work, tuple(full), costs[0], tuple(answers))

    def _learn(self, pixels: Tensor) -> None:
        """What can be known only with a picture at hand: the number of tokens, and each method's stages."""
        self.num_tokens = encode_images(self.model, pixels).tokens.num_original
        for method in self.methods:
            if self._kept(method) >= self.num_tokens:
                raise InvalidInputError(
                    f"{method.name} at {method.num_tokens} tokens prunes nothing, since an image has "
                    f"{self.num_tokens} visual tokens; give smaller budgets"
                )
            self.stages[method] = encoder_stages(self.model, pixels, _pruner(method))

    def _kept(self, method: Method | None) -> int:
        return self.num_tokens if method is None else _pruner(method).budget.resolve(self.num_tokens)

    def _passes(self, pixels: Tensor) -> dict[Any, EncodedImages]:
        """One encoder pass for each configuration of in-encoder stages that any method has; () is the unpruned."""
        groups: dict[Any, list[Pruner]] = {(): []}
        for method, stages in self.stages.items():
            groups.setdefault(stages, []).append(_pruner(method))
        passes = {stages: encode_images(self.model, pixels, *pruners) for stages, pruners in groups.items()}
        for stages, encoded in passes.items():
            self.stage_tokens.setdefault(stages, []).append(encoded.stage_tokens)
        return passes

    def _answer(self, inputs: Mapping[str, Any], pruner: Pruner, encoded: EncodedImages) -> _Replies:
        # Not prune_inputs, which warns of a budget that prunes nothing: here that is the unpruned model, on purpose.
        short = shorten(self.model, inputs, pruner, question=Question(processor=self.processor), encoded=encoded)
        out = self.model.generate(
            **short.inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self._pad_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        first = out.logits[0].float().log_softmax(dim=-1)
        if not torch.isfinite(first).any(dim=-1).all():
            raise InvalidInputError(
                f"the model answers with NaN in {self.model.dtype}; load it in another dtype, such as float32"
            )
        width = short.inputs["input_ids"].shape[1]
        tokenizer = self.processor.tokenizer
        texts = [text.strip() for text in tokenizer.batch_decode(out.sequences[:, width:], skip_special_tokens=True)]
        assert short.features is not None
        assert short.record is not None
        return _Replies(texts, first, short.features, short.record.indices >= 0)

    def _costs(self, work: Work, prefill_tokens: float) -> list[Cost]:
        """The unpruned model's cost, then each method's, on a few questions spread over the work, taking turns."""
        count = min(TIMED, len(work.asked))
        chosen = [work.asked[number * len(work.asked) // count] for number in range(count)]
        variants = [None, *self.methods]
        samples: list[list[tuple[float, int]]] = [[] for _ in variants]
        for number, asked in enumerate([chosen[0], *chosen]):  # the first round pays for one-time work
            inputs = {**self._inputs([asked.question]), "pixel_values": self._pixels([asked.image])}
            for place, method in enumerate(variants):
                sample = self._first_token(inputs, None if method is None else _pruner(method))
                if number > 0:
                    samples[place].append(sample)
        return [
            Cost(
                visual_tokens=kept,
                prefill_tokens=prefill_tokens - self.num_tokens + kept,
                kv_cache_bytes=int(median(size for _, size in taken)),
                prefill_flops=self._flops(round(prefill_tokens) - self.num_tokens, kept, method),
                first_token_ms=median(span for span, _ in taken),
            )
            for method, taken in zip(variants, samples, strict=True)
            for kept in (self._kept(method),)
        ]

    def _first_token(self, inputs: Mapping[str, Any], pruner: Pruner | None) -> tuple[float, int]:
        """Milliseconds to the first new id, and bytes of the cache then."""
        began = self._now()
        question = Question(processor=self.processor)
        call = inputs if pruner is None else shorten(self.model, inputs, pruner, question=question).inputs
        out = self.model(**call, use_cache=True, logits_to_keep=1)
        out.logits[0, -1].argmax().item()
        return self._now() - began, kv_cache_bytes(out.past_key_values)

    def _flops(self, text_tokens: int, kept: int, method: Method | None) -> int | None:
        config = self.model.config
        if not isinstance(config, LlavaConfig):
            return None
        layer: Any = config.vision_feature_layer
        depth: int = config.vision_config.num_hidden_layers  # type: ignore[union-attr]
        stages = () if method is None else self.stages[method]
        # Where the data decide how many tokens a stage keeps, their mean is counted.
        counts = np.mean(self.stage_tokens[stages], axis=0).round().astype(int).tolist()
        return llava_prefill_flops(
            config,
            text_tokens=text_tokens,
            visual_tokens=kept,
            stages=[(stage.layer, count) for stage, count in zip(stages, counts, strict=True)],
            # The model computes its whole encoder; a pruned call stops at the layer whose features are read.
            encoder_layers=None if method is None else layer if layer >= 0 else depth + 1 + layer,
        ).total

    def _pixels(self, images: Sequence[Path]) -> Float[Tensor, "i c y x"]:
        pictures: list[Image.Image] = [load_image(image).image for image in images]
        pixels = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    def _inputs(self, questions: Sequence[str]) -> dict[str, Tensor]:
        """The prompts with a placeholder for each visual token, padded on the left as decoders want it."""
        tokenizer = self.processor.tokenizer
        rows = []
        for question in questions:
            text = self.prompt(question)
            # Some templates write the first token themselves.
            twice = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
            ids: list[int] = tokenizer(text, add_special_tokens=not twice)["input_ids"]
            if ids.count(self.image_id) != 1:
                raise InvalidInputError(
                    f"the model's chat template does not give one image placeholder for the question {question!r}; "
                    "use the processor that belongs to the model"
                )
            at = ids.index(self.image_id)
            rows.append([*ids[:at], *[self.image_id] * self.num_tokens, *ids[at + 1 :]])
        width = max(map(len, rows))
        padded = torch.tensor([[self._pad_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": padded.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    @property
    def _pad_id(self) -> int:
        tokenizer = self.processor.tokenizer
        known = (tokenizer.pad_token_id, self.model.generation_config.pad_token_id, tokenizer.eos_token_id)
        return next((each for each in known if each is not None), 0)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter() * 1e3


def _pruner(method: Method) -> Pruner:
    assert method.pruner is not None  # see check_method
    return method.pruner


def _blocks(asked: Sequence[Asked], batch_size: int) -> Iterator[list[Asked]]:
    """Whole images with all their questions, as few as fill a batch: no image is encoded twice."""
    block: list[Asked] = []
    for _, group in itertools.groupby(asked, key=lambda each: each.image):
        block.extend(group)
        if len(block) >= batch_size:
            yield block
            block = []
    if block:
        yield block


def _verdict(comparison: Comparison, name: str, keep: float, confidence: float) -> Verdict:
    cluster = comparison.work.cluster
    mine = [answers for answers in comparison.answers if answers.method.name == name]
    largest_first = sorted(mine, key=lambda answers: -_budget(answers))
    passed: list[tuple[Answers, float]] = []
    failed = None
    for answers in largest_first:
        bound = share_lower_bound(answers.same, cluster, confidence=confidence)
        if bound < keep:
            failed = answers
            break
        passed.append((answers, bound))
    measured = [*itertools.takewhile(lambda answers: answers.same.mean() >= keep, largest_first)]
    needed = None if failed is None else images_needed(failed.same, cluster, keep, confidence=confidence)
    sentences = [f"no budget was shown to keep {_percent(keep)} of the answers"]
    if passed:
        sentences = [_shown(comparison, *passed[-1], keep, confidence)]
    if failed is not None:
        sentences.append(_not_shown(comparison, failed, keep, needed))
    if measured and measured[-1] not in (failed, *(answers for answers, _ in passed)):
        sentences.append(f"Here {_budget(measured[-1])} tokens were enough, which may be luck")
    return Verdict(
        pruner=name,
        keep=keep,
        confidence=confidence,
        num_tokens=_budget(passed[-1][0]) if passed else None,
        tested=tuple(_budget(answers) for answers in (*(answers for answers, _ in passed), failed) if answers),
        measured=_budget(measured[-1]) if measured else None,
        images_needed=needed,
        sentence=f"{name}: {'. '.join(sentences)}.",
    )


def _budget(answers: Answers) -> int:
    assert answers.method.num_tokens is not None  # see check_method
    return answers.method.num_tokens


def _shown(comparison: Comparison, answers: Answers, bound: float, keep: float, confidence: float) -> str:
    return (
        f"{_budget(answers)} of {comparison.cost.visual_tokens} visual tokens keep at least {_percent(keep)} of the "
        f"answers: {_percent(answers.same.mean())} of {_count(len(answers.same), 'answer')} stayed the same, and with "
        f"{_percent(confidence)} confidence at least {_percent(bound, down=True)} do on images like these"
    )


def _not_shown(comparison: Comparison, answers: Answers, keep: float, needed: int | None) -> str:
    share, images = float(answers.same.mean()), len(comparison.work.images)
    seen = f"At {_budget(answers)} tokens {_percent(share)} stayed the same"
    if share < keep:
        return f"{seen}, less than wanted"
    if needed is None:
        return f"{seen}, too close to {_percent(keep)} for any sensible number of images to decide"
    questions = round(needed * len(answers.same) / images)
    return (
        f"{seen}, on too few images to be sure: if it goes on like this, about {_count(needed, 'image')} with "
        f"{_count(questions, 'question')} would show it; there were {images:,} with {len(answers.same):,}"
    )


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that hold something, with their numbers from 1."""
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise InvalidInputError(f"the file of questions {path} {what}; give a text file or JSON lines")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidInputError(f"{path}, line {line}: this is no UTF-8 text; save the file as UTF-8") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InvalidInputError(f"the file of questions {path} is empty; write one question on each line")
    return lines


def _from_json_lines(lines: Sequence[tuple[int, str]], images: Path, path: Path) -> tuple[Asked, ...]:
    seen: dict[Asked, int] = {}
    for number, line in lines:
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidInputError(
                f"{place}: this is no JSON ({error.msg} at column {error.colno}); write one object a line, such as "
                '{"image": "cat.jpg", "question": "what color is the cat ?"}'
            ) from None
        if not isinstance(row, dict):
            raise InvalidInputError(f"{place}: expected an object with image and question, got {_type(row)}")
        for key in ("image", "question"):
            if key not in row:
                raise InvalidInputError(f"{place}: there is no {key}; each line needs image and question")
            if not isinstance(row[key], str):
                raise InvalidInputError(f"{place}: {key} must be a text, got {_type(row[key])}")
        _check_question(row["question"], place)
        image = images / row["image"]
        if not row["image"].strip() or not image.is_file():
            raise InvalidInputError(f"{place}: the image {image} does not exist; paths start at {images}")
        if image.suffix.lower() not in _extensions():
            raise InvalidInputError(f"{place}: {image} does not end like an image; give a PNG, JPEG, WebP, GIF or TIFF")
        asked = Asked(image, row["question"].strip())
        if asked in seen:
            raise InvalidInputError(f"{place}: this image and question repeat line {seen[asked]}; ask it once")
        seen[asked] = number
    first = {asked.image: at for at, asked in reversed([*enumerate(seen)])}
    return tuple(sorted(seen, key=lambda asked: first[asked.image]))


def _images_in(folder: Path, questions: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The images of a folder by name, and a remark about what else lies there."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found = tuple(path for path in files if path.suffix.lower() in _extensions())
    if not found:
        raise InvalidInputError(
            f"the folder {folder} holds no images; put PNG, JPEG, WebP, GIF or TIFF files directly into it, or name "
            "files of its subfolders in JSON lines"
        )
    others = [path.name for path in files if path not in set(found) and path.resolve() != questions.resolve()]
    folders = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    left_out = [*others, *(f"{name}/" for name in folders)]
    if not left_out:
        return found, ()
    shown = ", ".join(left_out[:3]) + (f" and {len(left_out) - 3} more" if len(left_out) > 3 else "")
    return found, (f"{shown} in {folder}: not asked about, being no image files",)


def _extensions() -> frozenset[str]:
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _check_question(question: str, place: str) -> None:
    if not question.strip():
        raise InvalidInputError(f"{place}: the question is empty")
    if MARKER in question:
        raise InvalidInputError(f"{place}: the question holds {MARKER}; take it out, the image is added for you")


def _type(value: object) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "a text")


def _percent(share: float, *, down: bool = False) -> str:
    """With one decimal if need be; `down` never claims more than there is."""
    tenths = math.floor(1000 * share + 1e-9) if down else round(1000 * share)
    return f"{tenths / 10:.1f}".removesuffix(".0") + " %"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
