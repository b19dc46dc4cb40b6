"""Representatives and the tokens they stand for: greedy centres, clusters, and a new member chosen from each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@torch.no_grad()
def facility_location(
    similarity: Float[Tensor, "b n n"],
    k: int,
    *,
    demand: Float[Tensor, "b n"] | None = None,
    merit: Float[Tensor, "b n"] | None = None,
    mask: Bool[Tensor, "b n"] | None = None,
) -> Int[Tensor, "b k"]:
    """Greedy facility location: each pick adds the most weighted coverage to what the picks before it cover.

    next = argmax_j merit_j * sum_i demand_i * max(0, similarity_ij - cover_i), where cover_i, first 0, is token i's
    similarity to its closest pick. With demand alone this is greedy representative initialisation; with merit alone
    it is the rule "saliency times marginal coverage" (SCOPE).

    Args:
        similarity: `b n n`.
        k: tokens to pick.
        demand: how much it matters that a token is covered, non-negative. `b n`.
        merit: how much a token is worth as a pick, non-negative. `b n`.
        mask: False marks padding, which is neither picked nor covered; every row needs at least k real tokens. `b n`.

    Returns:
        Positions in the order of picking, unique; on ties the earlier token wins. `b k`.
    """
    need = similarity.new_ones(similarity.shape[:2]) if demand is None else demand
    if mask is not None:
        need = need.masked_fill(~mask, 0.0)
    return max_coverage([similarity], [need], k, merit=merit, mask=mask)


@torch.no_grad()
def max_coverage(
    affinities: Sequence[Float[Tensor, "b r n"]],
    demands: Sequence[Float[Tensor, "b r"]],
    k: int,
    *,
    merit: Float[Tensor, "b n"] | None = None,
    mask: Bool[Tensor, "b n"] | None = None,
) -> Int[Tensor, "b k"]:
    """Greedy coverage of several sets of points at once by k of n tokens; `facility_location` is the case of one set.

    next = argmax_j merit_j * sum over sets, sum_i demand_i * max(0, affinity_ij - cover_i).

    Args:
        affinities: for each set, how well each token covers each of its r points. `b r n`.
        demands: for each set, how much it matters that a point is covered; 0 for padding. `b r`.
        k: tokens to pick.
        merit: how much a token is worth as a pick, non-negative. `b n`.
        mask: False marks padding, which is not picked; every row needs at least k real tokens. `b n`.

    Returns:
        Positions in the order of picking, unique; on ties the earlier token wins. `b k`.
    """
    b, _, n = affinities[0].shape
    needs = [demand.to(affinities[0].dtype).unsqueeze(1) for demand in demands]
    open_ = affinities[0].new_zeros(b, n)
    if mask is not None:
        open_ = open_.masked_fill(~mask, -torch.inf)
    # What is left to gain, max(0, S - cover), is updated in place: raising the cover by a pick's own column of it
    # gives the next one, so neither cover nor S is needed again.
    lefts = [affinity.clamp(min=0.0) for affinity in affinities]
    picks: list[Tensor] = []
    for _ in range(k):
        gains = [(need @ left).squeeze(1) for need, left in zip(needs, lefts, strict=True)]
        gain = sum(gains[1:], start=gains[0])
        gain = gain if merit is None else gain * merit
        pick = (gain + open_).argmax(dim=1, keepdim=True)
        picks.append(pick)
        open_ = open_.scatter(1, pick, -torch.inf)
        for left in lefts:
            left.sub_(left.gather(2, pick.unsqueeze(1).expand(b, left.shape[1], 1))).clamp_(min=0.0)
    return torch.cat(picks, dim=1)


@torch.no_grad()
def assign(
    similarity: Float[Tensor, "b n n"], centres: Int[Tensor, "b k"], mask: Bool[Tensor, "b n"] | None = None
) -> Int[Tensor, "b n"]:
    """The slot in 0..k-1 of each token's most similar centre; centres belong to themselves, padding to -1. `b n`."""
    b, k = centres.shape
    n = similarity.shape[1]
    closest = similarity.gather(2, centres.unsqueeze(1).expand(b, n, k)).argmax(dim=2)
    slots = torch.arange(k, device=centres.device).expand(b, k)
    closest = closest.scatter(1, centres, slots)  # of two identical centres neither may lose itself to the other
    return closest if mask is None else closest.masked_fill(~mask, -1)


@torch.no_grad()
def reselect(
    similarity: Float[Tensor, "b n n"],
    clusters: Int[Tensor, "b n"],
    k: int,
    *,
    bonus: Float[Tensor, "b n"] | None = None,
) -> Int[Tensor, "b k"]:
    """The member of each cluster with the largest mean similarity to its cluster, plus its bonus.

    Args:
        similarity: `b n n`.
        clusters: each token's cluster in 0..k-1, -1 for none; no cluster is empty. `b n`.
        k: number of clusters.
        bonus: added to a member's mean similarity, for example its relevance. `b n`.

    Returns:
        One position per cluster, in the order of the clusters. `b k`.
    """
    slots = torch.arange(k, device=clusters.device)
    member = clusters.unsqueeze(-1) == slots  # b n k
    share = member.to(similarity.dtype)
    total = similarity @ share
    mean = total / share.sum(dim=1, keepdim=True)
    score = mean if bonus is None else mean + bonus.unsqueeze(-1)
    return score.masked_fill(~member, -torch.inf).argmax(dim=1)


@torch.no_grad()
def principal_groups(
    features: Float[Tensor, "b n v"], groups: int, mask: Bool[Tensor, "b n"] | None = None
) -> Int[Tensor, "b n"]:
    """For each token the principal component, of the first few, in which its loading is largest by absolute value.

    Components are those of tokens as variables and channels as observations: each token is centred over its channels,
    and the loadings are the top right singular vectors of the v x n matrix, strongest first. Exact, in the features'
    dtype, by the eigenvectors of the smaller of the two Gram matrices.

    Args:
        features: in float32 or float64. `b n v`.
        groups: components to consider, at most min(n, v).
        mask: False marks padding, which gets an arbitrary group and influences none. `b n`.

    Returns:
        Groups in 0..groups-1. `b n`.
    """
    n, v = features.shape[1:]
    centred = features - features.mean(dim=2, keepdim=True)
    if mask is not None:
        centred = centred.masked_fill(~mask.unsqueeze(-1), 0.0)
    gram = centred @ centred.mT if n <= v else centred.mT @ centred
    variances, axes = torch.linalg.eigh(gram)  # ascending
    loadings = axes[:, :, -groups:].flip(2)
    if n > v:
        scale = variances[:, -groups:].flip(1).clamp(min=torch.finfo(features.dtype).tiny).rsqrt()
        loadings = centred @ loadings * scale.unsqueeze(1)
    return loadings.abs().argmax(dim=2)
