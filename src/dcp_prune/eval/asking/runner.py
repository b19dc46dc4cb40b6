"""The one runner behind every answer: an image is encoded once, pruned in many ways, and the language model is asked.

Methods and questions share whatever they can: an encoder pass belongs to its in-encoder stages; a pruner that does not
read the question selects once per image; where one new token is the answer, such an image is prefilled once as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteriaList

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.asking.batch import Batch, Question, groups_of_similar_length, padded
from dcp_prune.eval.asking.distances import check_distances
from dcp_prune.eval.specs import QUESTION, Method
from dcp_prune.integrations.transformers import (
    EncodedImages,
    PruneRecord,
    encode_images,
    encoder_stages,
    get_adapter,
    image_features_as_inputs,
    prune_inputs,
    unpruned_features,
)
from dcp_prune.profiling.first_token import TokenClock, now
from dcp_prune.pruners.base import Pruner
from dcp_prune.pruners.cls_attention import ClsAttentionPruner
from dcp_prune.tokens import VisualTokens

__all__ = ["Answered", "Question", "Runner", "Seen"]

_CACHED_NUMBERS = 1_500_000
"""Numbers of all n x n matrices that a text-aware pruner works on at once on a CPU; more would leave the cache, which
costs several times as much as the smaller batch (measured with 576 tokens)."""
_PASS_TOKENS = 24
"""What a pass of the language model costs beside its tokens, in tokens; decides which prompts share one pass."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Images that were encoded once, for every method and question.

    Attributes:
        images: RGB.
        pixels: what entered the encoder.
        stages: what each method's pruner drops inside the encoder.
        passes: one encoder pass, and its milliseconds, for each configuration of stages; () is what the model sees
            unpruned.
    """

    images: Sequence[Any]
    pixels: Float[Tensor, "i *tiles c y x"]
    stages: Mapping[Method, Any]
    passes: Mapping[Any, tuple[EncodedImages, float]]

    @property
    def full(self) -> VisualTokens:
        """All tokens."""
        return self.passes[()][0].tokens


@dataclass(frozen=True)
class Answered:
    """What one method made of a batch of q questions.

    Attributes:
        method: who.
        kept: visual tokens that the language model read. `q`.
        prompt_tokens: of the prompt, visual tokens included. `q`.
        words: ids of the first new token. `q`.
        answers: what was generated, decoded.
        kappa: of the features that reached the language model, against an unpruned encoder pass; None without an image.
            `q`.
        distances: by column name (`eval.NAME`, `run.NAME`), those that were asked for. `q` each.
        log_probs: of the first new token, where they were asked for. `q w`.
        record: what the pruner did, where answers are generated.
        encode_ms: of the encoder pass, which others may share.
        first_token_ms: spent up to the first new token, the encoder pass included.
        seconds: spent in all, likewise.
    """

    method: Method
    kept: Int[np.ndarray, "q"]
    prompt_tokens: Int[np.ndarray, "q"]
    words: Int[np.ndarray, "q"]
    answers: tuple[str, ...]
    kappa: Float[np.ndarray, "q"] | None
    distances: dict[str, Float[np.ndarray, "q"]]
    log_probs: Float[Tensor, "q w"] | None
    record: PruneRecord | None
    encode_ms: float
    first_token_ms: float
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
    prompt: Sequence[Float[Tensor, "l d"]] | None = None

    @classmethod
    def join(cls, rows: Sequence[Float[Tensor, "k d"]]) -> _Kept:
        """One row per question, padded to the longest."""
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        features = pad_sequence(list(rows), batch_first=True)
        return cls(features, torch.arange(features.shape[1], device=lengths.device) < lengths.unsqueeze(1), True)

    def lengths(self, index: Int[Tensor, "q"]) -> Int[Tensor, "q"]:
        """How many tokens each question's image keeps."""
        lengths = self.mask.sum(dim=1)
        return lengths if self.by_question else lengths[index]


