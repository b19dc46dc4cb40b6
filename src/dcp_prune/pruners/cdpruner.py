"""CDPruner (arXiv 2506.10967): diverse tokens, weighted by CLIP's reading of the question, which no adapter gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from dcp_prune.functional.selection import greedy_determinant
from dcp_prune.functional.similarity import gather_tokens, vector_lengths, widened
from dcp_prune.pruners.base import SelectionPruner
from dcp_prune.tokens import Signal, VisualTokens

Extent = Literal["image", "batch"]


@dataclass(frozen=True, kw_only=True)
class CDPruner(SelectionPruner):
    """Greedy MAP of a determinantal point process whose kernel is r_i r_j cos(z_i, z_j), r the relevance of a token.

    Relevance is the *negated* cosine of token and question in CLIP's joint space, stretched to (0, 1]: there, patches
    that speak of a text are the least similar to it. Kernel columns are computed as they are needed.

    Attributes:
        relevance_extent: over what the smallest and the largest relevance are taken: each `image`, or the whole `batch`
            at once as released, where the rows are the crops of one image.

    Raises:
        InvalidInputError: relevance_extent is unknown.
    """

    requires: ClassVar[frozenset[Signal]] = frozenset({Signal.CLIP_SIMILARITY})

    relevance_extent: Extent = "image"

    @property
    def joint(self) -> bool:
        return self.relevance_extent == "batch"

    @torch.no_grad()
    def select(self, tokens: VisualTokens, k: int) -> Int[Tensor, "b k"]:
        relevance = -self.read(tokens, Signal.CLIP_SIMILARITY)
        low = relevance.masked_fill(~tokens.mask, torch.inf).amin(dim=1, keepdim=True)
        high = relevance.masked_fill(~tokens.mask, -torch.inf).amax(dim=1, keepdim=True)
        if self.relevance_extent == "batch":
            low, high = low.amin(), high.amax()
        relevance = (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)
        relevance = relevance.masked_fill(~tokens.mask, 0.0)
        features = widened(tokens.features)
        length = vector_lengths(features)
        relevance = relevance.masked_fill(length <= 1e-12, 0.0)  # a zero vector spans nothing
        weight = relevance / length

        def column(pick: Int[Tensor, "b 1"]) -> Tensor:
            products = (gather_tokens(features, pick) @ features.mT).squeeze(1)
            return products * weight * weight.gather(1, pick)

        return greedy_determinant(relevance.square(), column, k, mask=tokens.mask)
