"""Distances between kept and full tokens by name, with and without weights, measured for many methods at once."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcp_prune.errors import InvalidInputError
from dcp_prune.functional.distribution import DISTANCES
from dcp_prune.functional.relevance import question_relevance
from dcp_prune.functional.similarity import scale_to_peak
from dcp_prune.tokens import VisualTokens

WEIGHTS = ("saliency", "relevance", "both")
"""How much each token of the full set counts: its [CLS] attention scaled to the peak; how much the question speaks of
it; or both, with a floor so that nothing counts for nothing (the weights of DCP-Prune)."""
FLOOR = 0.1
DISTANCE_NAMES = (*DISTANCES, *(f"{name}_{weights}" for name in DISTANCES for weights in WEIGHTS))
"""Every distance of `functional.distribution`, unweighted and with each of `WEIGHTS` as a suffix."""


def check_distances(names: Sequence[str]) -> tuple[str, ...]:
    """The names without repetitions.

    Raises:
        InvalidInputError: an unknown one; suggests a near name.
    """
    for name in names:
        if name not in DISTANCE_NAMES:
            near = difflib.get_close_matches(name, DISTANCE_NAMES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(DISTANCE_NAMES)}"
            raise InvalidInputError(f"there is no distance {name!r}; {hint}")
    return tuple(dict.fromkeys(names))


class Reference:
    """Full sets of tokens that many methods' kept tokens are measured against.

    Args:
        tokens: one row per image. `i n d`.
        index: image of each question. `q`.
        text, words: word embeddings of the questions and which of them are words; None for no text. `q t d`, `q t`.
    """

    def __init__(
        self,
        tokens: VisualTokens,
        index: Int[Tensor, "q"],
        text: Float[Tensor, "q t d"] | None,
        words: Bool[Tensor, "q t"] | None,
    ) -> None:
        self.tokens = tokens
        self.index = index
        attention = None if tokens.encoder is None else tokens.encoder.cls_attention
        self.saliency = None if attention is None else scale_to_peak(attention, tokens.mask)
        self.text, self.words = text, words
        self._relevance: Float[Tensor, "q n"] | None = None

    def distance(
        self,
        name: str,
        kept: Float[Tensor, "r k d"],
        mask: Bool[Tensor, "r k"],
        *,
        by_question: bool,
    ) -> Float[Tensor, "q"] | None:
        """One number per question; None where the weights need a [CLS] attention that the encoder did not give.

        Args:
            name: in `DISTANCE_NAMES`.
            kept: the tokens that reached the language model; a row per question or, where those do not matter, per
                image.
            mask: False marks padding among them.
            by_question: whether there is a row per question.
        """
        base, _, suffix = name.rpartition("_")
        base, suffix = (base, suffix) if suffix in WEIGHTS else (name, "")
        if suffix in ("saliency", "both") and self.saliency is None:
            return None
        by_question_too = by_question or suffix in ("relevance", "both")
        index = self.index if by_question_too else torch.arange(len(kept), device=kept.device)
        rows = torch.arange(len(index), device=kept.device)
        pieces = []
        for piece in rows.split(8):
            own = piece if by_question else index[piece]
            image = index[piece]
            pieces.append(
                DISTANCES[base](
                    kept[own],
                    self.tokens.features[image],
                    kept_mask=mask[own],
                    full_mask=self.tokens.mask[image],
                    weights=self._weights(suffix, piece, image),
                )
            )
        values = torch.cat(pieces)
        return values if by_question_too else values[self.index]

    def _weights(self, suffix: str, question: Any, image: Any) -> Float[Tensor, "r n"] | None:
        if suffix == "":
            return None
        if suffix == "saliency":
            assert self.saliency is not None
            return self.saliency[image]
        relevance = self.relevance()[question]
        if suffix == "relevance":
            return relevance
        assert self.saliency is not None
        return (relevance + self.saliency[image] + FLOOR).masked_fill(~self.tokens.mask[image], 0.0)

    def relevance(self) -> Float[Tensor, "q n"]:
        """How much each question speaks of each token; 0 without a question."""
        if self._relevance is None:
            tokens = self.tokens
            if self.text is None:
                self._relevance = torch.zeros(len(self.index), tokens.features.shape[1], device=tokens.features.device)
            else:
                self._relevance = question_relevance(
                    tokens.features[self.index], self.text, mask=tokens.mask[self.index], text_mask=self.words
                )
        return self._relevance
