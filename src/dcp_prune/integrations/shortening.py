"""One call's inputs made shorter: the images are encoded and pruned, and the text side is cut to match."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dcp_prune.budget import Budget
from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.prompt import (
    compact_positions,
    find_question,
    images_per_row,
    locate_images,
    surviving_columns,
    take_columns,
)
from dcp_prune.integrations.stopwatch import Stopwatch
from dcp_prune.models import EncodedImages, ImageLayout, ModelAdapter, get_adapter, plain_layout
from dcp_prune.pruners.base import Pruner
from dcp_prune.tokens import PrunedTokens, Signal


@dataclass(frozen=True, eq=False)
class PruneRecord:
    """What one call with images did.

    Attributes:
        pruner: the pruner that did it.
        layouts: where the original tokens of each image lie.
        prompt_before: columns of the original prompt, padding included.
        columns: column of the original prompt in each column of the short one, -1 for padding. `b m`.
        rows: batch row of each image. `i`.
        indices: ascending positions of the kept tokens among the original ones, which are the image's placeholders; -1
            behind the last where an image keeps fewer than another. `i k`.
        assignment: original token -> slot that absorbed it, -1 if it was dropped. `i n`.
        stats: what the pruner reported, e.g. `kappa` `i`.
        stage_stats: what each in-encoder stage reported, with a row per tile.
        watch: the running times; read them as `milliseconds`.
    """

    pruner: Pruner
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
        layouts: Sequence[ImageLayout],
        width: int,
        rows: Int[Tensor, " i"],
        num_rows: int,
        watch: Stopwatch,
    ) -> Self:
        """The record of a call that removes nothing."""
        every = _every_token([len(layout) for layout in layouts], rows.device)
        columns = torch.arange(width, device=rows.device).expand(num_rows, width)
        return cls(pruner, tuple(layouts), width, columns, rows, every, every, {}, (), watch)

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
        kept = self.indices[image].cpu()
        return self.layouts[image].boxes[kept[kept >= 0]]

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
        features: the visual tokens that are left; None if there are none or nothing changed. Zero where an image keeps
            fewer than k. `i k d`.
        lengths: how many of them are left of each image.
    """

    original: Mapping[str, Any]
    record: PruneRecord | None
    columns: Int[Tensor, "b m"] | None
    width: int
    tensors: Mapping[str, Any]
    features: Float[Tensor, "i k d"] | None
    lengths: tuple[int, ...]
    adapter: ModelAdapter = field(repr=False)

    @property
    def inputs(self) -> dict[str, Any]:
        """Ready for `model(**inputs)` and `model.generate(**inputs)`; a fresh dictionary every time."""
        if self.features is None:
            return dict(self.tensors)
        images = [features[:length] for features, length in zip(self.features, self.lengths, strict=True)]
        return {**self.tensors, **self.adapter.hand_over(images)}

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
    """

    columns: Int[Tensor, "b m"]
    width: int
    ids: Int[Tensor, "b w"] | None


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
    """The images of a call, encoded already or not yet."""

    adapter: ModelAdapter
    pixels: Float[Tensor, "i *tiles c y x"] | None
    layouts: tuple[ImageLayout, ...]
    encoded: EncodedImages | None

    @classmethod
    def of(cls, adapter: ModelAdapter, inputs: Mapping[str, Any], encoded: EncodedImages | None) -> _Images:
        if encoded is not None:
            b, n = encoded.tokens.features.shape[0], encoded.tokens.num_original
            return cls(adapter, None, encoded.layouts or (plain_layout(1, n),) * b, encoded)
        pixels = inputs.get(adapter.image_inputs[0])
        return cls(adapter, pixels, () if pixels is None else tuple(adapter.layouts(inputs)), None)

    def __len__(self) -> int:
        return len(self.layouts)

    @property
    def lengths(self) -> list[int]:
        """Placeholders of each image."""
        return [len(layout) for layout in self.layouts]

    def select(self, images: list[int]) -> _Images:
        return replace(
            self,
            pixels=None if self.pixels is None else self.pixels[images],
            layouts=tuple(self.layouts[image] for image in images),
            encoded=self.encoded and self.encoded.select(images),
        )

    def kept_whole(self, budget: Budget) -> list[bool]:
        """Of which images the budget keeps every token."""
        return [
            all(
                budget.resolve(length) >= length
                for length in (layout.tile_lengths if budget.scope == "tile" else (sum(layout.tile_lengths),))
            )
            for layout in self.layouts
        ]

    def encode(self, pruner: Pruner, lap: Callable[[str], None]) -> EncodedImages:
        if self.encoded is None:
            assert self.pixels is not None
            self.adapter.check_signals(type(pruner).__name__, pruner.requires)
            return encode(self.adapter, self.pixels, (pruner,), lap, self.layouts)
        stages = _stages(self.adapter, self.layouts, pruner)
        if stages != self.encoded.stages:
            raise InvalidInputError(
                f"these images were encoded with the stages {self.encoded.stages}, but {pruner} wants {stages}; "
                "encode them with encode_images(model, pixel_values, pruner)"
            )
        return self.encoded


def encode(
    adapter: ModelAdapter,
    pixels: Float[Tensor, "i *tiles c y x"],
    pruners: Sequence[Pruner],
    lap: Callable[[str], None] = lambda name: None,
    layouts: Sequence[ImageLayout] | None = None,
) -> EncodedImages:
    """One encoder pass for pruners that agree on the stages, with all signals that any of them uses.

    Raises:
        InvalidInputError: they do not agree, or a stage does not fit the encoder.
    """
    if layouts is None:
        layouts = adapter.layouts({adapter.image_inputs[0]: pixels})
    plans = [_stages(adapter, layouts, pruner) for pruner in pruners]
    if any(plan != plans[0] for plan in plans):
        raise InvalidInputError(
            f"these pruners drop different tokens inside the encoder and cannot share a pass: {plans}; "
            "call encode_images once for each of them"
        )
    signals = frozenset().union(*(pruner.requires | pruner.optional for pruner in pruners))
    return adapter.encode(pixels, plans[0] if plans else (), signals & adapter.signals, lap, layouts)


def _stages(adapter: ModelAdapter, layouts: Sequence[ImageLayout], pruner: Pruner) -> tuple[Any, ...]:
    """What a pruner drops inside the encoder, which sees tiles and gives each the whole budget to choose from."""
    return adapter.check_stages(pruner.encoder_stages(layouts[0].tile_size, adapter.num_layers))


def shorten(
    model: Any,
    inputs: Mapping[str, Any],
    pruner: Pruner,
    *,
    processor: Any = None,
    text: str | Sequence[str] | None = None,
    encoded: EncodedImages | None = None,
    cached: CachedPrompt | None = None,
    whole_prompt: bool = True,
) -> ShortInputs:
    """`prune_inputs` for a conversation that may have begun.

    Args:
        model, inputs, pruner, processor, text, encoded: as for `prune_inputs`.
        cached: what is known of the prompt in the cache.
        whole_prompt: `input_ids` repeat the conversation that is in the cache, as `generate` wants it, unless the mask
            is longer than they are.
    """
    adapter = get_adapter(model)
    unchanged = ShortInputs(inputs, None, None, 0, inputs, None, (), adapter)
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    with_images = encoded is not None or inputs.get(adapter.image_inputs[0]) is not None
    _check_inputs(adapter, model.config, inputs, with_images)
    images = _Images.of(adapter, inputs, encoded)
    if ids is None:
        return unchanged
    turn = _find_turn(ids, mask, inputs.get("past_key_values"), cached, whole_prompt)
    tail = ids[:, turn.start :]
    width = turn.head_width + tail.shape[1]
    if images and turn.head_width:
        images = images.select(_new_images(ids, tail, adapter.image_token_id, images))
    if not images and not turn.cut:
        return unchanged

    watch = Stopwatch(ids.device)
    record = features = None
    lengths: tuple[int, ...] = ()
    tail_columns = torch.arange(tail.shape[1], device=ids.device).expand(tail.shape)
    if images:
        rows, places = locate_images(tail, adapter.image_token_id, images.lengths)
        record = PruneRecord.idle(pruner, images.layouts, width, rows, ids.shape[0], watch)
        whole = images.kept_whole(pruner.budget)
        if all(whole) and encoded is None and not turn.cut:
            return replace(unchanged, record=record)
        coded = images.encode(pruner, watch.lap)
        watch.lap("encode")
        tokens = coded.tokens
        if Signal.TEXT in pruner.requires | pruner.optional and tokens.text is None:
            words = _question(model, ids, mask, adapter.image_token_id, processor, text)
            tokens = replace(tokens, **_embed(model, words, rows, tokens.features.device))
        pruned = pruner(tokens)
        if any(whole) and adapter.separator is not None:
            pruned = _with_separators(pruned, images.layouts, whole, adapter.separator)
        watch.lap("select")
        features, lengths = pruned.features, tuple(pruned.mask.sum(dim=1).tolist())
        record = replace(
            record,
            indices=pruned.indices,
            assignment=pruned.assignment,
            stats=pruned.stats,
            stage_stats=coded.stage_stats,
        )
        tail_mask = None if mask is None else mask[:, mask.shape[1] - tail.shape[1] :].bool()
        tail_columns = surviving_columns(tail_mask, tail, rows, places, pruned.indices.to(ids.device))
    columns = torch.cat((turn.head, torch.where(tail_columns < 0, -1, tail_columns + turn.head_width)), dim=1)
    own = tail_columns if turn.start < turn.head_width else columns
    short = _shorten_tensors(inputs, adapter, columns, own, _pad_id(model))
    watch.lap("prompt")
    record = None if record is None else replace(record, columns=columns)
    return ShortInputs(inputs, record, columns, width, short, features, lengths, adapter)


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


def _new_images(ids: Tensor, tail: Tensor, image_token_id: int, images: _Images) -> list[int]:
    """Which images are not in the cache yet: all, or those of the tail if all of the conversation were passed."""
    lengths = images.lengths
    counts, left = ((part == image_token_id).sum(dim=1).tolist() for part in (ids, tail))
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
    pruned: PrunedTokens, layouts: Sequence[ImageLayout], whole: Sequence[bool], separator: Float[Tensor, " d"]
) -> PrunedTokens:
    """The same tokens, with images that the budget keeps whole laid out as the model itself does."""
    features, indices = list(pruned.features), list(pruned.indices)
    assignment = pruned.assignment.clone()
    for image, layout in enumerate(layouts):
        if whole[image]:
            n = len(layout)
            patches = (layout.source >= 0).nonzero().squeeze(1).to(pruned.features.device)
            laid = separator.to(pruned.features).expand(n, -1)
            features[image] = laid.index_copy(0, patches, features[image][: len(patches)])
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


def _question(
    model: Any,
    ids: Int[Tensor, "b l"],
    mask: Tensor | None,
    image_token_id: int,
    processor: Any,
    text: str | Sequence[str] | None,
) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """Ids of each row's question, and which of them are words: from `text`, or found in the prompt."""
    special = _special_ids(model, processor).to(ids.device)
    if text is None:
        mask = None if mask is None else mask[:, mask.shape[1] - ids.shape[1] :].bool()
        return ids, find_question(ids, mask, image_token_id, special)
    texts = [text] * ids.shape[0] if isinstance(text, str) else list(text)
    if processor is None or len(texts) != ids.shape[0]:
        raise InvalidInputError(
            f"text needs the processor and one question per prompt, but got {len(texts)} question(s) for "
            f"{ids.shape[0]} prompt(s) and {'no' if processor is None else 'a'} processor"
        )
    lines = [torch.tensor(processor.tokenizer(line, add_special_tokens=False)["input_ids"]).long() for line in texts]
    padded = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=-1).to(ids)
    return padded.clamp(min=0), (padded >= 0) & ~torch.isin(padded, special)


