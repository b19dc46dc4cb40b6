"""One call's inputs made shorter: the images are encoded and pruned, and the text side is cut to match."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from dcp_prune.integrations.stopwatch import Stopwatch
from dcp_prune.integrations.transformers.arguments import check_arguments, pad_id, shorten_arguments
from dcp_prune.integrations.transformers.cache import CachedPrompt, find_new_turn, recall
from dcp_prune.integrations.transformers.images import (
    CallImages,
    images_behind_cache,
    join,
    pad_columns,
    prune_images,
)
from dcp_prune.integrations.transformers.markers import markers_of_dropped
from dcp_prune.integrations.transformers.positions import (
    Positions,
    check_positions,
    next_position,
    rope_positions,
    sample_starts,
    short_rope_positions,
)
from dcp_prune.integrations.transformers.prompt import (
    locate_images,
    put_columns,
    real_columns,
    split_samples,
    surviving_columns,
)
from dcp_prune.integrations.transformers.question import FindWords, Question, Text, TextScope
from dcp_prune.integrations.transformers.record import PruneRecord, warn_if_nothing_was_pruned
from dcp_prune.models import EncodedImages, ModelAdapter, get_adapter
from dcp_prune.pruners.base import Pruner
from dcp_prune.tokens import TextSpace


def prune_inputs(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    pruner: Pruner,
    *,
    processor: Any = None,
    text: Text | None = None,
    text_scope: TextScope | FindWords = "after_image",
    text_space: TextSpace | None = None,
    encoded: EncodedImages | None = None,
    keep_markers: bool = False,
    positions: Positions = "compact",
) -> ShortInputs:
    """Inputs in, shorter inputs out; the model is left alone.

        short = prune_inputs(model, inputs, pruner)
        ids = short.restore(model.generate(**short.inputs))

    Prompts without images, and budgets that are no smaller than the image, come back unchanged. Gradients are kept
    in training mode or when there are labels, if they are enabled at all.

    Args:
        model: a model with an adapter.
        inputs: what the model's processor made: `input_ids`, `pixel_values`, `attention_mask`, ...; tensors of the
            shape of `input_ids` (labels, token types) are shortened along.
        pruner: which tokens to keep, and how many.
        processor: the model's processor; its tokenizer knows more special tokens than the model's config.
        text: what text-aware pruners read instead of the prompt: one question for all, one per prompt, or a list with
            one for each image of a prompt; needs `processor`.
        text_scope: which words of the prompt ask about an image: those behind the prompt's last image (`after_image`),
            those up to the next image (`own`), the last turn of the user (`last_turn`, needs `processor`), `all`, or
            a function of `input_ids` and their mask that says which are read, `b l` -> `b l`.
        text_space: in which terms the words are compared with visual tokens: as word `embeddings`, as published methods
            do, or as the language model's first attention layer does (`lookup`; docs/methods/dcp.md). If not said, the
            pruner's own.
        encoded: images from `encode_images`, one per image of the prompt, or videos from `encode_videos`; their pixels
            are then not needed. If its tokens carry a `text`, text-aware pruners read that.
        keep_markers: keep what marks rows and tiles of an image in the prompt, such as Pixtral's `[IMG_BREAK]`; it goes
            with the tokens that it marks otherwise.
        positions: `compact` numbers what is left as if the dropped tokens had never been there; with `original`, every
            token stays where it lay, and the dropped ones leave gaps. Models that place tokens along several axes
            (Qwen-VL) keep the original places in any case.

    Raises:
        InvalidInputError: images and placeholders do not match, NaN or inf features, inputs that cannot be shortened.
        UnsupportedModelError: see `get_adapter`.
        MissingSignalError: the pruner requires a signal that the model does not give.
    """
    train = model.training or inputs.get("labels") is not None
    with torch.set_grad_enabled(torch.is_grad_enabled() and train):
        question = Question(text_scope, text, processor, text_space or pruner.text_space)
        check_positions(model, positions)
        ids = inputs.get("input_ids")
        short = shorten(
            model,
            inputs,
            pruner,
            question=question,
            encoded=encoded,
            keep_markers=keep_markers,
            positions=positions,
            cached=None if ids is None else recall(inputs.get("past_key_values"), len(ids)),
        )
    warn_if_nothing_was_pruned(short.record)
    return short


@dataclass(frozen=True, eq=False)
class ShortInputs:
    """Model inputs with fewer visual tokens, and the way back.

    Attributes:
        original: the inputs as they were given.
        record: what was done to the images; None if there were none.
        columns: column of the original prompt in each column of the short one, -1 for padding; None if nothing changed.
            With a cache, both prompts begin with the conversation so far. `b m`.
        width: columns of the original prompt.
        tensors: the short inputs without the images.
        features: the visual tokens that are left, in the order of the record; None if there are none or nothing
            changed. Zero where an image keeps fewer than k. `i k d`.
        lengths: how many of them are left of each image.
        deepstack: what the language model adds to the same tokens behind its first layers, one tensor a layer. `i k d`.
        next_position: where what comes behind the prompt will lie, where positions do more than count tokens. `b 1`.
        adapters: of the images and of the videos that were encoded, with the number of each.
    """

    original: Mapping[str, Any]
    record: PruneRecord | None
    columns: Int[Tensor, "b m"] | None
    width: int
    tensors: Mapping[str, Any]
    features: Float[Tensor, "i k d"] | None
    lengths: tuple[int, ...] = ()
    deepstack: tuple[Float[Tensor, "i k d"], ...] = ()
    next_position: Int[Tensor, "b 1"] | None = None
    adapters: tuple[tuple[ModelAdapter, int], ...] = field(default=(), repr=False)

    @property
    def inputs(self) -> dict[str, Any]:
        """Ready for `model(**inputs)` and `model.generate(**inputs)`; a fresh dictionary every time."""
        if self.features is None:
            return dict(self.tensors)
        made, first = {}, 0
        for adapter, count in self.adapters:
            own = slice(first, first + count)
            features, *deepstack = (
                [row[:length] for row, length in zip(each[own], self.lengths[own], strict=True)]
                for each in (self.features, *self.deepstack)
            )
            made[adapter.modality] = adapter.hand_over(features, deepstack)
            first += count
        return {**self.tensors, "mm_encoder_outputs": made}

    def restore(self, sequences: Int[Tensor, "r s"]) -> Int[Tensor, "r L"]:
        """What `generate` returned for the short prompt, with the original prompt in front of the new tokens.

        There may be more rows than prompts (beams, `num_return_sequences`).
        """
        if self.columns is None:
            return sequences
        prompt = self.original["input_ids"].to(sequences.device)
        prompt = prompt.repeat_interleave(sequences.shape[0] // prompt.shape[0], dim=0)
        return torch.cat((prompt, sequences[:, self.tensors["input_ids"].shape[1] :]), dim=1)

    def restore_logits(self, logits: Float[Tensor, "b s v"]) -> Float[Tensor, "b l v"]:
        """Logits of the short `input_ids` in the columns of the original ones, 0 where a token was dropped."""
        if self.columns is None:
            return logits
        given = self.original["input_ids"].shape[1]
        own = self.columns[:, self.columns.shape[1] - logits.shape[1] :]
        return put_columns(logits, torch.where(own < 0, -1, own - (self.width - given)), given)


def shorten(
    model: Any,
    inputs: Mapping[str, Any],
    pruner: Pruner,
    *,
    question: Question = Question(),  # noqa: B008
    encoded: EncodedImages | None = None,
    keep_markers: bool = False,
    positions: Positions = "compact",
    cached: CachedPrompt | None = None,
    whole_prompt: bool = True,
) -> ShortInputs:
    """`prune_inputs` for a conversation that may have begun.

    Args:
        model, inputs, pruner, encoded, keep_markers, positions: as for `prune_inputs`.
        question: how the question about each image is found.
        cached: what is known of the prompt in the cache.
        whole_prompt: `input_ids` repeat the conversation that is in the cache, as `generate` wants it, unless the mask
            is longer than they are.
    """
    adapter = get_adapter(model)
    unchanged = ShortInputs(inputs, None, None, 0, inputs, None)
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    kinds = [
        CallImages.of(each, inputs, encoded if encoded and encoded.modality == each.modality else None)
        for each in (adapter, adapter.video)
        if each
    ]
    check_arguments(model.config, inputs, kinds)
    if ids is None:
        return unchanged
    turn = find_new_turn(ids, mask, inputs.get("past_key_values"), cached, whole_prompt)
    tail = ids[:, turn.start :]
    width = turn.head_width + tail.shape[1]
    if turn.head_width:
        kinds = [each.select(images_behind_cache(ids, tail, each)) if each else each for each in kinds]
    kinds = [each for each in kinds if each]
    if not kinds and not turn.cut:
        return unchanged

    watch = Stopwatch(ids.device)
    short = replace(unchanged, width=width)
    tail_columns = torch.arange(tail.shape[1], device=ids.device).expand(tail.shape)
    if kinds:
        found = [
            locate_images(tail, each.adapter.image_token_id, each.lengths, each.adapter.modality) for each in kinds
        ]
        rows = torch.cat([rows for rows, _ in found])
        places = pad_columns([places for _, places in found], -1)
        whole = [kept for each in kinds for kept in each.kept_whole(pruner.budget)]
        layouts = [layout for each in kinds for layout in each.layouts]
        modalities = [each.adapter.modality for each in kinds for _ in each.layouts]
        if all(whole) and encoded is None and not turn.cut:
            record = PruneRecord.idle(pruner, modalities, layouts, width, rows, ids.shape[0], watch)
            return replace(unchanged, record=record)
        tokens = [each.adapter.image_token_id for each in kinds]

        @cache
        def ask(device: torch.device) -> dict[str, Tensor | None]:
            own = places.where(places < 0, places + turn.start)
            real = real_columns(ids, mask)
            starts = sample_starts(inputs, real)
            if starts is None or not starts.any():
                return question.embed(model, ids, mask, rows, own, tokens, device)
            return question.embed(model, *split_samples(starts, ids, real, rows, own), tokens, device)

        pruned = prune_images(kinds, whole, pruner, ask, watch)
        joined, deepstack = join(pruned)
        record = PruneRecord(
            pruner=pruner,
            modalities=tuple(modalities),
            layouts=tuple(layouts),
            prompt_before=width,
            columns=joined.indices,
            rows=rows,
            indices=joined.indices,
            assignment=joined.assignment,
            stats=joined.stats,
            stage_stats=tuple(stats for part in pruned for stats in part.stage_stats),
            watch=watch,
        )
        short = replace(
            short,
            record=record,
            features=joined.features,
            lengths=tuple(joined.mask.sum(dim=1).tolist()),
            deepstack=deepstack,
            adapters=tuple((each.adapter, len(each)) for each in kinds),
        )
        tail_mask = None if mask is None else mask[:, mask.shape[1] - tail.shape[1] :].bool()
        gone = [
            markers_of_dropped(tail, part, rows[part.which], places[part.which], [whole[image] for image in part.which])
            for part in pruned
            if part.images.adapter.markers and not keep_markers
        ]
        tail_columns = surviving_columns(tail_mask, tail, rows, places, joined.indices.to(ids.device), gone)
    columns = torch.cat((turn.head, torch.where(tail_columns < 0, -1, tail_columns + turn.head_width)), dim=1)
    own = tail_columns if turn.start < turn.head_width else columns
    tensors = shorten_arguments(inputs, adapter, columns, own, turn, pad_id(model))
    rope = rope_positions(adapter, kinds, inputs, tail, turn, cached, positions == "original")
    if rope is not None:
        if len(rope) == 1 and tensors.get("attention_mask") is None:
            # Without a mask, transformers would take gaps for the borders of packed samples.
            tensors["attention_mask"] = torch.ones_like(columns)
        tensors["position_ids"] = short_rope_positions(rope, tensors, columns, own)
        short = replace(short, next_position=next_position(rope, mask))
    watch.lap("prompt")
    record = None if short.record is None else replace(short.record, columns=columns)
    return replace(short, record=record, columns=columns, tensors=tensors)
