"""One call's inputs made shorter: the images are encoded and pruned, and the text side is cut to match."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from dcp_prune.budget import Budget
from dcp_prune.errors import InvalidInputError
from dcp_prune.functional.similarity import gather_tokens
from dcp_prune.integrations.prompt import (
    compact_positions,
    images_per_row,
    locate_images,
    surviving_columns,
    take_columns,
)
from dcp_prune.integrations.question import Question
from dcp_prune.integrations.stopwatch import Stopwatch
from dcp_prune.models import EncodedImages, ImageLayout, ModelAdapter, get_adapter, plain_layout
from dcp_prune.pruners.base import Pruner
from dcp_prune.pruners.batching import regroup
from dcp_prune.tokens import PrunedTokens, Signal


@dataclass(frozen=True, eq=False)
class PruneRecord:
    """What one call with images did.

    Attributes:
        pruner: the pruner that did it.
        modalities: what each is, `image` or `video`; below, `image` stands for either.
        layouts: where the original tokens of each image lie.
        prompt_before: columns of the original prompt, padding included.
        columns: column of the original prompt in each column of the short one, -1 for padding. `b m`.
        rows: batch row of each image. `i`.
        indices: ascending positions of the kept tokens among the original ones, which are the image's placeholders; -1
            behind the last where an image keeps fewer than another. `i k`.
        assignment: original token -> slot that absorbed it, -1 if it was dropped. `i n`.
        stats: what the pruner reported, e.g. `kappa` `i`.
        stage_stats: what each in-encoder stage reported, with a row per tile, of images before videos; where images
            differ in size, the stages of the smallest come first.
        watch: the running times; read them as `milliseconds`.
    """

    pruner: Pruner
    modalities: tuple[str, ...]
    layouts: tuple[ImageLayout, ...]
    prompt_before: int
    columns: Int[Tensor, "b m"]
    rows: Int[Tensor, " i"]
    indices: Int[Tensor, "i k"]
    assignment: Int[Tensor, "i n"]
    stats: Mapping[str, Tensor]
    stage_stats: tuple[Mapping[str, Tensor], ...]
    watch: Stopwatch

    @classmethod
    def idle(
        cls,
        pruner: Pruner,
        modalities: Sequence[str],
        layouts: Sequence[ImageLayout],
        width: int,
        rows: Int[Tensor, " i"],
        num_rows: int,
        watch: Stopwatch,
    ) -> Self:
        """The record of a call that removes nothing."""
        every = _every_token([len(layout) for layout in layouts], rows.device)
        columns = torch.arange(width, device=rows.device).expand(num_rows, width)
        return cls(pruner, tuple(modalities), tuple(layouts), width, columns, rows, every, every, {}, (), watch)

    def __repr__(self) -> str:
        """Five lines; what lies behind them are attributes."""
        each = [f"{after} of {before}" for before, after in self.tokens_per_image]
        shown = ", ".join(dict.fromkeys(each[:8])) + (", ..." if len(each) > 8 else "")
        kappa = "not measured" if self.kappa is None else ", ".join(f"{x:.3g}" for x in self.kappa[:8].tolist())
        times = ", ".join(f"{name} {value:.0f} ms" for name, value in self.milliseconds.items())
        kinds = " and ".join(f"{self.modalities.count(kind)} {kind}(s)" for kind in dict.fromkeys(self.modalities))
        return (
            f"PruneRecord of {kinds or 'no image'}\n"
            f"  pruner: {self.pruner}\n"
            f"  visual tokens: {shown or 'none'}; prompt: {self.prompt_after} of {self.prompt_before}\n"
            f"  kappa: {kappa}\n"
            f"  time: {times or 'not measured'}"
        )

    @property
    def tokens_before(self) -> int:
        """Placeholders of an image in the original prompt; of the largest image where they differ."""
        return max(map(len, self.layouts))

    @property
    def tokens_after(self) -> int:
        """Visual tokens that an image keeps; of the one that keeps most where they differ."""
        return self.indices.shape[1]

    @property
    def tokens_per_image(self) -> list[tuple[int, int]]:
        """Placeholders before and after, of each image."""
        after = (self.indices >= 0).sum(dim=1).tolist()
        return [(len(layout), kept) for layout, kept in zip(self.layouts, after, strict=True)]

    def boxes(self, image: int) -> Float[Tensor, "k 4"]:
        """Top, left, bottom and right edge of each kept token's patch, as shares of the picture that the model saw."""
        return self.layouts[image].boxes[self._kept(image)]

    def tiles(self, image: int) -> Int[Tensor, " k"]:
        """Which tile, or which frame of a video, each kept token comes from; -1 for a separator."""
        layout = self.layouts[image]
        return layout.source[self._kept(image)].div(layout.tile_size, rounding_mode="floor")

    def patches(self, image: int) -> Int[Tensor, " k"]:
        """Which patch of its tile or frame each kept token is, in raster order; -1 for a separator."""
        layout = self.layouts[image]
        source = layout.source[self._kept(image)]
        return torch.where(source < 0, source, source % layout.tile_size)

    def _kept(self, image: int) -> Int[Tensor, " k"]:
        kept = self.indices[image].cpu()
        return kept[kept >= 0]

    @property
    def prompt_after(self) -> int:
        """Columns of the short prompt, padding included: what prefill processes."""
        return self.columns.shape[1]

    @property
    def kappa(self) -> Float[Tensor, " i"] | None:
        """Run-time distribution shift of the kept tokens, if the pruner measures it."""
        return self.stats.get("kappa")

    @property
    def reselected(self) -> Bool[Tensor, " i"] | None:
        """Whether the shift was severe enough to choose again, if the pruner does such a thing."""
        return self.stats.get("reselected")

    @property
    def milliseconds(self) -> dict[str, float]:
        """Time spent in `encode` (vision encoder, projector), `select` (all choosing of tokens, inside the encoder and
        after it) and `prompt` (shortening the text side)."""
        return self.watch.milliseconds()


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


