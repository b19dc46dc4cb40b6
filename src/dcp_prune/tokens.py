"""The types that every file uses: what a pruner sees, what it returns, and which signals it may require."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcp_prune.errors import InvalidInputError

TextSpace = Literal["embeddings", "lookup"]
"""In which terms a question is compared with visual tokens: as word `embeddings`, as published methods do, or as the
language model's first attention layer does (`lookup`; ours, see `models.lookup.lookup_vectors`)."""


class Signal(StrEnum):
    """What a pruner may require in addition to the features. An adapter captures only what is required."""

    ENCODER_FEATURES = "encoder.features"
    """Features as they leave the vision encoder, before the projector (`EncoderTokens.features`)."""
    CLS_ATTENTION = "encoder.cls_attention"
    """Attention that [CLS] pays to each token at the feature layer (`EncoderTokens.cls_attention`); in encoders without
    [CLS], the attention that each token receives from all."""
    KEYS = "encoder.keys"
    """Attention keys of the feature layer, averaged over heads (`EncoderTokens.keys`)."""
    VALUES = "encoder.values"
    """Attention values of the feature layer, averaged over heads (`EncoderTokens.values`)."""
    CLS_VALUE_AFFINITY = "encoder.cls_value_affinity"
    """How similar the value of each token is to that of [CLS] at the feature layer
    (`EncoderTokens.cls_value_affinity`)."""
    TEXT = "text"
    """Embeddings of the question's words in the language model's space (`VisualTokens.text`)."""
    CLIP_SIMILARITY = "clip_similarity"
    """Cosines of tokens to the question in the joint space of CLIP's two towers (`VisualTokens.clip_similarity`)."""


