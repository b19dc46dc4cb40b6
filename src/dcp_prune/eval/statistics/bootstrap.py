"""Bootstrap over images for many methods at once: every statistic of a report is computed on the very same draws.

A question is never drawn by itself: whole images are, with all their questions, for all methods together. The first
"draw" is the observed sample, so a statistic is written once and gives its value and its spread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt

from dcp_prune.eval.statistics.intervals import t_quantile

RESAMPLES = 2_000

Verdict = Literal["ahead", "tie", "behind", "unknown"]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; the bounds are NaN where one image, or no draw, says nothing about them."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def verdict(self, threshold: float = 0.0) -> Verdict:
        """On which side of the threshold the whole interval lies; `tie` if it reaches both sides."""
        if math.isnan(self.low) or math.isnan(self.high):
            return "unknown"
        return "ahead" if self.low > threshold else "behind" if self.high < threshold else "tie"

    def scaled(self, factor: float) -> Interval:
        """The same in another unit; the factor is positive."""
        return Interval(factor * self.value, factor * self.low, factor * self.high)


@dataclass(frozen=True, eq=False)
class Resampling:
    """How often each image occurs in each draw.

    Attributes:
        counts: draws in rows, images in columns; the first row, all ones, is the observed sample. `r g`.
    """

    counts: UInt[np.ndarray, "r g"]

    @classmethod
    def of(cls, images: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Resampling:
        """Draws `images` images with replacement, `resamples` times; equal arguments give equal draws.

        Raises:
            ValueError: no image, or no resample.
        """
        if images < 1 or resamples < 1:
            raise ValueError(f"a bootstrap needs an image and a resample, got {images} and {resamples}")
        drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
        return cls(np.concatenate((np.ones((1, images)), drawn)).astype(np.uint16))

    def totals(self, values: Float[np.ndarray, "g *shape"]) -> Float[np.ndarray, "r *shape"]:
        """Sum over the images of each draw. Whole numbers stay exact, so a count is the same on every machine."""
        flat = values.reshape(len(values), -1).astype(np.float64)
        out = np.empty((len(self.counts), flat.shape[1]))
        block = max(1, 2_000_000 // self.counts.shape[1])  # bounds the copy in float64 to 16 MB
        for start in range(0, len(out), block):
            np.matmul(self.counts[start : start + block].astype(np.float64), flat, out=out[start : start + block])
        return out.reshape(len(out), *values.shape[1:])

    def intervals(self, statistic: Float[np.ndarray, "r *shape"]) -> Float[np.ndarray, "3 *shape"]:
        """Value, lower and upper bound of each statistic, from its value in each draw.

        Percentiles, widened for a small number of images (Hesterberg 2015, expanded percentiles). Draws in which the
        statistic is undefined (NaN) are left out. With a single image the bounds are NaN.
        """
        images, shape = self.counts.shape[1], statistic.shape[1:]
        draws = statistic.reshape(len(statistic), -1)
        bounds = np.full((2, draws.shape[1]), np.nan)
        if images > 1:
            tail = NormalDist().cdf(-((images / (images - 1)) ** 0.5) * t_quantile(images - 1))
            undefined = np.isnan(draws[1:])
            whole, some = ~undefined.any(axis=0), ~undefined.all(axis=0)
            bounds[:, whole] = np.quantile(draws[1:, whole], (tail, 1 - tail), axis=0)
            for place in np.flatnonzero(some & ~whole):
                bounds[:, place] = np.quantile(draws[1:, place][~undefined[:, place]], (tail, 1 - tail))
        return np.concatenate((draws[:1], bounds)).reshape(3, *shape)

    def interval(self, statistic: Float[np.ndarray, " r"]) -> Interval:
        """The same for one statistic."""
        return Interval(*(float(part) for part in self.intervals(statistic)))