@dataclass(frozen=True, eq=False)
class CachedPrompt:
    """The beginning of a conversation as it is in a key-value cache.

    Attributes:
        columns: of the original prompt, in the order in which they were cached; -1 is padding. `b m`.
        width: columns of the original prompt.
        ids: the original prompt, where all of it is known. `b w`.
        next_position: where the column behind it lies, where positions do more than count tokens. `b 1`.
    """

    columns: Int[Tensor, "b m"]
    width: int
    ids: Int[Tensor, "b w"] | None
    next_position: Int[Tensor, "b 1"] | None = None


@dataclass(frozen=True, eq=False)
class _Turn:
    """Where the new part of a conversation begins; without a cache, all of it is new.

    Attributes:
        head: columns of the original conversation before the new part, as far as they are in the cache. `b h`.
        head_width: columns of the original conversation before the new part, dropped ones included.
        start: column of `input_ids` where the new part begins.
    """

    head: Int[Tensor, "b h"]
    head_width: int
    start: int

    @property
    def cut(self) -> int:
        return self.head_width - self.head.shape[1]


@dataclass(frozen=True, eq=False)
class _Images:
    """The images or the videos of a call, encoded already or not yet."""

    adapter: ModelAdapter
    inputs: Mapping[str, Any]
    layouts: tuple[ImageLayout, ...]
    encoded: EncodedImages | None

    @classmethod
    def of(cls, adapter: ModelAdapter, inputs: Mapping[str, Any], encoded: EncodedImages | None) -> _Images:
        if encoded is not None:
            b, n = encoded.tokens.features.shape[0], encoded.tokens.num_original
            return cls(adapter, {}, encoded.layouts or (plain_layout(1, n),) * b, encoded)
        given = inputs.get(adapter.image_inputs[0]) is not None
        return cls(adapter, inputs, tuple(adapter.layouts(inputs)) if given else (), None)

    def __len__(self) -> int:
        return len(self.layouts)

    @property
    def lengths(self) -> list[int]:
        """Placeholders of each image."""
        return [len(layout) for layout in self.layouts]

    def select(self, which: list[int]) -> _Images:
        return replace(
            self,
            inputs=self.inputs if self.encoded else self.adapter.take(self.inputs, self.layouts, which),
            layouts=tuple(self.layouts[image] for image in which),
            encoded=self.encoded and self.encoded.select(which),
        )

    def kept_whole(self, budget: Budget) -> list[bool]:
        """Of which images the budget keeps every token, whatever they show."""
        return [
            all(
                budget.fewest(length) >= length
                for length in (layout.tile_lengths if budget.scope == "tile" else (sum(layout.tile_lengths),))
            )
            for layout in self.layouts
        ]

    def encode(self, pruner: Pruner, lap: Callable[[str], None]) -> EncodedImages:
        if self.encoded is None:
            self.adapter.check_signals(type(pruner).__name__, pruner.requires)
            return encode(self.adapter, self.inputs, (pruner,), lap, self.layouts)
        stages = _stages(self.adapter, self.layouts, pruner)
        if stages != self.encoded.stages:
            raise InvalidInputError(
                f"these images were encoded with the stages {self.encoded.stages}, but {pruner} wants {stages}; "
                "encode them with encode_images(model, pixel_values, pruner)"
            )
        return self.encoded