@dataclass(frozen=True)
class EncoderTokens:
    """Visual tokens inside or right after the vision encoder, without [CLS].

    Attributes:
        features: hidden states. `b n v`.
        positions: (row, col) on the image grid in patches; for a video (row, col, time). `b n p`.
        indices: position of each token among the original tokens of its image, ascending. `b n`.
        cls_attention: attention that [CLS] pays to each token, averaged over heads; sums to less than 1 since
            the [CLS]-to-[CLS] share is left out. In encoders without [CLS], the attention that each token receives,
            averaged over heads and all tokens. `b n`, or None if it was not required.
        keys: attention keys averaged over heads. `b n c`, or None if they were not required.
        values: attention values averaged over heads; their norm says how much a token can pass on. `b n c`, or None
            if they were not required.
        cls_value_affinity: softmax over all tokens of the inner products of their values with that of [CLS], averaged
            over heads, without the share of [CLS] itself. `b n`, or None if it was not required.
        mask: False marks padding, if an earlier stage kept more tokens of other images; padding has no attention.
            `b n`, or None if there is no padding.
        state: what the stage before this one passed on; empty for the first stage.
    """

    features: Float[Tensor, "b n v"]
    positions: Float[Tensor, "b n p"]
    indices: Int[Tensor, "b n"]
    cls_attention: Float[Tensor, "b n"] | None = None
    keys: Float[Tensor, "b n c"] | None = None
    values: Float[Tensor, "b n c"] | None = None
    cls_value_affinity: Float[Tensor, "b n"] | None = None
    mask: Bool[Tensor, "b n"] | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class EncoderReduction:
    """What an `EncoderStage` did to n tokens: which m it kept, their new states, and which kept token absorbed which.

    Attributes:
        features: the kept tokens' new hidden states. `b m v`.
        kept: ascending positions of the kept tokens among the stage's n inputs. `b m`.
        assignment: for each of the n inputs, the slot in 0..m-1 that absorbed it, or -1 if it was dropped. `b n`.
        stats: numbers for the per-call record, e.g. run-time kappa `b`.
        mask: False marks padding in rows that keep fewer than m tokens; later layers do not attend to it. `b m`, or
            None if every row keeps m.
        state: what the next stage sees as `EncoderTokens.state`, such as a score per kept token, `b m`.
    """

    features: Float[Tensor, "b m v"]
    kept: Int[Tensor, "b m"]
    assignment: Int[Tensor, "b n"]
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Bool[Tensor, "b m"] | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class VisualTokens:
    """What a pruner sees: the visual tokens after the projector, as the language model would read them.

    After stages inside the encoder only n survivors are left; `indices`, `num_original` and `assignment` say where they
    came from. Without such stages `indices` counts 0..n-1 and `assignment` is the identity.

    If a model cuts an image into tiles, a row holds the tokens of all its tiles. Its original tokens are then the
    image's placeholders in the prompt, with the separators between rows of patches, which a pruner never sees.

    Attributes:
        features: `b n d`.
        mask: False marks padding. `b n`.
        positions: (row, col) on the image grid in patches; for a video (row, col, time). `b n p`.
        indices: position of each token among the original tokens of its image, ascending. `b n`.
        num_original: number of original tokens before any stage, N; if images differ, that of the largest.
        assignment: for each original token, the slot in 0..n-1 that absorbed it so far, or -1 if it was dropped. `b N`.
        encoder: the same tokens before the projector, with the signals that were required.
        text: the question's words in the language model's space: their embeddings, or the vectors that its first layer
            looks them up with, if the pruner's `text_space` is `lookup`. `b t d`.
        text_mask: False marks padding in `text`. `b t`.
        clip_similarity: cosine of each token (behind CLIP's last norm and visual projection) to CLIP's embedding of the
            question; the mean over its chunks if it is longer than the text tower reads. `b n`.
        tiles: which tile of its image each token comes from. `b n`, or None if every image is one tile.
        tile_lengths: for each image, how many tokens each tile had before any stage, which is what a budget counts;
            None if every image is one tile of `num_original` tokens.
    """

    features: Float[Tensor, "b n d"]
    mask: Bool[Tensor, "b n"]
    positions: Float[Tensor, "b n p"]
    indices: Int[Tensor, "b n"]
    num_original: int
    assignment: Int[Tensor, "b N"]
    encoder: EncoderTokens | None = None
    text: Float[Tensor, "b t d"] | None = None
    text_mask: Bool[Tensor, "b t"] | None = None
    clip_similarity: Float[Tensor, "b n"] | None = None
    tiles: Int[Tensor, "b n"] | None = None
    tile_lengths: tuple[tuple[int, ...], ...] | None = None

    def check(self) -> None:
        """Checks types and shapes against the description above, but no values.

        Raises:
            InvalidInputError: a tensor has another type or shape; the message names it.
        """
        b, n, d = _shape_of_features(self.features)
        of_token = {"mask": self.mask, "clip_similarity": self.clip_similarity}
        wide: dict[str, Tensor | None] = {}
        if self.encoder is not None:
            of_token |= {each: getattr(self.encoder, each) for each in ("cls_attention", "cls_value_affinity")}
            wide |= {each: getattr(self.encoder, each) for each in ("features", "keys", "values")}
            wide["encoder_features"] = wide.pop("features")
        for name, value in of_token.items():
            _require_shape(name, value, {"images": b, "tokens": n})
        for name, value in wide.items():
            _require_shape(name, value, {"images": b, "tokens": n, "width": None})
        _require_shape("text", self.text, {"images": b, "words": None, "wide, as the features": d})
        if self.text is not None:
            _require_shape("text_mask", self.text_mask, {"images": b, "words": self.text.shape[1]})
        for name, mask in (("mask", self.mask), ("text_mask", self.text_mask)):
            if mask is not None and mask.dtype != torch.bool:
                raise InvalidInputError(
                    f"{name} must be of dtype bool, False for padding, got {mask.dtype}; write {name}.bool()"
                )

    @property
    def lengths(self) -> tuple[int, ...]:
        """For each image, how many tokens it had before any stage, separators not counted."""
        if self.tile_lengths is None:
            return (self.num_original,) * self.features.shape[0]
        return tuple(map(sum, self.tile_lengths))

    @classmethod
    def from_features(
        cls,
        features: Float[Tensor, "b n d"],
        *,
        grid: tuple[int, int] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        cls_attention: Float[Tensor, "b n"] | None = None,
        encoder_features: Float[Tensor, "b n v"] | None = None,
        keys: Float[Tensor, "b n c"] | None = None,
        values: Float[Tensor, "b n c"] | None = None,
        cls_value_affinity: Float[Tensor, "b n"] | None = None,
        text: Float[Tensor, "b t d"] | None = None,
        text_mask: Bool[Tensor, "b t"] | None = None,
        clip_similarity: Float[Tensor, "b n"] | None = None,
    ) -> VisualTokens:
        """Builds unpruned tokens in raster order from plain tensors.

        Args:
            features: `b n d`.
            grid: (rows, cols) of the image in patches; default: the square of n tokens, or one row if n is no square.
            mask: False marks padding; default: no padding.
            cls_attention, encoder_features, keys, values, cls_value_affinity: signals of the encoder, where the pruner
                requires them.
            text, text_mask: the question's word embeddings and their padding mask.
            clip_similarity: cosines to the question in CLIP's joint space, where the pruner requires them.

        Raises:
            InvalidInputError: rows * cols differs from n, or a tensor has another shape or type than said here.
        """
        b, n, _ = _shape_of_features(features)
        side = round(n**0.5)
        rows, cols = grid or ((side, side) if side * side == n else (1, n))
        if rows * cols != n:
            raise InvalidInputError(
                f"a grid of {rows} x {cols} patches does not hold {n} visual tokens; give grid=(rows, cols)"
            )
        order = torch.arange(n, device=features.device)
        indices = order.expand(b, n)
        positions = torch.stack((order // cols, order % cols), dim=-1).to(torch.float32).expand(b, n, 2)
        signals = (encoder_features, cls_attention, keys, values, cls_value_affinity)
        encoder = (
            EncoderTokens(
                features=features if encoder_features is None else encoder_features,
                positions=positions,
                indices=indices,
                cls_attention=cls_attention,
                keys=keys,
                values=values,
                cls_value_affinity=cls_value_affinity,
            )
            if any(signal is not None for signal in signals)
            else None
        )
        if text is not None and text_mask is None:
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        made = cls(
            features=features,
            mask=torch.ones(b, n, dtype=torch.bool, device=features.device) if mask is None else mask,
            positions=positions,
            indices=indices,
            num_original=n,
            assignment=indices,
            encoder=encoder,
            text=text,
            text_mask=text_mask,
            clip_similarity=clip_similarity,
        )
        made.check()
        return made


@dataclass(frozen=True)
class PrunedTokens:
    """What a pruner returns: enough for the model, for the metric and for a picture.

    Attributes:
        features: `b k d`; zero in padded slots.
        indices: ascending positions among the ORIGINAL tokens of the image; -1 in padded slots. `b k`.
        mask: False marks padded slots, which come last and only in rows with fewer than k real tokens. `b k`.
        assignment: for each original token, the slot in 0..k-1 that stands for it, or -1 if it was dropped. `b N`.
        stats: per-call numbers, e.g. `kappa` `b`, `reselected` `b`, `scores` `b n`.
    """

    features: Float[Tensor, "b k d"]
    indices: Int[Tensor, "b k"]
    mask: Bool[Tensor, "b k"]
    assignment: Int[Tensor, "b N"]
    stats: Mapping[str, Tensor] = field(default_factory=dict)


def compose_assignments(first: Int[Tensor, "b N"], then: Int[Tensor, "b n"]) -> Int[Tensor, "b N"]:
    """Follows tokens through two assignments (original -> survivor -> slot); one dropped on the way stays -1."""
    return torch.where(first < 0, first, then.gather(1, first.clamp(min=0)))


def _shape_of_features(features: object) -> tuple[int, int, int]:
    if not isinstance(features, Tensor) or features.ndim != 3 or not features.is_floating_point():
        raise InvalidInputError(
            f"features must be a floating-point tensor of shape (images, tokens, width), got {_described(features)}"
        )
    b, n, d = features.shape
    return b, n, d


def _require_shape(name: str, value: object, shape: Mapping[str, int | None]) -> None:
    if value is None:
        return
    sizes = tuple(value.shape) if isinstance(value, Tensor) else ()
    pairs = zip(sizes, shape.values(), strict=False)
    if len(sizes) != len(shape) or any(size not in (None, own) for own, size in pairs):
        wanted = ", ".join(axis if size is None else f"{size} {axis}" for axis, size in shape.items())
        raise InvalidInputError(f"{name} must be a tensor of shape ({wanted}), got {_described(value)}")


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"one of shape {tuple(value.shape)} and {value.dtype}"
    advice = "; torch.from_numpy makes a tensor of it" if type(value).__module__ == "numpy" else ""
    return f"{type(value).__name__}{advice}"
