"""The images and videos of a call: encoded, pruned and joined, before anything is known of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from dcp_prune.budget import Budget
from dcp_prune.errors import InvalidInputError, UnsupportedModelError
from dcp_prune.functional.similarity import gather_tokens
from dcp_prune.integrations.stopwatch import Stopwatch
from dcp_prune.integrations.transformers.prompt import images_per_row
from dcp_prune.models import EncodedImages, ImageLayout, ModelAdapter, get_adapter, plain_layout
from dcp_prune.pruners.base import Pruner
from dcp_prune.pruners.batching import regroup
from dcp_prune.tokens import PrunedTokens, Signal


def encode_images(
    model: PreTrainedModel, pixel_values: Float[Tensor, "i *tiles c y x"], *pruners: Pruner, **details: Any
) -> EncodedImages:
    """Runs the vision encoder once, for any number of questions and for all these pruners.

    Hand the result to `prune_inputs(..., encoded=...)`; `EncodedImages.select` repeats or reorders images.

    Args:
        model: a model with an adapter.
        pixel_values: preprocessed images.
        pruners: their in-encoder stages are applied, and all signals that any of them uses are captured.
        details: what else the processor makes of images, such as `image_sizes`, where the model cuts them into tiles.

    Raises:
        InvalidInputError: a detail is missing, or the pruners want different in-encoder stages, so they cannot share an
            encoder pass.
        UnsupportedModelError: see `get_adapter`.
    """
    adapter = get_adapter(model)
    return encode(adapter, {**details, adapter.image_inputs[0]: pixel_values}, pruners)


def encode_videos(model: PreTrainedModel, pixel_values_videos: Any, *pruners: Pruner, **details: Any) -> EncodedImages:
    """`encode_images` for videos: one row per video, frames are tiles.

    Args:
        model: a model whose videos have an adapter.
        pixel_values_videos: preprocessed videos, in the form that the model's processor gives them.
        pruners, details: as for `encode_images`.

    Raises:
        InvalidInputError: see `encode_images`; a video without frames.
        UnsupportedModelError: see `get_adapter`; the videos of this model cannot be pruned.
    """
    adapter = get_adapter(model).video
    if adapter is None:
        raise UnsupportedModelError(
            f"videos of {type(model).__name__} cannot be pruned; `dcp-prune list --models` says which can"
        )
    return encode(adapter, {**details, adapter.image_inputs[0]: pixel_values_videos}, pruners)


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


@dataclass(frozen=True, eq=False)
class CallImages:
    """The images or the videos of a call, encoded already or not yet."""

    adapter: ModelAdapter
    inputs: Mapping[str, Any]
    layouts: tuple[ImageLayout, ...]
    encoded: EncodedImages | None

    @classmethod
    def of(cls, adapter: ModelAdapter, inputs: Mapping[str, Any], encoded: EncodedImages | None) -> CallImages:
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

    def select(self, which: list[int]) -> CallImages:
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
class PrunedImages:
    """What is left of the images or videos of a call that were encoded together.

    Attributes:
        images: whose they are.
        which: number of each among all images and videos of the call.
        tokens: what the pruner kept; the stats of in-encoder stages.
        deepstack: of the kept tokens. `i k d`.
    """

    images: CallImages
    which: list[int]
    tokens: PrunedTokens
    stage_stats: tuple[Mapping[str, Tensor], ...]
    deepstack: tuple[Float[Tensor, "i k d"], ...]


def prune_images(
    kinds: Sequence[CallImages],
    whole: Sequence[bool],
    pruner: Pruner,
    ask: Callable[[torch.device], dict[str, Tensor | None]],
    watch: Stopwatch,
) -> list[PrunedImages]:
    """Encodes all images and videos of a call and chooses among their tokens.

    Args:
        kinds: the images, the videos, or both.
        whole: which of them the budget keeps whole.
        pruner: which tokens to keep, and how many.
        ask: the questions about all of them.
        watch: of the call.
    """
    pruned: list[PrunedImages] = []
    for each in kinds:
        first = sum(len(part.which) for part in pruned)
        for group in _encoder_passes(each, pruner):
            part = each if len(group) == len(each) else each.select(group)
            pruned.append(_encode_and_prune(part, [first + image for image in group], whole, pruner, ask, watch))
    return pruned


def _encode_and_prune(
    images: CallImages,
    which: list[int],
    whole: Sequence[bool],
    pruner: Pruner,
    ask: Callable[[torch.device], dict[str, Tensor | None]],
    watch: Stopwatch,
) -> PrunedImages:
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
    return PrunedImages(images, which, pruned, coded.stage_stats, deepstack)


def join(pruned: Sequence[PrunedImages]) -> tuple[PrunedTokens, tuple[Float[Tensor, "i k d"], ...]]:
    """All images and videos of a call in their order, and their DeepStack features."""
    counts = [len(part.which) for part in pruned]
    splits = pad_columns([part.tokens.assignment for part in pruned], -1).split(counts)
    parts = [replace(part.tokens, assignment=own) for part, own in zip(pruned, splits, strict=True)]
    joined = regroup(parts, [part.which for part in pruned])
    width = joined.features.shape[1]
    order = torch.tensor([image for part in pruned for image in part.which]).argsort().to(joined.indices.device)
    deepstack = tuple(
        torch.cat([functional.pad(each, (0, 0, 0, width - each.shape[1])) for each in layer])[order]
        for layer in zip(*(part.deepstack for part in pruned), strict=True)
    )
    return joined, deepstack


def pad_columns(values: Sequence[Int[Tensor, "i n"]], fill: int) -> Int[Tensor, "i n"]:
    width = max(value.shape[1] for value in values)
    return torch.cat([functional.pad(value, (0, width - value.shape[1]), value=fill) for value in values])


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


def images_behind_cache(ids: Tensor, tail: Tensor, images: CallImages) -> list[int]:
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


def _encoder_passes(images: CallImages, pruner: Pruner) -> list[list[int]]:
    """Which images share an encoder pass: all of them, or those of one size where tokens are dropped inside."""
    sizes, depth = [layout.tile_size for layout in images.layouts], images.adapter.num_layers
    if images.encoded is not None or not any(pruner.encoder_stages(size, depth) for size in set(sizes)):
        return [list(range(len(sizes)))]
    return [[image for image, each in enumerate(sizes) if each == size] for size in sorted(set(sizes))]