@dataclass(frozen=True, eq=False)
class _Pruned:
    """What is left of the images or videos of a call that were encoded together.

    Attributes:
        images: whose they are.
        which: number of each among all images and videos of the call.
        tokens: what the pruner kept; the stats of in-encoder stages.
        deepstack: of the kept tokens. `i k d`.
    """

    images: _Images
    which: list[int]
    tokens: PrunedTokens
    stage_stats: tuple[Mapping[str, Tensor], ...]
    deepstack: tuple[Float[Tensor, "i k d"], ...]


def encode(
    adapter: ModelAdapter,
    images: Mapping[str, Any],
    pruners: Sequence[Pruner],
    lap: Callable[[str], None] = lambda name: None,
    layouts: Sequence[ImageLayout] | None = None,
) -> EncodedImages:
    """One encoder pass for pruners that agree on the stages, with all signals that any of them uses.

    Raises:
        InvalidInputError: they do not agree, or a stage does not fit the encoder.
    """
    if layouts is None:
        layouts = adapter.layouts(images)
    plans = [_stages(adapter, layouts, pruner) for pruner in pruners]
    if any(plan != plans[0] for plan in plans):
        raise InvalidInputError(
            f"these pruners drop different tokens inside the encoder and cannot share a pass: {plans}; "
            "call encode_images once for each of them"
        )
    signals = frozenset().union(*(pruner.requires | pruner.optional for pruner in pruners))
    coded = adapter.encode(images, plans[0] if plans else (), signals & adapter.signals, lap, layouts)
    return replace(coded, modality=adapter.modality)


def _stages(adapter: ModelAdapter, layouts: Sequence[ImageLayout], pruner: Pruner) -> tuple[Any, ...]:
    """What a pruner drops inside the encoder, which sees tiles and gives each the whole budget to choose from."""
    sizes = sorted({layout.tile_size for layout in layouts})
    plans = [adapter.check_stages(pruner.encoder_stages(size, adapter.num_layers)) for size in sizes]
    if any(plans) and len(sizes) > 1:
        raise InvalidInputError(
            f"images of {', '.join(map(str, sizes))} tokens cannot share an encoder pass that drops a share of them on "
            "the way; encode images of one size at a time, or leave it to prune_inputs"
        )
    return plans[0]


def _passes(images: _Images, pruner: Pruner) -> list[list[int]]:
    """Which images share an encoder pass: all of them, or those of one size where tokens are dropped inside."""
    sizes, depth = [layout.tile_size for layout in images.layouts], images.adapter.num_layers
    if images.encoded is not None or not any(pruner.encoder_stages(size, depth) for size in set(sizes)):
        return [list(range(len(sizes)))]
    return [[image for image, each in enumerate(sizes) if each == size] for size in sorted(set(sizes))]


