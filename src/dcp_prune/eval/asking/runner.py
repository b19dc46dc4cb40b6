"""The one runner behind every evaluation: methods answer questions about images and share whatever they can.

An image is encoded once for all questions and all methods that need the same encoder pass; a pruner that does not read
the question selects once per image; where one new token is the answer, such an image is prefilled once as well.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.asking.distances import Reference, check_distances
from dcp_prune.eval.specs import QUESTION, Method, TextCondition
from dcp_prune.integrations.transformers import (
    EncodedImages,
    embed_question,
    encode_images,
    encoder_stages,
    image_features_as_inputs,
    prune_inputs,
    unpruned_features,
)
from dcp_prune.pruners.base import Pruner
from dcp_prune.pruners.cls_attention import ClsAttentionPruner
from dcp_prune.tokens import Signal, VisualTokens

Work = TypeVar("Work")

_CACHED_NUMBERS = 1_500_000
"""Numbers of all n x n matrices that a text-aware pruner works on at once on a CPU; more would leave the cache, which
costs several times as much as the smaller batch (measured with 576 tokens)."""
_PASS_TOKENS = 24
"""What a pass of the language model costs beside its tokens, in tokens; decides which prompts share one pass."""


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        key: its id; noise is drawn from it.
        image: position of its image in the batch.
        text: the question itself, as a pruner may read it.
        prompt: what the language model reads, with one image placeholder.
        wrong: the question of the same slot of another image; needed by the condition `wrong` only.
        picture, task, truths: what its record says: the image's name, the task, and what would be right.
    """

    key: str
    image: int
    text: str
    prompt: str
    wrong: str | None = None
    picture: str = ""
    task: str = ""
    truths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answered:
    """What one method made of a batch of q questions.

    Attributes:
        method: who.
        kept: visual tokens that the language model read. `q`.
        words: ids of the first new token. `q`.
        answers: what was generated, decoded.
        kappa: of the features that reached the language model, against an unpruned encoder pass; None without an image.
            `q`.
        distances: by column name (`eval.NAME`, `run.NAME`), those that were asked for. `q` each.
        seconds: spent on its own selection and prefill, and on the encoder pass that it used, which others may share.
    """

    method: Method
    kept: Int[np.ndarray, "q"]
    words: Int[np.ndarray, "q"]
    answers: tuple[str, ...]
    kappa: Float[np.ndarray, "q"] | None
    distances: dict[str, Float[np.ndarray, "q"]]
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Visual tokens of the question that has most."""
        return int(self.kept.max())


@dataclass(frozen=True)
class _Kept:
    """The visual tokens that the language model reads: one row per image, or one per question; `prompt` are the same
    with the separators that an unpruned prompt may hold."""

    features: Float[Tensor, "r k d"]
    mask: Bool[Tensor, "r k"]
    by_question: bool
    prompt: Float[Tensor, "r l d"] | None = None

    @classmethod
    def join(cls, rows: Sequence[Float[Tensor, "k d"]]) -> _Kept:
        """One row per question, padded to the longest."""
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        features = pad_sequence(list(rows), batch_first=True)
        return cls(features, torch.arange(features.shape[1], device=lengths.device) < lengths.unsqueeze(1), True)

    @property
    def lengths(self) -> Int[Tensor, " r"]:
        """How many tokens each row has."""
        return self.mask.sum(dim=1)


class Runner:
    """Lets every method answer batches of questions.

    Args:
        model: with an adapter, in evaluation mode.
        processor: its processor.
        methods: from `plan`.
        distances: names in `eval.asking.distances.DISTANCE_NAMES`, to be measured beside kappa.
        max_new_tokens: None takes the most likely first token as the answer, and prefills an image once for all its
            questions; a number generates greedily, at most as many tokens.

    Raises:
        InvalidInputError: an unknown distance.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        methods: Sequence[Method],
        *,
        distances: Sequence[str] = (),
        max_new_tokens: int | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.methods = tuple(methods)
        self.distances = check_distances(distances)
        self.max_new_tokens = max_new_tokens
        self.tokenizer = processor.tokenizer
        self.image_id: int = model.config.image_token_id  # type: ignore[attr-defined]
        self._stages: dict[Method, Any] = {}

    @torch.inference_mode()
    def run(self, images: Sequence[Any], asked: Sequence[Question]) -> Iterator[Answered]:
        """What each method makes of these questions, in the order of the methods; `images` are RGB."""
        batch = _Batch(self, images, asked)
        passes = self._passes(batch)
        full = passes[()][0]  # no stages: what the model sees unpruned
        for method in self.methods:
            encoded, spent = passes[self._stages[method]]
            (words, answers, kept), seconds = _timed(
                lambda method=method, encoded=encoded: self._answer(method, encoded, batch)
            )
            shift, measured = None, {}
            if kept is not None:
                shift = self._kappa(kept, full.tokens, batch)
                measured = self._measure(method, kept, full.tokens, encoded.tokens, batch)
            yield Answered(
                method=method,
                kept=_of_questions(kept, batch),
                words=words.cpu().numpy(),
                answers=answers,
                kappa=shift,
                distances=measured,
                seconds=seconds + spent,
            )

    def _passes(self, batch: _Batch) -> dict[Any, tuple[EncodedImages, float]]:
        """One encoder pass, and its seconds, for each configuration of in-encoder stages that any method has."""
        for method in self.methods:  # which stages a pruner has is for the encoder's depth to say
            if method not in self._stages:
                self._stages[method] = (
                    () if method.pruner is None else encoder_stages(self.model, batch.pixels, method.pruner)
                )
        # The distances' weights want the [CLS] attention of the full pass.
        groups: dict[Any, list[Pruner]] = {(): [ClsAttentionPruner(num_tokens=1)] if self.distances else []}
        for method in self.methods:
            groups.setdefault(self._stages[method], []).extend([] if method.pruner is None else [method.pruner])
        return {
            stages: _timed(
                lambda pruners=pruners: encode_images(self.model, batch.pixels, *pruners, **batch.image_details)
            )
            for stages, pruners in groups.items()
        }

    def _answer(
        self, method: Method, encoded: EncodedImages, batch: _Batch
    ) -> tuple[Int[Tensor, "q"], tuple[str, ...], _Kept | None]:
        if self.max_new_tokens is not None:
            return self._generate(method, encoded, batch, self.max_new_tokens)
        kept = self._select(method, encoded, batch)
        if kept is None or kept.by_question:
            words = self._first_word(kept, batch)
        else:
            words = self._first_word_after_image(kept.features if kept.prompt is None else kept.prompt, batch)
        return words, tuple(self.tokenizer.batch_decode(words.unsqueeze(1), skip_special_tokens=True)), kept

    def _select(self, method: Method, encoded: EncodedImages, batch: _Batch) -> _Kept | None:
        if method.num_tokens == 0:
            return None
        pruner, tokens = method.pruner, encoded.tokens
        if pruner is None or pruner.budget.fewest(tokens.num_original) >= tokens.features.shape[1]:
            prompt = None if encoded.stages else torch.stack(unpruned_features(self.model, encoded))
            return _Kept(tokens.features, tokens.mask, by_question=False, prompt=prompt)
        if not method.reads_text:
            pruned = pruner(tokens)
            return _Kept(pruned.features, pruned.mask, by_question=False)
        text, words = batch.text(method)
        pieces = []
        for rows in torch.arange(len(batch.asked), device=tokens.features.device).split(self._rows_at_once(tokens)):
            piece = EncodedImages(tokens).select(batch.index[rows]).tokens
            if text is not None and words is not None:
                piece = replace(piece, text=text[rows], text_mask=words[rows])
            pruned = pruner(piece)
            pieces.extend(features[mask] for features, mask in zip(pruned.features, pruned.mask, strict=True))
        return _Kept.join(pieces)

    def _rows_at_once(self, tokens: VisualTokens) -> int:
        if tokens.features.device.type != "cpu":
            return 64
        return max(1, _CACHED_NUMBERS // tokens.features.shape[1] ** 2)

    def _first_word_after_image(self, features: Float[Tensor, "i k d"], batch: _Batch) -> Int[Tensor, "q"]:
        """The image is prefilled once, its questions continue from copies of the cache."""
        images, k, _ = features.shape
        before = [*batch.ids[0][: batch.ids[0].index(self.image_id)], *[self.image_id] * k]
        prefix = torch.tensor([before] * images, device=self.model.device)
        inputs = image_features_as_inputs(self.model, features)
        cache: Any = self.model(input_ids=prefix, use_cache=True, logits_to_keep=1, **inputs).past_key_values
        tails = [row[row.index(self.image_id) + 1 :] for row in batch.ids]
        words = torch.empty(len(tails), dtype=torch.long, device=prefix.device)
        for group in _groups_of_similar_length([len(tail) for tail in tails]):
            ids, real = self._padded([tails[place] for place in group])
            rows = torch.tensor(group, device=prefix.device)
            own = _rows_of_cache(cache, batch.index[rows], self.model.config)
            mask = None
            if not real.all():
                mask = torch.cat((real.new_ones(len(group), prefix.shape[1]), real), dim=1)
            logits = self.model(input_ids=ids, attention_mask=mask, past_key_values=own).logits
            last = real.sum(dim=1) - 1
            words[rows] = logits[torch.arange(len(group), device=ids.device), last].argmax(dim=-1)
        return words

    def _first_word(self, kept: _Kept | None, batch: _Batch) -> Int[Tensor, "q"]:
        lengths = [0] * len(batch.ids) if kept is None else kept.lengths.tolist()
        lines = [self._expanded(row, k) for row, k in zip(batch.ids, lengths, strict=True)]
        words = torch.empty(len(lines), dtype=torch.long, device=self.model.device)
        for group in _groups_of_similar_length([len(line) for line in lines]):
            ids, real = self._padded([lines[place] for place in group])
            inputs = {}
            if kept is not None:
                inputs = image_features_as_inputs(self.model, [kept.features[row, : lengths[row]] for row in group])
            mask = None if real.all() else real
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits
            last = real.sum(dim=1) - 1
            words[group] = logits[torch.arange(len(group), device=ids.device), last].argmax(dim=-1)
        return words

    def _generate(
        self, method: Method, encoded: EncodedImages, batch: _Batch, max_new_tokens: int
    ) -> tuple[Int[Tensor, "q"], tuple[str, ...], _Kept | None]:
        tokens = encoded.select(batch.index)
        kept: _Kept | None = None
        if method.num_tokens == 0:
            inputs = batch.inputs(with_image=False)
        else:
            inputs = batch.inputs(with_image=True)
            kept = _Kept(tokens.tokens.features, tokens.tokens.mask, by_question=True)
            pruner = method.pruner
            if pruner is not None and (
                tokens.stages or pruner.budget.fewest(tokens.tokens.num_original) < kept.features.shape[1]
            ):
                text, words = batch.text(method) if method.reads_text else (None, None)
                if text is not None:
                    tokens = replace(tokens, tokens=replace(tokens.tokens, text=text, text_mask=words))
                no_text = "" if method.text.kind == "none" else None
                short = prune_inputs(self.model, inputs, pruner, processor=self.processor, text=no_text, encoded=tokens)
                inputs = short.inputs
                assert short.features is not None
                rows = zip(short.features, short.lengths, strict=True)
                kept = _Kept.join([features[:length] for features, length in rows])
            else:
                inputs = {
                    **{name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")},
                    **image_features_as_inputs(self.model, unpruned_features(self.model, tokens)),
                }
        generate: Any = self.model.generate
        ids = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return ids[:, 0], tuple(answer.strip() for answer in answers), kept

    def _measure(
        self, method: Method, kept: _Kept, full: VisualTokens, at_hand: VisualTokens, batch: _Batch
    ) -> dict[str, Float[np.ndarray, "q"]]:
        """`eval.NAME` against the unpruned pass with the right question; `run.NAME` against what the pruner chose from,
        with the question that it saw."""
        if not self.distances:
            return {}
        right = batch.reference(full, QUESTION)
        seen = batch.reference(at_hand, method.text if method.reads_text else QUESTION)
        first = right.distances(self.distances, kept.features, kept.mask, by_question=kept.by_question)
        then = first
        if seen is not right:
            then = seen.distances(self.distances, kept.features, kept.mask, by_question=kept.by_question)
        return {
            f"{place}.{name}": values.cpu().numpy()
            for place, found in (("eval", first), ("run", then))
            for name, values in found.items()
        }

    def _kappa(self, kept: _Kept, full: VisualTokens, batch: _Batch) -> Float[np.ndarray, "q"]:
        if kept.features.shape[1] == full.features.shape[1] and kept.mask.all():
            return np.zeros(len(batch.asked), dtype=np.float32)
        found = batch.reference(full, QUESTION).distances(
            ("kappa",), kept.features, kept.mask, by_question=kept.by_question
        )
        return found["kappa"].cpu().numpy()

    def _expanded(self, row: Sequence[int], num_tokens: int) -> list[int]:
        at = list(row).index(self.image_id)
        return [*row[:at], *[self.image_id] * num_tokens, *row[at + 1 :]]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "r l"], Int[Tensor, "r l"]]:
        """Rows of ids padded on the right, and what is real of them."""
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=self.model.device)
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.model.device)
        return ids, real


