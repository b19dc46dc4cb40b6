"""SCOPE (arXiv 2510.24214): saliency times what a token adds to the coverage of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from dcp_prune.functional.clustering import facility_location
from dcp_prune.functional.similarity import cosine_similarity
from dcp_prune.pruners.base import SelectionPruner
from dcp_prune.pruners.options import Weight
from dcp_prune.tokens import Signal, VisualTokens


@dataclass(frozen=True, kw_only=True)
class SCOPEPruner(SelectionPruner):
    """Picks the token whose [CLS] attention times what it adds to the coverage of all tokens is largest, k times.

    next = argmax_j a_j ** alpha * sum_i max(0, cos(x_i, x_j) - cover_i), on the features before the projector.

    Attributes:
        alpha: weight of saliency against coverage; 0 uses coverage alone. Published: 1.

    Raises:
        InvalidInputError: alpha is negative.
    """

    requires: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION, Signal.ENCODER_FEATURES})
    matrices: ClassVar[int] = 3

    alpha: Weight = 1.0

    def select(self, tokens: VisualTokens, k: int) -> Int[Tensor, "b k"]:
        similarity = cosine_similarity(self.read(tokens, Signal.ENCODER_FEATURES))
        saliency = self.read(tokens, Signal.CLS_ATTENTION) ** self.alpha
        return facility_location(similarity, k, merit=saliency, mask=tokens.mask)