def shorten(
    model: Any,
    inputs: Mapping[str, Any],
    pruner: Pruner,
    *,
    question: Question = Question(),  # noqa: B008
    encoded: EncodedImages | None = None,
    keep_markers: bool = False,
    cached: CachedPrompt | None = None,
    whole_prompt: bool = True,
) -> ShortInputs:
    """`prune_inputs` for a conversation that may have begun.

    Args:
        model, inputs, pruner, encoded, keep_markers: as for `prune_inputs`.
        question: how the question about each image is found.
        cached: what is known of the prompt in the cache.
        whole_prompt: `input_ids` repeat the conversation that is in the cache, as `generate` wants it, unless the mask
            is longer than they are.
    """
    adapter = get_adapter(model)
    unchanged = ShortInputs(inputs, None, None, 0, inputs, None)
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    kinds = [
        _Images.of(each, inputs, encoded if encoded and encoded.modality == each.modality else None)
        for each in (adapter, adapter.video)
        if each
    ]
    _check_inputs(model.config, inputs, kinds)
    if ids is None:
        return unchanged
    turn = _find_turn(ids, mask, inputs.get("past_key_values"), cached, whole_prompt)
    tail = ids[:, turn.start :]
    width = turn.head_width + tail.shape[1]
    if turn.head_width:
        kinds = [each.select(_new_images(ids, tail, each)) if each else each for each in kinds]
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
        places = _pad_columns([places for _, places in found], -1)
        whole = [kept for each in kinds for kept in each.kept_whole(pruner.budget)]
        layouts = [layout for each in kinds for layout in each.layouts]
        modalities = [each.adapter.modality for each in kinds for _ in each.layouts]
        if all(whole) and encoded is None and not turn.cut:
            record = PruneRecord.idle(pruner, modalities, layouts, width, rows, ids.shape[0], watch)
            return replace(unchanged, record=record)
        tokens = [each.adapter.image_token_id for each in kinds]

        @cache
        def ask(device: torch.device) -> dict[str, Tensor | None]:
            return question.embed(model, ids, mask, rows, places + turn.start, tokens, device)

        pruned: list[_Pruned] = []
        for each in kinds:
            first = sum(len(part.which) for part in pruned)
            for group in _passes(each, pruner):
                part = each if len(group) == len(each) else each.select(group)
                pruned.append(_prune(part, [first + image for image in group], whole, pruner, ask, watch))
        joined, deepstack = _join(pruned)
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
            _markers(tail, part, rows[part.which], places[part.which], [whole[image] for image in part.which])
            for part in pruned
            if part.images.adapter.markers and not keep_markers
        ]
        tail_columns = surviving_columns(tail_mask, tail, rows, places, joined.indices.to(ids.device), gone)
    columns = torch.cat((turn.head, torch.where(tail_columns < 0, -1, tail_columns + turn.head_width)), dim=1)
    own = tail_columns if turn.start < turn.head_width else columns
    tensors = _shorten_tensors(inputs, adapter, columns, own, _pad_id(model))
    rope = _rope_positions(adapter, kinds, inputs, tail, turn, cached)
    if rope is not None:
        tensors["position_ids"] = _along(rope, tensors, columns, own)
        short = replace(short, next_position=_behind(rope, mask))
    watch.lap("prompt")
    record = None if short.record is None else replace(short.record, columns=columns)
    return replace(short, record=record, columns=columns, tensors=tensors)


