"""Representatives and the tokens they stand for: greedy centres, clusters, and one member chosen from each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcp_prune.functional.fused import coverage_is_fused
from dcp_prune.functional.similarity import gather_tokens, gram, strips

_KRYLOV_STEPS = 9
_KRYLOV_ERROR = 5e-4
"""About what float32 eigenvectors of 576 tokens are exact to, whichever way they are computed."""


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
def unmet_demand(
    similarity: Float[Tensor, "b n n"],
    picks: Int[Tensor, "b k"],
    *,
    demand: Float[Tensor, "b n"] | None = None,
    mask: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b k"]:
    """The share of the demand that the first pick, the first two picks, ..., and all k picks leave unmet.

    1 - sum_i demand_i cover_i / sum_i demand_i max_j similarity_ij, where cover_i, at least 0, is token i's similarity
    to its closest pick: 1 before any pick, 0 once all tokens are picked; it never rises from one pick to the next.
    (Ours.)

    Args:
        similarity: `b n n`.
        picks: positions among the n tokens, in the order of picking. `b k`.
        demand: as for `facility_location`. `b n`.
        mask: False marks padding, which has no demand and covers nothing. `b n`.
    """
    need = similarity.new_ones(similarity.shape[:2]) if demand is None else demand.to(similarity.dtype)
    best = similarity
    if mask is not None:
        need = need.masked_fill(~mask, 0.0)
        best = best.masked_fill(~mask.unsqueeze(1), 0.0)
    total = (need * best.amax(dim=2).clamp(min=0.0)).sum(dim=1, keepdim=True)
    cover = _columns(similarity, picks).clamp_(min=0.0).cummax(dim=2).values
    met = (need.unsqueeze(1) @ cover).squeeze(1)
    return torch.where(total > 0, 1.0 - met / total, 0.0).clamp(min=0.0)


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
    open_ = affinities[0].new_zeros(b, 1, n)
    if mask is not None:
        open_ = open_.masked_fill(~mask.unsqueeze(1), -torch.inf)
    if len(affinities) == 1 and coverage_is_fused(affinities[0]):
        from dcp_prune.functional.kernels import coverage_picks

        return coverage_picks(affinities[0], needs[0].squeeze(1), merit, open_.squeeze(1), k)
    worth = None if merit is None else merit.unsqueeze(1)
    # What is left to gain, max(0, S - cover), is updated in place: raising the cover by a pick's own column of it
    # gives the next one, so neither cover nor S is needed again.
    lefts = [affinity.clamp(min=0.0) for affinity in affinities]
    picks: list[Tensor] = []
    for step in range(k):
        if step > 0:
            for left in lefts:
                columns = left.gather(2, picks[-1].expand(b, left.shape[1], 1))
                rows = strips(left)
                for strip, column in zip(rows, columns.split(rows[0].shape[1], dim=1), strict=True):
                    strip.sub_(column).clamp_(min=0.0)
        # `bmm` and the shape b 1 n spare a GPU the launches, and a CPU the calls, of what only changes shapes.
        if worth is None and len(lefts) == 1:
            gain = torch.baddbmm(open_, needs[0], lefts[0])
        else:
            gains = [torch.bmm(need, left) for need, left in zip(needs, lefts, strict=True)]
            gain = sum(gains[1:], start=gains[0])
            gain = open_ + (gain if worth is None else gain * worth)
        pick = gain.argmax(dim=2, keepdim=True)
        picks.append(pick)
        open_.scatter_(2, pick, -torch.inf)
    return torch.cat(picks, dim=2).squeeze(1)


@dataclass(frozen=True, eq=False)
class Blend:
    """The similarity scale * S + V V^T. It is never built, since only its columns and products are needed.

    Attributes:
        similarity: S. `b n n`.
        scale: `b 1 1`.
        vectors: V. `b n t`.
    """

    similarity: Float[Tensor, "b n n"]
    scale: Float[Tensor, "b 1 1"]
    vectors: Float[Tensor, "b n t"]

    @property
    def dtype(self) -> torch.dtype:
        return self.similarity.dtype

    def columns(self, picks: Int[Tensor, "b k"]) -> Float[Tensor, "b n k"]:
        """Similarity of every token to the tokens at these positions."""
        return self.scale * _columns(self.similarity, picks) + self.vectors @ gather_tokens(self.vectors, picks).mT

    def __matmul__(self, other: Float[Tensor, "b n k"]) -> Float[Tensor, "b n k"]:
        return self.scale * (self.similarity @ other) + self.vectors @ (self.vectors.mT @ other)


def _columns(similarity: Float[Tensor, "b n n"] | Blend, picks: Int[Tensor, "b k"]) -> Float[Tensor, "b n k"]:
    if isinstance(similarity, Blend):
        return similarity.columns(picks)
    return similarity.gather(2, picks.unsqueeze(1).expand(*similarity.shape[:2], -1))


@torch.no_grad()
def assign(
    similarity: Float[Tensor, "b n n"] | Blend,
    centres: Int[Tensor, "b k"],
    mask: Bool[Tensor, "b n"] | None = None,
    centre_mask: Bool[Tensor, "b k"] | None = None,
) -> Int[Tensor, "b n"]:
    """The slot in 0..k-1 of each token's most similar centre; centres belong to themselves, padding to -1. `b n`.

    Args:
        similarity: `b n n`.
        centres: positions among the n tokens. `b k`.
        mask: False marks padding among the tokens. `b n`.
        centre_mask: False marks slots without a centre, which nothing joins. `b k`.
    """
    b, k = centres.shape
    to_centres = _columns(similarity, centres)
    n = to_centres.shape[1]
    own = centres
    if centre_mask is not None:
        to_centres = to_centres.masked_fill_(~centre_mask.unsqueeze(1), -torch.inf)
        own = centres.masked_fill(~centre_mask, n)  # the column behind the last
    slots = torch.arange(k, device=centres.device).expand(b, k)
    closest = to_centres.new_zeros(b, n + 1, dtype=torch.long)
    closest[:, :n] = to_centres.argmax(dim=2)
    # Of two identical centres neither may lose itself to the other.
    closest = closest.scatter_(1, own, slots)[:, :n]
    return closest if mask is None else closest.masked_fill(~mask, -1)


@torch.no_grad()
def reselect(
    similarity: Float[Tensor, "b n n"] | Blend,
    clusters: Int[Tensor, "b n"],
    k: int,
    *,
    bonus: Float[Tensor, "b n"] | None = None,
) -> Int[Tensor, "b k"]:
    """The member of each cluster with the largest mean similarity to its cluster, plus its bonus.

    Args:
        similarity: `b n n`.
        clusters: each token's cluster in 0..k-1, -1 for none. `b n`.
        k: number of clusters.
        bonus: added to a member's mean similarity, for example its relevance. `b n`.

    Returns:
        One position per cluster, in the order of the clusters; 0 for an empty one. `b k`.
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
    and the loadings are the top right singular vectors of the v x n matrix, strongest first: exact to the features'
    dtype, from the eigenvectors of the smaller of the two Gram matrices.

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
    variances, axes = _leading_axes(gram(centred if n <= v else centred.mT), groups)
    loadings = axes
    if n > v:
        scale = variances.clamp(min=torch.finfo(features.dtype).tiny).rsqrt()
        loadings = centred @ axes * scale.unsqueeze(1)
    return loadings.abs().argmax(dim=2)