def _embed(
    model: Any, question: tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]], rows: Int[Tensor, " i"], device: torch.device
) -> dict[str, Tensor | None]:
    """`text` and `text_mask` of `VisualTokens`: the words of each image's row, packed and embedded; None if none."""
    ids, words = (each[rows] for each in question)
    longest = int(words.sum(dim=1).max().item())
    if longest == 0:
        return {"text": None, "text_mask": None}
    order = torch.argsort(words.int(), dim=1, stable=True, descending=True)[:, :longest]
    text = model.get_input_embeddings()(ids.gather(1, order))
    return {"text": text.to(device), "text_mask": words.gather(1, order).to(device)}


def embed_question(
    model: Any, processor: Any, texts: Sequence[str]
) -> tuple[Float[Tensor, "q t d"] | None, Bool[Tensor, "q t"] | None]:
    """`VisualTokens.text` and `text_mask` for these questions, one a row; None if none of them holds a word.

    Hand them on in `EncodedImages.tokens` to let a pruner read something else than the prompt's question.
    """
    ids = torch.zeros(len(texts), 0, dtype=torch.long, device=model.device)
    words = _question(model, ids, None, -1, processor, texts)
    made = _embed(model, words, torch.arange(len(texts), device=model.device), model.device)
    return made["text"], made["text_mask"]


def encoder_stages(model: Any, pixels: Float[Tensor, "i c y x"], pruner: Pruner) -> tuple[Any, ...]:
    """What this pruner drops inside this model's encoder; pruners with equal stages can share a pass.

    Raises:
        InvalidInputError: a stage does not fit the encoder.
    """
    adapter = get_adapter(model)
    rows, cols = adapter.grid(pixels)
    return adapter.check_stages(pruner.encoder_stages(rows * cols, adapter.num_layers))


def image_features_as_inputs(model: Any, features: Iterable[Float[Tensor, "k d"]]) -> dict[str, Any]:
    """Model inputs that stand in for images whose prompts hold exactly as many placeholders; built anew every time."""
    return get_adapter(model).hand_over(features)


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
    short = {name: value for name, value in inputs.items() if name not in adapter.image_inputs}
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


def _check_inputs(adapter: ModelAdapter, config: Any, inputs: Mapping[str, Any], with_images: bool) -> None:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    unpruned = [name for name in adapter.unpruned_inputs if inputs.get(name) is not None]
    if unpruned:
        raise InvalidInputError(
            f"{', '.join(unpruned)} of {adapter.architecture} cannot be pruned yet, only images; "
            "remove the handle for such a call"
        )
    if not with_images:
        in_cache = inputs.get("past_key_values") is not None or inputs.get("mm_encoder_outputs") is not None
        if ids is not None and not in_cache and (ids == adapter.image_token_id).any():
            raise InvalidInputError(
                "the prompt holds image placeholders, but no image came with it; pass pixel_values, "
                "or take the placeholders out of the prompt"
            )
        return
    if ids is None:
        raise InvalidInputError(
            "images can be pruned only together with input_ids, which say where they stand; pass input_ids, not "
            "inputs_embeds"
        )
    if mask is not None and mask.ndim != 2:
        raise InvalidInputError(
            f"attention_mask has {mask.ndim} dimensions, but a prompt can be shortened only with the 2-D mask (rows x "
            "columns) that the processor makes"
        )
    for name in adapter.image_inputs[1:]:
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


def _special_ids(model: Any, processor: Any) -> Int[Tensor, " s"]:
    """Ids that are no words: of the configs, and of the tokenizer where a processor was given."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "video_token_id")
    configs = (model.config, model.config.get_text_config(), model.generation_config)
    found: set[int] = set() if processor is None else set(processor.tokenizer.all_special_ids)
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            found.update([] if value is None else value if isinstance(value, list | tuple) else [value])
    return torch.tensor(sorted(found), dtype=torch.long)


def _pad_id(model: Any) -> int:
    """What to write into padding columns, which the mask hides; never the placeholder."""
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is not None:
            return config.pad_token_id
    return 0 if model.config.image_token_id != 0 else 1