def _prune(
    images: _Images,
    which: list[int],
    whole: Sequence[bool],
    pruner: Pruner,
    ask: Callable[[torch.device], dict[str, Tensor | None]],
    watch: Stopwatch,
) -> _Pruned:
    """Encodes images or videos together and chooses among their tokens.

    Args:
        which: number of each among all of the call, whose budgets keep those that are `whole`.
        ask: the questions about all images and videos of the call.
    """
    coded = images.encode(pruner, watch.lap)
    watch.lap("encode")
    tokens = coded.tokens
    if Signal.TEXT in pruner.requires | pruner.optional and tokens.text is None:
        asked = ask(tokens.features.device)
        tokens = replace(tokens, **{name: None if each is None else each[which] for name, each in asked.items()})
    pruned = pruner(tokens)
    own, separators, separator = [whole[image] for image in which], coded.separators, images.adapter.separator
    if separators is None and separator is not None:
        separators = separator.expand(len(images), max(images.lengths), -1)
    if any(own) and separators is not None:
        pruned = _with_separators(pruned, images.layouts, own, separators)
    deepstack = tuple(gather_tokens(each, pruned.indices.clamp(min=0)) for each in coded.deepstack)
    watch.lap("select")
    return _Pruned(images, which, pruned, coded.stage_stats, deepstack)


def _join(pruned: Sequence[_Pruned]) -> tuple[PrunedTokens, tuple[Float[Tensor, "i k d"], ...]]:
    """All images and videos of a call in their order, and their DeepStack features."""
    counts = [len(part.which) for part in pruned]
    splits = _pad_columns([part.tokens.assignment for part in pruned], -1).split(counts)
    parts = [replace(part.tokens, assignment=own) for part, own in zip(pruned, splits, strict=True)]
    joined = regroup(parts, [part.which for part in pruned])
    width = joined.features.shape[1]
    order = torch.tensor([image for part in pruned for image in part.which]).argsort().to(joined.indices.device)
    deepstack = tuple(
        torch.cat([functional.pad(each, (0, 0, 0, width - each.shape[1])) for each in layer])[order]
        for layer in zip(*(part.deepstack for part in pruned), strict=True)
    )
    return joined, deepstack


def _pad_columns(values: Sequence[Int[Tensor, "i n"]], fill: int) -> Int[Tensor, "i n"]:
    width = max(value.shape[1] for value in values)
    return torch.cat([functional.pad(value, (0, width - value.shape[1]), value=fill) for value in values])


def _markers(
    ids: Int[Tensor, "b l"],
    pruned: _Pruned,
    rows: Int[Tensor, " i"],
    places: Int[Tensor, "i n"],
    whole: Sequence[bool],
) -> Bool[Tensor, "b l"]:
    """What stands between the placeholders of each image that loses some: marks of rows and tiles that are gone."""
    adapter = pruned.images.adapter
    if adapter.tile_marks is None:
        columns = torch.arange(ids.shape[1], device=ids.device)
        first, last = places[:, :1], places.amax(dim=1, keepdim=True)
        gone = (columns > first) & (columns < last) & ~torch.tensor(whole, device=ids.device).unsqueeze(1)
    else:
        gone = _marks_of_empty_tiles(ids[rows], pruned, places, adapter.tile_marks)
    inside = torch.zeros(ids.shape, dtype=torch.long, device=ids.device).index_add(0, rows, gone.long()) > 0
    return inside & (ids != adapter.image_token_id)


