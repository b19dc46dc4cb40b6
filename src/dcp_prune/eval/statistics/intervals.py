"""How sure a measured accuracy is: intervals that know that the questions about one image are not independent."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int

CONFIDENCE = 0.95
"""Coverage of every interval in this module."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        mean: the point estimate.
        low, high: bounds of the interval.
        n: observations behind it.
        clusters: images behind it; they, not the observations, are what is independent.
    """

    mean: float
    low: float
    high: float
    n: int
    clusters: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def accuracy(correct: Bool[np.ndarray, " n"], cluster: Int[np.ndarray, " n"]) -> Estimate:
    """Share of right answers with a Wilson interval for clustered answers.

    Questions about one image succeed and fail together, so n answers are worth fewer independent ones. The
    cluster-robust variance of the share gives that effective number, which then enters Wilson's formula; unlike a
    bootstrap this stays honest at 0 % and 100 %, where every resample is equal: there an image counts once.
    Source: Wilson (1927), Korn and Graubard (1998); the combination is ours.

    Args:
        correct: whether each answer was right. `n`.
        cluster: the image each answer is about, any integers. `n`.

    Raises:
        ValueError: no answers, or lengths that differ.
    """
    sums, sizes = cluster_sums(np.asarray(correct, dtype=np.float64), cluster)
    groups, n = len(sums), int(sizes.sum())
    share = float(sums.sum() / n)
    effective = float(groups)
    if 0 < share < 1 and groups > 1:
        variance = groups / (groups - 1) * float(((sums - share * sizes) ** 2).sum()) / n**2
        # Fewer independent answers than images is possible only by chance, and so is more than there are answers.
        effective = float(np.clip(share * (1 - share) / max(variance, 1e-12), 1.0, n))
    z = t_quantile(groups - 1)
    centre = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * (share * (1 - share) / effective + z**2 / (4 * effective**2)) ** 0.5
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), n, groups)


def paired_difference(
    first: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"],
    second: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"],
    cluster: Int[np.ndarray, " n"],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Mean of `first - second` over the same questions, with a bootstrap interval that resamples images.

    Whole images are drawn with replacement, so answers about one image stay together, and both methods always meet the
    same questions. The percentiles are widened for a small number of images (Hesterberg 2015, expanded percentiles).

    Args:
        first, second: scores of two methods on the same questions in the same order. `n`.
        cluster: the image each question is about. `n`.
        resamples: bootstrap draws.
        seed: of the draws; equal inputs give equal intervals.

    Raises:
        ValueError: no questions, lengths that differ, or fewer than one resample.
    """
    if len(first) != len(second):
        raise ValueError(f"pairing needs the same questions twice, got {len(first)} and {len(second)} scores")
    if resamples < 1:
        raise ValueError(f"a bootstrap needs at least one resample, got {resamples}")
    sums, sizes = cluster_sums(np.asarray(first, np.float64) - np.asarray(second, np.float64), cluster)
    groups, n = len(sums), int(sizes.sum())
    mean = float(sums.sum() / n)
    if groups == 1:  # one image says nothing about the next
        return Estimate(mean, -1.0, 1.0, n, groups)
    draws = _resampled_means(sums, sizes, resamples, np.random.default_rng(seed))
    tail = NormalDist().cdf(-((groups / (groups - 1)) ** 0.5) * t_quantile(groups - 1))
    low, high = np.quantile(draws, (tail, 1 - tail))
    return Estimate(mean, float(low), float(high), n, groups)


def cluster_sums(
    values: Float[np.ndarray, " n"], cluster: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " g"], Float[np.ndarray, " g"]]:
    """Sum and number of the values of each image."""
    if len(values) == 0 or len(values) != len(cluster):
        raise ValueError(f"need one image number for each of at least one value, got {len(cluster)} for {len(values)}")
    _, group = np.unique(np.asarray(cluster), return_inverse=True)
    return np.bincount(group, weights=values), np.bincount(group).astype(np.float64)


def _resampled_means(
    sums: Float[np.ndarray, " g"], sizes: Float[np.ndarray, " g"], resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, " r"]:
    groups = len(sums)
    block = max(1, 2_000_000 // groups)  # bounds the memory of one draw to 16 MB
    means = []
    for start in range(0, resamples, block):
        chosen = rng.integers(0, groups, size=(min(block, resamples - start), groups))
        means.append(sums[chosen].sum(axis=1) / sizes[chosen].sum(axis=1))
    return np.concatenate(means)


def t_quantile(freedom: int) -> float:
    """Student's two-sided quantile at `CONFIDENCE` by its expansion in 1/freedom; within 1 % from 3 degrees on."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    v = max(freedom, 1)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )
