"""How well a number tells right answers from wrong ones, with an interval that knows which belong to one image."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Int

from dcp_prune.eval.statistics.bootstrap import Interval
from dcp_prune.eval.statistics.intervals import t_quantile


def area_under_curve(
    values: Float[np.ndarray, "m q"],
    positive: Bool[np.ndarray, "m q"],
    counted: Bool[np.ndarray, "m q"],
    cluster: Int[np.ndarray, "m q"],
) -> Interval:
    """Chance that a positive has a larger value than a negative of the same row, over all such pairs; ties count half.

    With one row this is the usual area under the ROC curve; with several it asks only for the order inside a row.
    The interval knows that what belongs to one cluster is not independent: the pairs' linearisation summed by
    cluster. Source: DeLong et al. (1988), Obuchowski (1997); pooling rows by their pairs is ours.

    Args:
        values: finite wherever counted. `m q`.
        positive: what the value should be large for. `m q`.
        counted: what takes part at all. `m q`.
        cluster: the image each entry is about, from 0. `m q`.

    Returns:
        NaN if there is no pair at all.
    """
    row, at = np.nonzero(counted)
    value = values[row, at].astype(np.float32)
    order = np.lexsort((value, row)) if len(values) > 1 else np.argsort(value)
    row, value = row[order], value[order]
    hit, owner = positive[counted][order], cluster[counted][order]
    hits = np.bincount(row, weights=hit, minlength=len(values))
    misses = np.bincount(row, minlength=len(values)) - hits
    pairs = float(hits @ misses)
    if pairs == 0:
        return Interval(math.nan)

    # Runs of equal values inside a row: how many positives and negatives lie below, equal ones counting half.
    opens = np.flatnonzero(np.r_[True, (value[1:] != value[:-1]) | (row[1:] != row[:-1])])
    sizes = np.diff(np.r_[opens, len(value)])
    run_hits = np.add.reduceat(hit.astype(np.float64), opens)
    run_row = row[opens]

    def below(run: Float[np.ndarray, " runs"], in_row: Float[np.ndarray, " m"]) -> Float[np.ndarray, " n"]:
        rows_before = np.r_[0.0, np.cumsum(in_row)[:-1]]
        return np.repeat(np.cumsum(run) - run / 2 - rows_before[run_row], sizes)

    won = np.where(hit, below(sizes - run_hits, misses), 0.0)
    area = float(won.sum()) / pairs
    influence = np.where(hit, won - area * misses[row], hits[row] - below(run_hits, hits) - area * hits[row])
    sums = np.bincount(owner, weights=influence)
    clusters = len(np.unique(owner))
    if clusters < 2:
        return Interval(area)
    error = (clusters / (clusters - 1) * float((sums**2).sum())) ** 0.5 / pairs
    half = t_quantile(clusters - 1) * error
    return Interval(area, max(0.0, area - half), min(1.0, area + half))