class _Batch:
    """Images with their questions, and what methods share of them."""

    def __init__(self, runner: Runner, images: Sequence[Any], asked: Sequence[Question]) -> None:
        model, processor = runner.model, runner.processor
        self.runner = runner
        self.images = images
        self.asked = asked
        made = dict(processor.image_processor(list(images), return_tensors="pt"))
        self.pixels = made.pop("pixel_values").to(model.device, model.dtype)
        self.image_details: dict[str, Any] = made
        self.index = torch.tensor([question.image for question in asked], device=model.device)
        self.ids: list[list[int]] = processor.tokenizer([question.prompt for question in asked])["input_ids"]
        self._texts: dict[TextCondition, tuple[Tensor | None, Tensor | None]] = {}
        self._references: dict[tuple[int, TextCondition], Reference] = {}
        self._inputs: dict[bool, dict[str, Any]] = {}

    def text(self, method: Method) -> tuple[Tensor | None, Tensor | None]:
        """The words that this method's pruner reads, `q t d`, and which are words, `q t`; None for no text at all."""
        found = self._text(method.text)
        if found[0] is None and method.pruner is not None and Signal.TEXT in method.pruner.requires:
            # Who cannot do without a text gets one without words.
            embeddings = self._text(QUESTION)[0]
            assert embeddings is not None
            return torch.zeros_like(embeddings[:, :1]), torch.zeros_like(embeddings[:, :1, 0], dtype=torch.bool)
        return found

    def _text(self, condition: TextCondition) -> tuple[Tensor | None, Tensor | None]:
        if condition not in self._texts:
            self._texts[condition] = self._read(condition)
        return self._texts[condition]

    def _read(self, condition: TextCondition) -> tuple[Tensor | None, Tensor | None]:
        if condition.kind == "none":
            return None, None
        if condition.kind == "wrong":
            lines = [question.wrong for question in self.asked]
            if None in lines:
                raise InvalidInputError(
                    "the condition @wrong needs questions about another image, but there is no other; leave it out"
                )
        else:
            lines = [question.text for question in self.asked]
        text, words = embed_question(self.runner.model, self.runner.processor, [str(line) for line in lines])
        if condition.kind == "noise" and text is not None:
            text = blend_with_noise(text, condition.noise, [question.key for question in self.asked])
        return text, words

    def reference(self, tokens: VisualTokens, condition: TextCondition) -> Reference:
        key = (id(tokens.features), condition)  # the tokens live as long as the batch
        if key not in self._references:
            self._references[key] = Reference(tokens, self.index, *self._text(condition))
        return self._references[key]

    def inputs(self, *, with_image: bool) -> dict[str, Any]:
        """What the processor makes of the prompts, padded on the left."""
        if with_image not in self._inputs:
            marker = self.runner.tokenizer.convert_ids_to_tokens(self.runner.image_id)
            prompts = [question.prompt for question in self.asked]
            if with_image:
                images = [self.images[question.image] for question in self.asked]
                made = self.runner.processor(
                    images=images, text=prompts, return_tensors="pt", padding=True, padding_side="left"
                )
            else:
                bare = [" ".join(prompt.replace(marker, " ").split()) for prompt in prompts]
                made = self.runner.tokenizer(bare, return_tensors="pt", padding=True, padding_side="left")
            made = made.to(self.runner.model.device)
            if "pixel_values" in made:
                made["pixel_values"] = made["pixel_values"].to(self.runner.model.dtype)
            self._inputs[with_image] = dict(made)
        return dict(self._inputs[with_image])