def _leading_axes(matrix: Float[Tensor, "b n n"], count: int) -> tuple[Float[Tensor, "b g"], Float[Tensor, "b n g"]]:
    """The largest eigenvalues of positive semidefinite matrices, largest first, and their eigenvectors."""
    if (
        matrix.device.type == "cpu"
        and matrix.dtype == torch.float32
        and _KRYLOV_STEPS * (count + 4) <= matrix.shape[1] / 2
    ):
        values, axes, error = _krylov_axes(matrix, count)
        if error < _KRYLOV_ERROR:  # on a CPU nobody waits for this number
            return values, axes
    values, axes = torch.linalg.eigh(matrix)  # ascending
    return values[:, -count:].flip(1), axes[:, :, -count:].flip(2)


def _krylov_axes(
    matrix: Float[Tensor, "b n n"], count: int
) -> tuple[Float[Tensor, "b g"], Float[Tensor, "b n g"], Float[Tensor, ""]]:
    """As `_leading_axes`, by block Lanczos steps from a fixed start: a small part of the work of all eigenvectors.

    Also gives the largest error that any of them may have: its residual over its distance to the next eigenvalue.
    """
    b, n, _ = matrix.shape
    width = count + 4
    block = torch.randn(n, width, generator=torch.Generator().manual_seed(0)).expand(b, n, width)
    basis, images = matrix.new_empty(2, b, n, width * _KRYLOV_STEPS)
    for step in range(_KRYLOV_STEPS):
        here = slice(step * width, (step + 1) * width)
        known = basis[:, :, : here.start]
        for _ in range(2):  # where little is left after the first time, that is rounding error
            block = torch.linalg.qr(block - known @ (known.mT @ block)).Q
        basis[:, :, here] = block
        block = (block.mT @ matrix).mT  # it is symmetric, and this way round several times as fast on a CPU
        images[:, :, here] = block
    small = basis.mT @ images
    values, turn = torch.linalg.eigh((small + small.mT) / 2.0)
    values, turn = values.flip(1), turn.flip(2)[:, :, :count]
    axes = basis @ turn
    residual = torch.linalg.vector_norm(images @ turn - axes * values[:, None, :count], dim=1)
    gap = (values[:, :count] - values[:, 1 : count + 1]).clamp(min=torch.finfo(values.dtype).tiny)
    return values[:, :count], axes, (residual / gap).amax()
