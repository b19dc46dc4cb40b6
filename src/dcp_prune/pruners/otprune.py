"""OTPrune (arXiv 2602.20205): tokens that span the image's distribution, by a greedy log-determinant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from dcp_prune.functional.selection import greedy_determinant
from dcp_prune.functional.similarity import gram, widened
from dcp_prune.pruners.base import SelectionPruner
from dcp_prune.pruners.options import Positive
from dcp_prune.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class OTPrunePruner(SelectionPruner):
    """Greedily maximises log det of (I + gamma G G^T) on the kept tokens, where G are the tokens' inner products.

    Before the products each channel is divided by its norm over the tokens. Of the kernel only its diagonal and the
    columns of the picks are computed, so the cubic product G G^T is never formed.

    Attributes:
        gamma: weight of G G^T, against the identity.

    Raises:
        InvalidInputError: gamma is not above 0.
    """

    matrices: ClassVar[int] = 3

    gamma: Positive = 0.01

    @torch.no_grad()
    def select(self, tokens: VisualTokens, k: int) -> Int[Tensor, "b k"]:
        features = widened(tokens.features)
        products = gram(features / features.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12))

        def column(pick: Int[Tensor, "b 1"]) -> Tensor:
            own = products.gather(1, pick.unsqueeze(-1).expand(-1, 1, products.shape[1]))
            return (self.gamma * own @ products).squeeze(1).scatter_add(1, pick, torch.ones_like(own[:, 0, :1]))

        diagonal = 1.0 + self.gamma * products.square().sum(dim=2)
        return greedy_determinant(diagonal, column, k, mask=tokens.mask)
