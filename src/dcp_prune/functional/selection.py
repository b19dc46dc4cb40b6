"""Choosing k of n tokens: by score, or so that the chosen lie far apart."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def masked_topk(scores: Float[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None, k: int) -> Int[Tensor, "b k"]:
    """Ascending positions of the k largest scores; on ties the earlier token wins, and padding never does.

    Args:
        scores: higher is kept. `b n`.
        mask: False marks padding; every row needs at least k real tokens. `b n`.
        k: tokens to keep.
    """
    if mask is not None:
        # A real token may score -inf and must still come before padding.
        scores = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~mask, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order[:, :k].sort(dim=1).values


@torch.no_grad()
def farthest_point(
    similarity: Float[Tensor, "b n n"],
    k: int,
    *,
    weights: Float[Tensor, "b n"] | None = None,
    mask: Bool[Tensor, "b n"] | None = None,
    start: Literal["isolated", "heaviest"] = "isolated",
) -> Int[Tensor, "b k"]:
    """Greedy farthest-point sampling (k-center, max-min diversity): each pick is the token farthest from all before it.

    next = argmax_j weights_j * min over picks s of (1 - similarity_js). Gonzalez, 1985; as a pruner: DivPrune.

    Args:
        similarity: symmetric, at most 1. `b n n`.
        k: tokens to pick.
        weights: non-negative; a heavier token counts as farther away. `b n`.
        mask: False marks padding; every row needs at least k real tokens. `b n`.
        start: the first pick is the token with the largest weighted distance to its nearest neighbour (`isolated`), or
            the one with the largest weight (`heaviest`).

    Returns:
        Positions in the order of picking, unique; on ties the earlier token wins. `b k`.
    """
    b, n, _ = similarity.shape
    closed = torch.zeros(b, n, dtype=torch.bool, device=similarity.device) if mask is None else ~mask
    heavy = None if weights is None else weights.to(similarity.dtype).clamp(min=torch.finfo(similarity.dtype).tiny)
    merit = similarity.new_ones(b, n) if heavy is None else heavy
    if start == "isolated":
        others = similarity.masked_fill(closed.unsqueeze(1), -1.0)
        others.diagonal(dim1=1, dim2=2).fill_(-1.0)
        merit = merit * (1.0 - others.amax(dim=2))
    pick = merit.masked_fill(closed, -torch.inf).argmax(dim=1, keepdim=True)
    picks = [pick]
    # Similarity to the nearest pick; what is picked or padding counts as infinitely near and is never the farthest.
    nearest = torch.zeros_like(merit).fill_(-torch.inf).masked_fill_(closed, torch.inf)
    for _ in range(k - 1):
        torch.maximum(nearest, similarity.gather(1, pick.unsqueeze(-1).expand(b, 1, n)).squeeze(1), out=nearest)
        nearest.scatter_(1, pick, torch.inf)
        far = nearest.neg() if heavy is None else (1.0 - nearest) * heavy
        pick = far.argmax(dim=1, keepdim=True)
        picks.append(pick)
    return torch.cat(picks, dim=1)