def blend_with_noise(text: Float[Tensor, "q t d"], share: float, keys: Sequence[str]) -> Float[Tensor, "q t d"]:
    """Word embeddings turned towards noise: (1 - share) * direction + share * random direction, norms kept.

    The noise of a question is drawn from its key, so it is the same for every share and on every device.
    """
    noise = torch.empty(text.shape, dtype=torch.float32)
    for row, key in zip(noise, keys, strict=True):
        row.normal_(generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    direction = torch.nn.functional.normalize(text.float(), dim=-1)
    mixed = (1.0 - share) * direction + share * torch.nn.functional.normalize(noise.to(text.device), dim=-1)
    return (torch.nn.functional.normalize(mixed, dim=-1) * text.float().norm(dim=-1, keepdim=True)).to(text.dtype)


def _of_questions(kept: _Kept | None, batch: _Batch) -> Int[np.ndarray, "q"]:
    """Visual tokens that each question's prompt holds."""
    if kept is None:
        return np.zeros(len(batch.asked), dtype=np.int64)
    lengths = kept.lengths if kept.by_question else kept.lengths[batch.index]
    return lengths.cpu().numpy()


def _rows_of_cache(cache: Any, rows: Int[Tensor, "q"], config: Any) -> Any:
    """A cache of its own for some rows; the given one stays as it is."""
    from transformers import DynamicCache

    own = DynamicCache(config=config.get_text_config(decoder=True))
    for number, layer in enumerate(cache.layers):
        own.update(layer.keys[rows], layer.values[rows], number)
    return own


def _groups_of_similar_length(lengths: Sequence[int]) -> list[list[int]]:
    """Places of rows that share a pass, so that padding and the passes' own cost are least together."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    cuts = [0] + [at for at in range(1, len(order)) if lengths[order[at]] > lengths[order[at - 1]]] + [len(order)]
    best: dict[int, tuple[float, int]] = {0: (0.0, 0)}  # cut -> least cost of all before it, and the cut before it
    for number, end in enumerate(cuts[1:], start=1):
        best[end] = min(
            (best[start][0] + _PASS_TOKENS + (end - start) * lengths[order[end - 1]], start) for start in cuts[:number]
        )
    groups: list[list[int]] = []
    end = len(order)
    while end > 0:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups


def _timed(work: Callable[[], Work]) -> tuple[Work, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began
