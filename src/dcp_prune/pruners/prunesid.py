"""PruneSID (arXiv 2603.09480): the best of each principal component, duplicates removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from dcp_prune.functional.clustering import principal_groups
from dcp_prune.functional.selection import ordered_quota, suppress
from dcp_prune.functional.similarity import cosine_similarity
from dcp_prune.pruners.base import SelectionPruner
from dcp_prune.tokens import Signal, VisualTokens


@dataclass(frozen=True, kw_only=True)
class PruneSIDPruner(SelectionPruner):
    """Groups tokens by their strongest principal component, suppresses duplicates inside, keeps the best of each group.

    With K the published budget, K / 4 groups. Inside a group, best [CLS] attention first, a token is suppressed if its
    cosine to a survivor exceeds K / 32 times the mean cosine of the image. A group's budget follows its survivors, and
    its tokens come survivors first. The authors' components are randomised and differ from run to run; ours are exact.

    Attributes:
        cls_in_budget: the published budget K counts [CLS], which the language model then reads too. True derives
            groups, threshold and caps from K = k + 1 for the k patches, False from k. [CLS] itself is never kept.
    """

    requires: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION, Signal.ENCODER_FEATURES})
    matrices: ClassVar[int] = 3

    cls_in_budget: bool = False

    @torch.no_grad()
    def select(self, tokens: VisualTokens, k: int) -> Int[Tensor, "b k"]:
        """The tokens group by group, in the order of the components; survivors first, then by attention."""
        features = self.read(tokens, Signal.ENCODER_FEATURES)
        return self.select_in_groups(tokens, k, principal_groups(features.sigmoid(), self.num_groups(k), tokens.mask))

    def num_groups(self, k: int) -> int:
        """Groups for k tokens, at least one."""
        return max(1, (k + self.cls_in_budget) // 4)

    @torch.no_grad()
    def select_in_groups(self, tokens: VisualTokens, k: int, groups: Int[Tensor, "b n"]) -> Int[Tensor, "b k"]:
        """`select` with the groups given, each token's in 0..num_groups(k)-1."""
        attention, mask = self.read(tokens, Signal.CLS_ATTENTION), tokens.mask
        budget = k + self.cls_in_budget
        member = functional.one_hot(groups, self.num_groups(k)) * mask.unsqueeze(-1)  # b n g
        similarity = cosine_similarity(self.read(tokens, Signal.ENCODER_FEATURES))
        count = mask.sum(dim=1).to(similarity.dtype)
        own = similarity.diagonal(dim1=1, dim2=2).sum(dim=1)
        mean = (similarity.sum(dim=(1, 2)) - own) / (count * (count - 1)).clamp(min=1)
        alike = similarity > (budget / 32 * mean)[:, None, None]
        survives = suppress(attention, alike & (groups.unsqueeze(1) == groups.unsqueeze(2)), mask & (attention > 0))

        found = (member * survives.unsqueeze(-1)).sum(dim=1)
        quota = _group_budgets(found, member.sum(dim=1), k, budget)
        # Attention is at most 1, so survivors come before all others.
        place, kept = ordered_quota(attention + 2.0 * survives, groups, quota, mask)
        return place.masked_fill(~kept, place.shape[1]).argsort(dim=1, stable=True)[:, :k]


def _group_budgets(found: Int[Tensor, "b g"], size: Int[Tensor, "b g"], k: int, budget: int) -> Int[Tensor, "b g"]:
    """Tokens to keep of each group, k in all: one each, the rest by survivors, capped so that no group takes too much.

    Args:
        found: survivors of each group.
        size: tokens of each group.
        k: tokens to keep.
        budget: the published budget K, from which the caps are derived.
    """
    low = size.clamp(max=1)
    cap = torch.minimum(size, found).clamp(max=5 * -(-budget // 64))
    # Raised together until they admit the budget; K raises always suffice where there are as many tokens.
    raised = torch.minimum(cap.unsqueeze(1) + torch.arange(budget + 1, device=cap.device)[:, None], size.unsqueeze(1))
    enough = raised.sum(dim=2) >= size.sum(dim=1, keepdim=True).clamp(max=budget)
    first = enough.to(torch.uint8).argmax(dim=1)[:, None, None].expand(-1, 1, size.shape[1])
    cap = raised.gather(1, first).squeeze(1)

    other = k - low.sum(dim=1, keepdim=True)
    share = found / found.sum(dim=1, keepdim=True).clamp(min=1)
    edges = (other * share.cumsum(dim=1)).round().long()
    edges[:, -1:] = other
    quota = torch.minimum(low + edges.diff(dim=1, prepend=torch.zeros_like(other)), cap)
    # What the caps refused goes to the groups with most survivors.
    rank = found.argsort(dim=1, descending=True, stable=True)
    spare = (cap - quota).gather(1, rank)
    before = spare.cumsum(dim=1) - spare
    extra = torch.minimum((k - quota.sum(dim=1, keepdim=True) - before).clamp(min=0), spare)
    return quota.scatter_add(1, rank, extra)