@dataclass(frozen=True)
class _Reply:
    """What came out of the language model."""

    kept: _Kept | None
    prompt_tokens: Int[Tensor, "q"]
    words: Int[Tensor, "q"]
    answers: Sequence[str]
    log_probs: Float[Tensor, "q w"] | None = None
    record: PruneRecord | None = None
    first_token_at: float | None = None


class Runner:
    """Lets every method answer batches of questions.

    Args:
        model: with an adapter, in evaluation mode.
        processor: its processor.
        methods: from `plan`.
        distances: names in `eval.asking.distances.DISTANCE_NAMES`, to be measured beside kappa.
        max_new_tokens: None takes the most likely first token as the answer, and prefills an image once for all its
            questions; a number generates greedily, at most as many tokens.
        log_probs: whether those of the first new token are wanted; needs `max_new_tokens`.
        saliency: whether the attention of [CLS] in the unpruned pass is wanted.

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
        log_probs: bool = False,
        saliency: bool = False,
    ) -> None:
        self.model: Any = model
        self.processor = processor
        self.methods = tuple(methods)
        self.distances = check_distances(distances)
        self.max_new_tokens = max_new_tokens
        self.log_probs = log_probs
        self.saliency = saliency or bool(self.distances)  # the distances' weights want it
        self.tokenizer = processor.tokenizer
        self.image_id: int = self.model.config.image_token_id

    @torch.inference_mode()
    def look(self, images: Sequence[Any]) -> Seen:
        """Encodes images, RGB, once for all methods.

        Raises:
            MissingSignalError: a pruner requires a signal that the model does not give.
        """
        details = dict(self.processor.image_processor(list(images), return_tensors="pt"))
        pixels = details.pop("pixel_values").to(self.model.device, self.model.dtype)
        plans: dict[Method, Any] = {}
        groups: dict[Any, list[Pruner]] = {(): [ClsAttentionPruner(num_tokens=1)] if self.saliency else []}
        for method in self.methods:  # which stages a pruner has is for the encoder's depth to say
            pruner = method.pruner
            if pruner is not None:
                get_adapter(self.model).check_signals(type(pruner).__name__, pruner.requires)
            plans[method] = () if pruner is None else encoder_stages(self.model, pixels, pruner)
            groups.setdefault(plans[method], []).extend([] if pruner is None else [pruner])
        passes = {}
        for stages, pruners in groups.items():
            began = now(self.model.device)
            encoded = encode_images(self.model, pixels, *pruners, **details)
            passes[stages] = encoded, now(self.model.device) - began
        return Seen(images, pixels, plans, passes)

    @torch.inference_mode()
    def ask(self, seen: Seen, questions: Sequence[Question]) -> Iterator[Answered]:
        """What each method makes of these questions, in the order of the methods.

        Args:
            seen: images that were encoded for these methods, by this runner or another one.
            questions: about them.

        Raises:
            InvalidInputError: a condition wants the question of another image and there is none; the model answers with
                NaN.
        """
        batch = Batch(self.model, self.processor, seen.images, questions)
        for method in self.methods:
            encoded, spent = seen.passes[seen.stages[method]]
            began = now(self.model.device)
            reply = self._answer(method, encoded, batch)
            took = now(self.model.device) - began
            kept = reply.kept
            lengths = torch.zeros_like(batch.index) if kept is None else kept.lengths(batch.index)
            yield Answered(
                method=method,
                kept=lengths.cpu().numpy(),
                prompt_tokens=reply.prompt_tokens.cpu().numpy(),
                words=reply.words.cpu().numpy(),
                answers=tuple(reply.answers),
                kappa=None if kept is None else self._kappa(kept, seen.full, batch),
                distances={} if kept is None else self._measure(method, kept, seen.full, encoded.tokens, batch),
                log_probs=reply.log_probs,
                record=reply.record,
                encode_ms=spent,
                first_token_ms=spent + (took if reply.first_token_at is None else reply.first_token_at - began),
                seconds=(spent + took) / 1e3,
            )

    def run(self, images: Sequence[Any], questions: Sequence[Question]) -> Iterator[Answered]:
        """`look`, then `ask`."""
        return self.ask(self.look(images), questions)

    def _answer(self, method: Method, encoded: EncodedImages, batch: Batch) -> _Reply:
        if self.max_new_tokens is not None:
            return self._generate(method, encoded, batch, self.max_new_tokens)
        kept = self._select(method, encoded, batch)
        if kept is None or kept.by_question:
            lengths, words = self._first_word(kept, batch)
        else:
            lengths, words = self._first_word_after_image(torch.stack([*(kept.prompt or kept.features)]), batch)
        answers = self.tokenizer.batch_decode(words.unsqueeze(1), skip_special_tokens=True)
        return _Reply(kept, lengths, words, answers)

    def _select(self, method: Method, encoded: EncodedImages, batch: Batch) -> _Kept | None:
        if method.num_tokens == 0:
            return None
        pruner, tokens = method.pruner, encoded.tokens
        if pruner is None or pruner.budget.fewest(tokens.num_original) >= tokens.features.shape[1]:
            prompt = None if encoded.stages else unpruned_features(self.model, encoded)
            return _Kept(tokens.features, tokens.mask, by_question=False, prompt=prompt)
        if not method.reads_text:
            pruned = pruner(tokens)
            return _Kept(pruned.features, pruned.mask, by_question=False)
        text, words = batch.text(method)
        on_cpu = tokens.features.device.type == "cpu"
        at_once = max(1, _CACHED_NUMBERS // tokens.features.shape[1] ** 2) if on_cpu else 64
        pieces = []
        for rows in torch.arange(len(batch.questions), device=tokens.features.device).split(at_once):
            piece = EncodedImages(tokens).select(batch.index[rows]).tokens
            if text is not None and words is not None:
                piece = replace(piece, text=text[rows], text_mask=words[rows])
            pruned = pruner(piece)
            pieces.extend(features[mask] for features, mask in zip(pruned.features, pruned.mask, strict=True))
        return _Kept.join(pieces)

    def _first_word_after_image(
        self, features: Float[Tensor, "i k d"], batch: Batch
    ) -> tuple[Int[Tensor, "q"], Int[Tensor, "q"]]:
        """Lengths of the prompts, and words; the image is prefilled once, its questions go on from copies of the
        cache."""
        images, k, _ = features.shape
        before = [*batch.ids[0][: batch.ids[0].index(self.image_id)], *[self.image_id] * k]
        prefix = torch.tensor([before] * images, device=self.model.device)
        inputs = image_features_as_inputs(self.model, features)
        cache: Any = self.model(input_ids=prefix, use_cache=True, logits_to_keep=1, **inputs).past_key_values
        tails = [row[row.index(self.image_id) + 1 :] for row in batch.ids]

        def logits(group: Sequence[int], ids: Tensor, real: Bool[Tensor, "r l"]) -> Tensor:
            own = DynamicCache(config=self.model.config.get_text_config(decoder=True))
            for number, layer in enumerate(cache.layers):
                rows = batch.index[group]
                own.update(layer.keys[rows], layer.values[rows], number)
            mask = None
            if not real.all():
                mask = torch.cat((real.new_ones(len(group), prefix.shape[1]), real), dim=1).long()
            return self.model(input_ids=ids, attention_mask=mask, past_key_values=own).logits

        lengths, words = self._words(tails, logits)
        return lengths + prefix.shape[1], words

    def _first_word(self, kept: _Kept | None, batch: Batch) -> tuple[Int[Tensor, "q"], Int[Tensor, "q"]]:
        lengths = [0] * len(batch.ids) if kept is None else kept.lengths(batch.index).tolist()
        lines = []
        for row, k in zip(batch.ids, lengths, strict=True):
            at = row.index(self.image_id)
            lines.append([*row[:at], *[self.image_id] * k, *row[at + 1 :]])

        def logits(group: Sequence[int], ids: Tensor, real: Bool[Tensor, "r l"]) -> Tensor:
            inputs = {}
            if kept is not None:
                inputs = image_features_as_inputs(self.model, [kept.features[row, : lengths[row]] for row in group])
            mask = None if real.all() else real.long()
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits

        return self._words(lines, logits)

    def _words(self, lines: Sequence[Sequence[int]], logits: Any) -> tuple[Int[Tensor, "q"], Int[Tensor, "q"]]:
        """Lengths of rows of ids, and the most likely token behind each; rows of similar length share a pass."""
        words = torch.empty(len(lines), dtype=torch.long, device=self.model.device)
        lengths = [len(line) for line in lines]
        for group in groups_of_similar_length(lengths, _PASS_TOKENS):
            fill = self.tokenizer.pad_token_id or 0
            ids, real = padded([lines[place] for place in group], fill, self.model.device)
            last = logits(group, ids, real)[torch.arange(len(group), device=ids.device), real.sum(dim=1) - 1]
            words[group] = _finite(last).argmax(dim=-1)
        return torch.tensor(lengths), words

    def _generate(self, method: Method, encoded: EncodedImages, batch: Batch, max_new_tokens: int) -> _Reply:
        tokens = encoded.select(batch.index)
        kept: _Kept | None = None
        record: PruneRecord | None = None
        inputs = batch.inputs(with_image=method.num_tokens != 0)
        if method.num_tokens != 0:
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
                inputs, record = short.inputs, short.record
                assert short.features is not None
                rows = zip(short.features, short.lengths, strict=True)
                kept = _Kept.join([features[:length] for features, length in rows])
            else:
                inputs = {
                    **{name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")},
                    **image_features_as_inputs(self.model, unpruned_features(self.model, tokens)),
                }
        clock = TokenClock()
        out = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self._pad_id,
            return_dict_in_generate=True,
            output_logits=self.log_probs,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        width = inputs["input_ids"].shape[1]
        ids, mask = out.sequences[:, width:], inputs.get("attention_mask")
        return _Reply(
            kept=kept,
            prompt_tokens=torch.full((len(ids),), width) if mask is None else mask.sum(dim=1),
            words=ids[:, 0],
            answers=[answer.strip() for answer in self.tokenizer.batch_decode(ids, skip_special_tokens=True)],
            log_probs=_finite(out.logits[0]).float().log_softmax(dim=-1) if self.log_probs else None,
            record=record,
            first_token_at=clock.times[0],
        )

    @property
    def _pad_id(self) -> int:
        known = (self.tokenizer.pad_token_id, self.model.generation_config.pad_token_id, self.tokenizer.eos_token_id)
        return next((each for each in known if each is not None), 0)

    def _measure(
        self, method: Method, kept: _Kept, full: VisualTokens, at_hand: VisualTokens, batch: Batch
    ) -> dict[str, Float[np.ndarray, "q"]]:
        """`eval.NAME` against the unpruned pass with the right question; `run.NAME` against what the pruner chose from,
        with the question that it saw."""
        if not self.distances:
            return {}
        right = batch.reference(full)
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

    def _kappa(self, kept: _Kept, full: VisualTokens, batch: Batch) -> Float[np.ndarray, "q"]:
        if kept.features.shape[1] == full.features.shape[1] and kept.mask.all():
            return np.zeros(len(batch.questions), dtype=np.float32)
        found = batch.reference(full).distances(("kappa",), kept.features, kept.mask, by_question=kept.by_question)
        return found["kappa"].cpu().numpy()


def _finite(logits: Float[Tensor, "q w"]) -> Float[Tensor, "q w"]:
    """The same, unless the model has lost itself."""
    if not torch.isfinite(logits).any(dim=-1).all() or logits.isnan().any():
        raise InvalidInputError(
            f"the model answers with NaN in {logits.dtype}; load it in another dtype, such as float32"
        )
    return logits
