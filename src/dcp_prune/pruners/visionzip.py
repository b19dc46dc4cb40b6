"""VisionZip (arXiv 2412.04467): what [CLS] attends to, and a few tokens that absorb the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from dcp_prune.functional.selection import masked_topk
from dcp_prune.functional.similarity import cosine_similarity, gather_tokens
from dcp_prune.pruners.base import Pruner, Selection
from dcp_prune.pruners.options import Rule, is_whole
from dcp_prune.tokens import Signal, VisualTokens

Merge = Literal["add", "mean", "none"]
Contextual = Annotated[int, Rule("be a whole number of at least 0", lambda x: is_whole(x) and x >= 0)]


@dataclass(frozen=True, kw_only=True)
class VisionZipPruner(Pruner):
    """Dominant tokens by [CLS] attention, then contextual ones: an even sample of the rest, each merged with its likes.

    Of the tokens that are not dominant, every so many-th becomes a contextual token; each other one joins the
    contextual token whose attention key is most similar to its own. `assignment` tells which, and `merge` how the
    contextual token's features change. The authors merge before the projector, this pruner behind it.

    Attributes:
        contextual: how many of the k tokens are contextual; None is the published split (10 of 64, 6 of 32, 4 of 16)
            and between its points a straight line.
        merge: `add` puts the mean of the joining tokens on top of the contextual one, as released; `mean` averages all
            of them, which keeps their norm; `none` drops what joins.
        cls_in_budget: the published budget K counts [CLS], which the language model then reads too. True takes the
            split of K = k + 1 for the k patches, False that of k. [CLS] itself is never kept.

    Raises:
        InvalidInputError: contextual is negative, or merge unknown.
    """

    requires: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION, Signal.KEYS})

    contextual: Contextual | None = None
    merge: Merge = "add"
    cls_in_budget: bool = False

    def num_contextual(self, k: int) -> int:
        """How many of k tokens are contextual; at least one token stays dominant."""
        published = _published_split(k + self.cls_in_budget)
        return min(published if self.contextual is None else self.contextual, k - 1)

    def prune(self, tokens: VisualTokens, k: int) -> Selection:
        c = self.num_contextual(k)
        if c == 0:
            return Selection(kept=masked_topk(self.read(tokens, Signal.CLS_ATTENTION), tokens.mask, k))
        with torch.no_grad():
            dominant = masked_topk(self.read(tokens, Signal.CLS_ATTENTION), tokens.mask, k - c)
            rest = tokens.mask.scatter(1, dominant, False)
            targets = even_sample(rest, c)
            kept, order = torch.cat((dominant, targets), dim=1).sort(dim=1)
            slot = order.argsort(dim=1)[:, k - c :]  # of each target among the kept tokens
            keys = self.read(tokens, Signal.KEYS)
            closest = cosine_similarity(keys, gather_tokens(keys, targets)).argmax(dim=2)  # b n
            joins = rest.scatter(1, targets, False)
            assignment = slot.gather(1, closest).masked_fill(~joins, -1)
            assignment = assignment.scatter(1, kept, torch.arange(k, device=kept.device).expand_as(kept))
            member = functional.one_hot(closest, c).masked_fill(~joins.unsqueeze(-1), 0).mT  # b c n
        if self.merge == "none":
            return Selection(kept=kept, assignment=assignment)
        features = gather_tokens(tokens.features, kept)
        merged = self._merged(tokens.features, gather_tokens(tokens.features, targets), member)
        features = features.scatter(1, slot.unsqueeze(-1).expand_as(merged), merged)
        return Selection(kept=kept, features=features, assignment=assignment)

    def _merged(
        self, features: Float[Tensor, "b n d"], targets: Float[Tensor, "b c d"], member: Int[Tensor, "b c n"]
    ) -> Float[Tensor, "b c d"]:
        """The contextual tokens with what joined them; those that nothing joined stay as they are, bit for bit."""
        wide = torch.promote_types(features.dtype, torch.float32)
        count = member.sum(dim=2, keepdim=True)
        joined = member.to(wide) @ features.to(wide)
        if self.merge == "add":
            merged = targets.to(wide) + joined / count.clamp(min=1)
        else:
            merged = (targets.to(wide) + joined) / (count + 1)
        limits = torch.finfo(features.dtype)
        return merged.clamp(limits.min, limits.max).to(features.dtype)  # a sum may exceed what half precision holds


def even_sample(candidates: Bool[Tensor, "b n"], c: int) -> Int[Tensor, "b c"]:
    """Every so many-th of the candidates, from the first on; ascending. Every row needs at least c candidates."""
    step = candidates.sum(dim=1, keepdim=True) // c
    listed = (~candidates).to(torch.uint8).argsort(dim=1, stable=True)
    return listed.gather(1, torch.arange(c, device=listed.device) * step.clamp(min=1))


def _published_split(budget: int) -> int:
    """Contextual tokens: 10 of 64, 20 of 128, 30 of 192 (authors); 2 of 8, 4 of 16, 6 of 32 (SCOPE's comparison)."""
    if budget <= 16:
        return budget // 4
    return 2 + budget // 8 if budget <= 64 else budget * 10 // 64
