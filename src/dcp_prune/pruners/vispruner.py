"""VisPruner (arXiv 2412.01818): the most attended tokens, and what is left of the rest without duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dcp_prune.functional.similarity import cosine_similarity
from dcp_prune.pruners.base import SelectionPruner
from dcp_prune.pruners.options import Count, Share
from dcp_prune.tokens import Signal, VisualTokens


@dataclass(frozen=True, kw_only=True)
class VisPruner(SelectionPruner):
    """A share of k goes to the tokens that [CLS] attends to most, the rest to tokens that survive de-duplication.

    De-duplication works in rounds on the remaining tokens, listed by attention: of every second token, the up to
    `per_round` that are most similar to one of the others are dropped.

    Attributes:
        important_share: share of k that is chosen by attention.
        per_round: the most tokens that a round drops.

    Raises:
        InvalidInputError: important_share is outside [0, 1], or per_round below 1.
    """

    requires: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION, Signal.ENCODER_FEATURES})
    matrices: ClassVar[int] = 2

    important_share: Share = 0.5
    per_round: Count = 8

    @torch.no_grad()
    def select(self, tokens: VisualTokens, k: int) -> Int[Tensor, "b k"]:
        attention = self.read(tokens, Signal.CLS_ATTENTION).masked_fill(~tokens.mask, -torch.inf)
        order = attention.argsort(dim=1, descending=True, stable=True)
        important = int(k * self.important_share)
        diverse = k - important
        if diverse == 0:
            return order[:, :k]
        similarity = cosine_similarity(self.read(tokens, Signal.ENCODER_FEATURES))
        rest = order[:, important:]
        real = tokens.mask.sum(dim=1, keepdim=True) - important
        while rest.shape[1] > diverse:
            rest, real = self._round(similarity, rest, real, diverse)
        return torch.cat((order[:, :important], rest), dim=1)

    def _round(
        self, similarity: Float[Tensor, "b n n"], rest: Int[Tensor, "b r"], real: Int[Tensor, "b 1"], goal: int
    ) -> tuple[Int[Tensor, "b q"], Int[Tensor, "b 1"]]:
        """One round: the shorter list, and how many of its first tokens are real in each row.

        The length follows from the counts alone. A row with padding has fewer to drop and waits for the others.
        """
        b, n, _ = similarity.shape
        length = rest.shape[1]
        place = torch.arange(length, device=rest.device)
        judged, others = rest[:, ::2], rest[:, 1::2]
        counted, others_real = (place[::2] < real), (place[1::2] < real)
        if others.shape[1]:
            pairs = similarity.flatten(1).gather(1, (judged.unsqueeze(2) * n + others.unsqueeze(1)).flatten(1))
            pairs = pairs.view(b, judged.shape[1], others.shape[1])
            score = pairs.masked_fill(~others_real.unsqueeze(1), -2.0).amax(dim=2)
        else:
            score = torch.zeros_like(judged, dtype=similarity.dtype)
        closest_first = score.masked_fill(~counted, -torch.inf).argsort(dim=1, descending=True, stable=True)
        drop = torch.minimum(((real + 1) // 2), (real - goal)).clamp(0, self.per_round)
        gone = (place[: judged.shape[1]] < drop) | ~counted.gather(1, closest_first)
        listed = torch.cat((judged.gather(1, closest_first), others), dim=1)
        gone = torch.cat((gone, ~others_real), dim=1)
        shorter = length - min(self.per_round, length - goal, (length + 1) // 2)
        keep = gone.to(torch.uint8).argsort(dim=1, stable=True)[:, :shorter]
        return listed.gather(1, keep), real - drop
