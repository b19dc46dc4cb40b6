"""HoloV (arXiv 2510.02912): the most attended tokens of each strip; strips share the budget by their attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from dcp_prune.functional.selection import ordered_quota
from dcp_prune.pruners.base import SelectionPruner
from dcp_prune.pruners.options import Count
from dcp_prune.tokens import Signal, VisualTokens


@dataclass(frozen=True, kw_only=True)
class HoloVPruner(SelectionPruner):
    """Cuts the raster into consecutive runs. Each gets a share of k by its mean [CLS] attention, and keeps its best.

    The paper adds the variance of a token's cosines inside its run to its score. In the released formula this term is
    rescaled to its own mean and then averaged over the run, which leaves the same constant in every run: it cancels in
    the shares, and tokens inside a run are ranked by attention alone. So it is left out here, with the same selection.

    Attributes:
        strips: number of runs; 16 is published for 64 of 576 tokens. None uses the rule that the authors published for
            another model, max(1, int(1024 / 576 * n / k)).

    Raises:
        InvalidInputError: strips is below 1.
    """

    requires: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION})

    strips: Count | None = 16

    @torch.no_grad()
    def select(self, tokens: VisualTokens, k: int) -> Int[Tensor, "b k"]:
        """The tokens strip by strip, best first; in strips that are kept whole in raster order.

        What a strip cannot use of its share, since it holds fewer tokens, goes to the most attended tokens left over.
        """
        attention = self.read(tokens, Signal.CLS_ATTENTION)
        b, n = attention.shape
        # Strips run over the real tokens alone, so that an image is cut alike whatever the batch pads it to.
        position = (tokens.mask.cumsum(dim=1) - 1).clamp(min=0)
        length = tokens.mask.sum(dim=1, keepdim=True)
        wanted = self.strips or (1024 / 576 * length / k).long()
        strips = torch.minimum(length, torch.as_tensor(wanted, device=length.device)).clamp(min=1)
        # The first of them, as many as the division leaves over, are one token longer.
        short, longer = length // strips, length % strips
        strip = torch.where(position < longer * (short + 1), position // (short + 1), (position - longer) // short)
        count = min(n, self.strips or max(1, int(1024 / 576 * n / k)))
        real = tokens.mask.to(attention.dtype)
        size = attention.new_zeros(b, count).scatter_add(1, strip, real)
        mean = attention.new_zeros(b, count).scatter_add(1, strip, attention) / size.clamp(min=1.0)
        share = k * mean / mean.sum(dim=1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
        quota = share.floor().long()
        by_share = share.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
        quota = quota + (by_share < k - quota.sum(dim=1, keepdim=True)).long()

        place, kept = ordered_quota(attention, strip, quota, tokens.mask)
        place = torch.where(quota.gather(1, strip) >= size.gather(1, strip), position, place)
        spare = (
            attention.masked_fill(~tokens.mask, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        )
        return torch.where(kept, place, n + spare).argsort(dim=1)[:, :k]
