"""SCoRe (CVPR 2026): from the most attended token on, what is salient and unlike all that is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from dcp_prune.functional.selection import farthest_point
from dcp_prune.functional.similarity import cosine_similarity
from dcp_prune.pruners.base import SelectionPruner
from dcp_prune.pruners.options import Weight
from dcp_prune.tokens import Signal, VisualTokens


@dataclass(frozen=True, kw_only=True)
class SCoRePruner(SelectionPruner):
    """Weighted k-center: starts at the most attended token, then picks by distance to the picks times attention.

    next = argmax_j a_j ** alpha * min over picks s of (1 - cos(x_j, x_s)), on the features before the projector.

    Attributes:
        alpha: weight of saliency against distance; 0 uses distance alone. Published: 0.8.

    Raises:
        InvalidInputError: alpha is negative.
    """

    requires: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION, Signal.ENCODER_FEATURES})
    matrices: ClassVar[int] = 2

    alpha: Weight = 0.8

    def select(self, tokens: VisualTokens, k: int) -> Int[Tensor, "b k"]:
        similarity = cosine_similarity(self.read(tokens, Signal.ENCODER_FEATURES))
        saliency = self.read(tokens, Signal.CLS_ATTENTION).clamp(min=0.0) ** self.alpha
        return farthest_point(similarity, k, weights=saliency, mask=tokens.mask, start="heaviest")
