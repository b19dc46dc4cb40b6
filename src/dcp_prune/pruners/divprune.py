"""DivPrune (arXiv 2503.02175): tokens far from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from dcp_prune.functional.selection import farthest_point
from dcp_prune.functional.similarity import cosine_similarity
from dcp_prune.pruners.base import SelectionPruner
from dcp_prune.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class DivPrunePruner(SelectionPruner):
    """Farthest-point sampling by cosine distance in the language model's space, started at the most isolated token.

    It uses neither attention nor the question, so it needs no signal and works on every model.
    """

    matrices: ClassVar[int] = 3

    def select(self, tokens: VisualTokens, k: int) -> Int[Tensor, "b k"]:
        return farthest_point(cosine_similarity(tokens.features), k, mask=tokens.mask)
