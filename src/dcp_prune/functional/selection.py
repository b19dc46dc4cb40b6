"""Choosing k of n tokens: by score, or so that the chosen lie far apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcp_prune.functional.fused import farthest_is_fused


def masked_topk(scores: Float[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None, k: int) -> Int[Tensor, "b k"]:
    """Ascending positions of the k largest scores; arguments as in `ranked_topk`. `b k`."""
    return ranked_topk(scores, mask, k).sort(dim=1).values


def ranked_topk(scores: Float[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None, k: int) -> Int[Tensor, "b k"]:
    """Positions of the k largest scores, best first; on ties the earlier token wins, and padding never does.

    Args:
        scores: higher is kept. `b n`.
        mask: False marks padding; every row needs at least k real tokens. `b n`.
        k: tokens to keep.
    """
    if mask is not None:
        # A real token may score -inf and must still come before padding.
        scores = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~mask, -torch.inf)
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k]


def sorted_prefix(picks: Int[Tensor, "b k"], filled: Bool[Tensor, "b k"] | None) -> Int[Tensor, "b k"]:
    """Picks in ascending order; with `filled`, which marks the first few of each row, only those, and 0 behind them."""
    if filled is None:
        return picks.sort(dim=1).values
    behind = torch.iinfo(picks.dtype).max
    return picks.masked_fill(~filled, behind).sort(dim=1).values.masked_fill(~filled, 0)


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
    # Similarity to the nearest pick; what is picked or padding counts as infinitely near and is never the farthest.
    nearest = torch.zeros_like(merit).fill_(-torch.inf).masked_fill_(closed, torch.inf)
    if farthest_is_fused(similarity):
        from dcp_prune.functional.kernels import farthest_picks

        first = merit.masked_fill(closed, -torch.inf).argmax(dim=1, keepdim=True)
        return farthest_picks(similarity, heavy, nearest, first, k)
    # Everything keeps the shape b 1 n, so that a step is five operators: a GPU waits for each of them to be launched.
    pick = merit.masked_fill(closed, -torch.inf).unsqueeze(1).argmax(dim=2, keepdim=True)
    picks = [pick]
    nearest = nearest.unsqueeze(1)
    for _ in range(k - 1):
        torch.maximum(nearest, similarity.gather(1, pick.expand(b, 1, n)), out=nearest)
        nearest.scatter_(2, pick, torch.inf)
        if heavy is None:
            pick = nearest.argmin(dim=2, keepdim=True)
        else:
            pick = ((1.0 - nearest) * heavy.unsqueeze(1)).argmax(dim=2, keepdim=True)
        picks.append(pick)
    return torch.cat(picks, dim=2).squeeze(1)


@torch.no_grad()
def greedy_determinant(
    diagonal: Float[Tensor, "b n"],
    column: Callable[[Int[Tensor, "b 1"]], Float[Tensor, "b n"]],
    k: int,
    *,
    mask: Bool[Tensor, "b n"] | None = None,
) -> Int[Tensor, "b k"]:
    """Greedy maximisation of log det L_S over subsets S of k tokens (Chen et al., 2018): the MAP rule of a DPP.

    next = argmax_j d_j, where d_j, first L_jj, is what is left of token j after projecting out the picks before it (an
    incremental Cholesky factor). Of the kernel L only the diagonal and k columns are read, so it need not exist.

    Args:
        diagonal: of the positive semidefinite kernel. `b n`.
        column: gives the kernel's column of each row's pick, `b 1` -> `b n`.
        k: tokens to pick.
        mask: False marks padding; every row needs at least k real tokens. `b n`.

    Returns:
        Positions in the order of picking, unique; on ties, and where nothing is left to gain, the earlier token wins.
        `b k`.
    """
    b, n = diagonal.shape
    left = diagonal.clone()
    noise = 1e-6 * diagonal.amax(dim=1, keepdim=True)  # below it, what is left is rounding error
    closed = torch.zeros_like(left) if mask is None else torch.zeros_like(left).masked_fill(~mask, -torch.inf)
    factor = diagonal.new_zeros(b, k, n)
    picks: list[Tensor] = []
    for step in range(k):
        pick = (left.masked_fill(left <= noise, 0.0) + closed).argmax(dim=1, keepdim=True)
        picks.append(pick)
        closed.scatter_(1, pick, -torch.inf)
        rest = left.gather(1, pick)
        row = column(pick)
        if step > 0:
            before = factor[:, :step]
            own = before.gather(2, pick.unsqueeze(1).expand(b, step, 1))  # b step 1
            row = row - torch.bmm(own.mT, before).squeeze(1)
        row = (row * rest.clamp(min=noise).rsqrt()).masked_fill_(rest <= noise, 0.0)
        factor[:, step] = row
        left = left - row.square()
    return torch.cat(picks, dim=1)


def ordered_quota(
    scores: Float[Tensor, "b n"],
    groups: Int[Tensor, "b n"],
    quota: Int[Tensor, "b g"],
    mask: Bool[Tensor, "b n"] | None = None,
) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Ranks tokens inside their groups, best score first, and marks those within their group's quota.

    Args:
        scores: higher is better; on ties the earlier token. `b n`.
        groups: of each token, in 0..g-1. `b n`.
        quota: tokens to keep of each group. `b g`.
        mask: False marks padding, which comes last in its group and is never within the quota. `b n`.

    Returns:
        The place of each token in the list of all tokens, group by group and best first; and whether it is kept.
    """
    b, n = scores.shape
    best_first = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).argsort(
        dim=1, descending=True, stable=True
    )
    order = best_first.gather(1, groups.gather(1, best_first).argsort(dim=1, stable=True))
    place = torch.empty_like(order).scatter(1, order, torch.arange(n, device=order.device).expand(b, n))
    sizes = torch.zeros_like(quota).scatter_add(1, groups, torch.ones_like(groups))
    start = sizes.cumsum(dim=1) - sizes
    kept = place - start.gather(1, groups) < quota.gather(1, groups)
    return place, kept if mask is None else kept & mask


@torch.no_grad()
def suppress(
    scores: Float[Tensor, "b n"], conflicts: Bool[Tensor, "b n n"], mask: Bool[Tensor, "b n"] | None = None
) -> Bool[Tensor, "b n"]:
    """Greedy non-maximum suppression: which tokens survive when, best score first, each survivor removes its conflicts.

    Whether a token survives depends on all better ones, so there are n steps, each on one row of booleans.

    Args:
        scores: the higher survives; on ties the earlier token. `b n`.
        conflicts: symmetric; which tokens exclude each other. `b n n`.
        mask: False marks padding, which neither survives nor removes anything. `b n`.
    """
    b, n = scores.shape
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranked = conflicts.gather(1, order.unsqueeze(2).expand(b, n, n)).gather(2, order.unsqueeze(1).expand(b, n, n))
    allowed = ranked.tril_().logical_not_()  # row i: which better tokens token i tolerates
    allowed.diagonal(dim1=1, dim2=2).fill_(True)
    alive = scores.new_ones(b, n, dtype=torch.bool) if mask is None else mask.gather(1, order)
    columns = allowed.mT.contiguous()  # row i: which later tokens tolerate token i
    for columns_i, alive_i in zip(columns.unbind(1), alive.split(1, dim=1), strict=True):
        alive.logical_and_(columns_i.ge_(alive_i))  # tolerated, or i is not alive
    return torch.empty_like(alive).scatter(1, order, alive)
