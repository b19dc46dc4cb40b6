"""What a share of equal answers surely is at least, and how many images it takes to show that."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Int

from dcp_prune.eval.statistics.intervals import CONFIDENCE, cluster_sums


def share_lower_bound(
    holds: Bool[np.ndarray, " n"],
    cluster: Int[np.ndarray, " n"],
    *,
    confidence: float = CONFIDENCE,
    copies: float = 1.0,
    draws: int = 200_000,
) -> float:
    """One-sided lower bound of a share, whatever ties the answers about one image together.

    The images are weighted by random shares (flat Dirichlet) with one more image, as large as the largest, on which
    nothing holds; the bound is the quantile at 1 - `confidence` of the weighted share. With one answer an image, or
    images on which all or nothing holds, this is the bound of Clopper and Pearson, then computed without draws. It
    needs no estimate of a variance, so it stays honest at 100 %: there g images give (1 - confidence)^(1/g), however
    many questions each has. Source: Clopper and Pearson (1934); Gaffke (2005) and Learned-Miller and Thomas
    (arXiv 1905.06208) for means of bounded variables, whose coverage is conjectured and held in all their and our
    simulations; unequal images are ours.

    Args:
        holds: what was observed of each answer. `n`.
        cluster: the image each answer is about, any integers. `n`.
        confidence: of the bound, in (0, 1).
        copies: pretend that so many times as many images had come out in the same proportions.
        draws: of the random weights; seeded, so equal inputs give equal bounds.

    Raises:
        ValueError: no answers, or lengths that differ.
    """
    sums, sizes = cluster_sums(np.asarray(holds, dtype=np.float64), cluster)
    alpha, largest = 1 - confidence, sizes.max()
    if not sums.any():
        return 0.0
    if bool(((sums == 0) | (sums == sizes)).all()) and sizes.min() == largest and copies == 1:
        return _clopper_pearson(int((sums > 0).sum()), len(sums), alpha)
    # Images alike share one weight: the sum of their exponentials is a gamma variable.
    kinds, counts = np.unique(np.stack((sums, sizes), axis=1), axis=0, return_counts=True)
    rng = np.random.default_rng(0)
    hit, total = np.zeros(draws), largest * rng.standard_gamma(1.0, draws)
    for (held, size), count in zip(kinds, counts, strict=True):
        weight = rng.standard_gamma(count * copies, draws)
        hit += held * weight
        total += size * weight
    return float(np.quantile(hit / total, alpha))


def images_needed(
    holds: Bool[np.ndarray, " n"],
    cluster: Int[np.ndarray, " n"],
    share: float,
    *,
    confidence: float = CONFIDENCE,
    most: float = 1e6,
) -> int | None:
    """About how many images, if further ones came out in these proportions, bring `share_lower_bound` up to `share`.

    None if not even `most` images would: the observed share is not above `share`, or too close to it.
    """
    groups = len(np.unique(np.asarray(cluster)))

    def enough(copies: float) -> bool:
        bound = share_lower_bound(holds, cluster, confidence=confidence, copies=copies, draws=20_000)
        return bound >= share

    low, high = 1.0, most / groups
    if float(np.mean(holds)) <= share or not enough(high):
        return None
    if enough(low):
        return groups
    while high * groups - low * groups > max(1.0, 0.005 * low * groups):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return math.ceil(high * groups)


def fewest_images(share: float, *, confidence: float = CONFIDENCE) -> int:
    """Images without which no result, not even 100 %, bounds a share from below by `share`."""
    return max(1, math.ceil(math.log(1 - confidence) / math.log(share) - 1e-9)) if share > 0 else 1


def _clopper_pearson(hits: int, n: int, alpha: float) -> float:
    """The probability at which `hits` or more of n have the chance alpha; by bisection, exact to 1e-12."""
    if hits == n:
        return alpha ** (1 / n)
    above = np.arange(hits, n + 1)
    ways = math.lgamma(n + 1) - np.array([math.lgamma(x + 1) + math.lgamma(n - x + 1) for x in above.tolist()])
    low, high = 0.0, hits / n
    while high - low > 1e-12:
        middle = (low + high) / 2
        tail = float(np.exp(ways + above * math.log(middle) + (n - above) * math.log1p(-middle)).sum())
        low, high = (middle, high) if tail < alpha else (low, middle)
    return low