def _marks_of_empty_tiles(
    ids: Int[Tensor, "i l"], pruned: _Pruned, places: Int[Tensor, "i n"], marks: tuple[int, int]
) -> Bool[Tensor, "i l"]:
    """Marks of tiles of which nothing is kept; in front of an image and behind it, only those that touch it."""
    layouts, (i, length) = pruned.images.layouts, ids.shape
    most = max(layout.num_tiles for layout in layouts)
    tiles = pad_sequence([layout.source // layout.tile_size for layout in layouts], True).to(ids.device)
    kept = pruned.tokens.indices.to(ids.device)
    alive = torch.zeros(i, most + 1, dtype=torch.bool, device=ids.device)
    alive.scatter_(1, tiles.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, most), True)
    # Tile of each placeholder; the column behind the last takes those of longer images.
    places = places[:, : tiles.shape[1]].masked_fill(places[:, : tiles.shape[1]] < 0, length)
    own = ids.new_full((i, length + 1), -1).scatter(1, places, tiles)[:, :length]
    before = own.cummax(dim=1).values
    behind = own.masked_fill(own < 0, most).flip(1).cummin(dim=1).values.flip(1)
    opening, closing = (ids == mark for mark in marks)
    about = torch.where(closing, before, behind)
    touching = (closing & (own.roll(1, 1) >= 0)) | (opening & (own.roll(-1, 1) >= 0))
    between = (before >= 0) & (behind < most)
    return (between | touching) & ~alive.gather(1, about.clamp(min=0))


def _find_turn(
    ids: Int[Tensor, "b l"], mask: Tensor | None, cache: Any, cached: CachedPrompt | None, whole_prompt: bool
) -> _Turn:
    b, length = ids.shape
    filled = 0 if cache is None else int(cache.get_seq_length())
    if filled == 0:
        return _Turn(ids.new_empty(b, 0), 0, 0)
    if cached is None:
        known, width = torch.arange(filled, device=ids.device).expand(b, filled), filled
    else:
        known, width = cached.columns.to(ids.device), cached.width
        known = known.repeat_interleave(b // known.shape[0], dim=0)
    if not whole_prompt or (mask is not None and mask.shape[1] > length):
        # Only the new tokens were passed; tokens generated in between are in the cache as they are.
        between = torch.arange(width, filled + width - known.shape[1], device=ids.device).expand(b, -1)
        head = torch.cat((known, between), dim=1)
        return _Turn(head, width + between.shape[1], 0)
    if cached is not None and cached.ids is not None:
        begin = cached.ids.to(ids.device).repeat_interleave(b // cached.ids.shape[0], dim=0)
        if not torch.equal(ids[:, :width], begin):
            raise InvalidInputError(
                "these input_ids do not begin with the prompt that is in the cache; pass the ids that generate "
                "returned, followed by the new turn, or start with an empty cache"
            )
    return _Turn(known, width, width)


def _new_images(ids: Tensor, tail: Tensor, images: _Images) -> list[int]:
    """Which images are not in the cache yet: all, or those of the tail if all of the conversation were passed."""
    lengths = images.lengths
    counts, left = ((part == images.adapter.image_token_id).sum(dim=1).tolist() for part in (ids, tail))
    if sum(lengths) != sum(counts):
        return list(range(len(images)))
    new: list[int] = []
    for row, end in enumerate(accumulate(images_per_row(counts, lengths))):
        first = end
        while left[row] > 0 and first > 0:
            first -= 1
            left[row] -= lengths[first]
        new.extend(range(first, end))
    return new


def _with_separators(
    pruned: PrunedTokens, layouts: Sequence[ImageLayout], whole: Sequence[bool], separators: Float[Tensor, "i s d"]
) -> PrunedTokens:
    """The same tokens, with images that the budget keeps whole laid out as the model itself does."""
    features, indices = list(pruned.features), list(pruned.indices)
    assignment = pruned.assignment.clone()
    for image, layout in enumerate(layouts):
        if whole[image]:
            n, old = len(layout), features[image]
            patches, gaps = (
                where.nonzero().squeeze(1).to(old.device) for where in (layout.source >= 0, layout.source < 0)
            )
            laid = old.new_zeros(n, old.shape[1]).index_copy(0, patches, old[: len(patches)])
            features[image] = laid.index_copy(0, gaps, separators[image, : len(gaps)].to(old))
            indices[image] = torch.arange(n, device=patches.device)
            assignment[image, :n] = indices[image]
    padded = pad_sequence(indices, batch_first=True, padding_value=-1)
    return replace(
        pruned,
        features=pad_sequence(features, batch_first=True),
        indices=padded,
        mask=padded >= 0,
        assignment=assignment,
    )


def _every_token(lengths: Sequence[int], device: torch.device, width: int | None = None) -> Int[Tensor, "i n"]:
    """0, 1, 2, ... for each image, -1 behind its last token."""
    count = torch.arange(width or max(lengths), device=device).expand(len(lengths), -1)
    return count.masked_fill(count >= torch.tensor(lengths, device=device).unsqueeze(1), -1)


def encoder_stages(model: Any, pixels: Float[Tensor, "i c y x"], pruner: Pruner) -> tuple[Any, ...]:
    """What this pruner drops inside this model's encoder; pruners with equal stages can share a pass.

    Raises:
        InvalidInputError: a stage does not fit the encoder.
    """
    adapter = get_adapter(model)
    rows, cols = adapter.grid(pixels)
    return adapter.check_stages(pruner.encoder_stages(rows * cols, adapter.num_layers))


def unpruned_features(model: Any, encoded: EncodedImages) -> list[Float[Tensor, "N d"]]:
    """What the model's own prompt holds of images that were encoded without stages: all tokens, with the separators
    between rows of patches where the model has them."""
    separator = get_adapter(model).separator
    rows = [features[mask] for features, mask in zip(encoded.tokens.features, encoded.tokens.mask, strict=True)]
    if separator is None:
        return rows
    patches = [(layout.source >= 0).nonzero().squeeze(1).to(encoded.tokens.mask.device) for layout in encoded.layouts]
    return [
        separator.to(row).expand(len(layout), -1).index_copy(0, places, row)
        for row, layout, places in zip(rows, encoded.layouts, patches, strict=True)
    ]


def image_features_as_inputs(model: Any, features: Iterable[Float[Tensor, "k d"]]) -> dict[str, Any]:
    """Model inputs that stand in for images whose prompts hold exactly as many placeholders; built anew every time."""
    adapter = get_adapter(model)
    return {"mm_encoder_outputs": {adapter.modality: adapter.hand_over(features)}}


def _shorten_tensors(
    inputs: Mapping[str, Any],
    adapter: ModelAdapter,
    columns: Int[Tensor, "b m"],
    own: Int[Tensor, "b s"],
    pad_id: int,
) -> dict[str, Any]:
    """The inputs without images: `columns` of the conversation for the mask, `own` for what is like `input_ids`."""
    shape = inputs["input_ids"].shape
    fills = {"input_ids": pad_id, "labels": -100}
    visual = (*adapter.image_inputs, *(adapter.video.image_inputs if adapter.video else ()))
    short = {name: value for name, value in inputs.items() if name not in visual}
    for name, value in short.items():
        if name not in ("attention_mask", "position_ids") and isinstance(value, Tensor) and value.shape == shape:
            short[name] = take_columns(value, own, fills.get(name, 0))
    mask = inputs.get("attention_mask")
    real = columns >= 0
    if mask is not None:
        short["attention_mask"] = take_columns(mask, columns, 0)
        real = short["attention_mask"].bool()
    elif not real.all():
        short["attention_mask"] = real.long()
    if inputs.get("position_ids") is not None:
        # Compact: gaps would make attention kernels believe that several sequences were packed into one.
        positions = compact_positions(real, own.shape[1])
        if adapter.first_position:
            given, length = inputs["position_ids"], inputs["position_ids"].shape[1]
            counted = compact_positions(
                torch.ones_like(given, dtype=torch.bool) if mask is None else mask.bool(), length
            )
            first = given.amax(dim=1, keepdim=True) - counted.amax(dim=1, keepdim=True)
            positions = positions + first.clamp(0, adapter.first_position).to(positions.device)
        short["position_ids"] = positions
    return short


def _rope_positions(
    adapter: ModelAdapter,
    kinds: Sequence[_Images],
    inputs: Mapping[str, Any],
    tail: Int[Tensor, "b s"],
    turn: _Turn,
    cached: CachedPrompt | None,
) -> Int[Tensor, "p b l"] | None:
    """Where the columns of `input_ids` lie in the original conversation, 0 for those that are in the cache; None where
    positions just count tokens."""
    given = inputs.get("position_ids")
    if given is not None:
        return given[-3:] if given.ndim == 3 else None
    mask = inputs.get("attention_mask")
    begin = 0 if mask is None else mask.shape[1] - tail.shape[1]
    own_mask = None if mask is None else mask[:, begin:].bool()
    details = {name: value for each in kinds for name, value in each.inputs.items()}
    found = adapter.rope_positions(tail, own_mask, {each.adapter.modality: each.layouts for each in kinds}, details)
    if found is None:
        return None
    found = found.to(tail.device)
    if turn.head_width:
        if cached is not None and cached.next_position is not None:
            first = cached.next_position.to(tail.device) + (turn.head_width - cached.width)
        else:
            first = turn.head_width if mask is None else mask[:, :begin].sum(dim=1, keepdim=True)
            first = first + (torch.zeros(1, 1) if adapter.rope_offset is None else adapter.rope_offset).to(tail)
        found = found + first.repeat_interleave(tail.shape[0] // first.shape[0], dim=0)
    if own_mask is not None:
        found = found.masked_fill(~own_mask, 0)
    return functional.pad(found, (turn.start, 0))


def _along(
    rope: Int[Tensor, "p b l"], tensors: Mapping[str, Any], columns: Int[Tensor, "b m"], own: Int[Tensor, "b s"]
) -> Int[Tensor, "q b s"]:
    """`position_ids` of the short prompt: a count of tokens, from which attention masks are made, then each axis."""
    mask = tensors.get("attention_mask")
    counted = compact_positions(columns >= 0 if mask is None else mask.bool(), own.shape[1])
    return torch.stack((counted, *(take_columns(axis, own, 0) for axis in rope)))


def _behind(rope: Int[Tensor, "p b l"], mask: Tensor | None) -> Int[Tensor, "b 1"]:
    """Where the token behind the last one of each row lies."""
    ends = rope.amax(dim=0)
    if mask is None:
        return ends[:, -1:] + 1
    own = mask[:, mask.shape[1] - ends.shape[1] :].bool()
    last = torch.arange(ends.shape[1], device=ends.device).where(own, 0).amax(dim=1, keepdim=True)
    return ends.gather(1, last) + 1


def _check_inputs(config: Any, inputs: Mapping[str, Any], kinds: Sequence[_Images]) -> None:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    in_cache = inputs.get("past_key_values") is not None or inputs.get("mm_encoder_outputs") is not None
    for images in kinds:
        adapter = images.adapter
        unpruned = [name for name in adapter.unpruned_inputs if inputs.get(name) is not None]
        if unpruned:
            raise InvalidInputError(
                f"{', '.join(unpruned)} of {adapter.architecture} cannot be pruned yet, only images; "
                "remove the handle for such a call"
            )
        if not images and ids is not None and not in_cache and (ids == adapter.image_token_id).any():
            raise InvalidInputError(
                f"the prompt holds {adapter.modality} placeholders, but no {adapter.modality} came with it; pass "
                f"{adapter.image_inputs[0]}, or take the placeholders out of the prompt"
            )
        for name in adapter.image_inputs[1:] if images else ():
            value = inputs.get(name)
            if (
                name not in adapter.image_details
                and value is not None
                and (not hasattr(config, name) or getattr(config, name) != value)
            ):
                raise InvalidInputError(
                    f"{name}={value} differs from the model's config and cannot be set per call while pruning; "
                    f"set model.config.{name}"
                )
    if not any(kinds):
        return
    if ids is None:
        raise InvalidInputError(
            "images can be pruned only together with input_ids, which say where they stand; pass input_ids, not "
            "inputs_embeds"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        form = f"has {mask.ndim} dimensions" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        raise InvalidInputError(
            f"attention_mask {form}, but a prompt can be shortened only with the 2-D mask (rows x "
            "columns) that the processor makes"
        )


def _pad_id(model: Any) -> int:
    """What to write into padding columns, which the mask hides; never the placeholder."""
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is not None:
            return config.pad_token_id
    return 0 if model.config.image_token_id != 0 else 1
