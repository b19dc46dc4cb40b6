"""Bootstrap over images, and the area under the curve with its interval."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dcp_prune.eval.statistics.bootstrap import Interval, Resampling
from dcp_prune.eval.statistics.intervals import paired_difference
from dcp_prune.eval.statistics.ranking import area_under_curve


def test_the_first_draw_is_the_sample_and_every_draw_has_as_many_images():
    resampling = Resampling.of(30, resamples=50)
    assert (resampling.counts[0] == 1).all()
    assert (resampling.counts.sum(axis=1) == 30).all()
    assert len(resampling.counts) == 51


def test_totals_of_counts_are_exact_whole_numbers():
    resampling = Resampling.of(300, resamples=400)
    values = np.random.default_rng(0).integers(0, 15, size=(300, 4, 3))
    expected = np.einsum("rg,gmt->rmt", resampling.counts.astype(int), values)
    assert (resampling.totals(values.astype(float)) == expected).all()


def test_intervals_agree_with_the_paired_bootstrap_of_two_methods():
    rng = np.random.default_rng(1)
    image = np.repeat(np.arange(60), 10)
    first, second = rng.random(600) < 0.8, rng.random(600) < 0.7
    reference = paired_difference(first, second, image)
    resampling = Resampling.of(60, resamples=10_000)
    sums = np.bincount(image, weights=first.astype(float) - second)
    found = resampling.interval(resampling.totals(sums) / 600)
    assert found.value == pytest.approx(reference.mean)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.004)


def test_a_mean_is_covered_as_often_as_promised():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = rng.exponential(size=25)
        resampling = Resampling.of(25, resamples=500, seed=trial)
        found = resampling.interval(resampling.totals(values) / 25)
        covered += found.low <= 1.0 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_one_image_and_undefined_draws_give_no_bounds_instead_of_wrong_ones():
    alone = Resampling.of(1, resamples=100)
    assert math.isnan(alone.interval(alone.totals(np.ones(1))).low)
    resampling = Resampling.of(5, resamples=100)
    statistic = np.full((101, 2), np.nan)
    statistic[:, 0] = np.where(np.arange(101) % 2, np.nan, 3.0)
    value, low, high = resampling.intervals(statistic)
    assert (value[0], low[0], high[0]) == (3.0, 3.0, 3.0)
    assert np.isnan([value[1], low[1], high[1]]).all()


def test_no_image_and_no_resample_are_refused():
    with pytest.raises(ValueError, match="needs an image"):
        Resampling.of(0)
    with pytest.raises(ValueError, match="a resample"):
        Resampling.of(3, resamples=0)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((1, 0.1, 2), "ahead"), ((1, 0, 2), "tie"), ((-1, -2, -0.1), "behind"), ((1, math.nan, math.nan), "unknown")],
)
def test_a_verdict_follows_from_the_interval_alone(interval, verdict):
    assert Interval(*interval).verdict() == verdict


def _pairs(values: np.ndarray, positive: np.ndarray) -> tuple[float, int]:
    higher = values[positive][:, None] - values[~positive][None, :]
    return float((higher > 0).sum() + (higher == 0).sum() / 2), higher.size


def test_the_area_counts_pairs_of_a_row_and_half_of_the_ties():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, size=(4, 50)).astype(float)
    positive = rng.random((4, 50)) < 0.3
    cluster = np.broadcast_to(np.arange(50) // 5, (4, 50))
    everything = np.ones((4, 50), dtype=bool)
    won = [_pairs(value, hit) for value, hit in zip(values, positive, strict=True)]
    expected = sum(wins for wins, _ in won) / sum(pairs for _, pairs in won)
    found = area_under_curve(values, positive, everything, cluster)
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high
    counted = rng.random((4, 50)) < 0.7
    won = [_pairs(value[c], hit[c]) for value, hit, c in zip(values, positive, counted, strict=True)]
    expected = sum(wins for wins, _ in won) / sum(pairs for _, pairs in won)
    assert area_under_curve(values, positive, counted, cluster).value == pytest.approx(expected)


def test_the_area_of_blind_values_covers_one_half_as_often_as_promised_though_answers_of_an_image_agree():
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(40), 10)[None]
    everything = np.ones((1, 400), dtype=bool)
    covered = blind = 0
    for _ in range(200):
        values = (rng.normal(size=(40, 1)) + 0.3 * rng.normal(size=(40, 10))).reshape(1, -1)
        positive = (rng.random((40, 1)) + 0.3 * rng.random((40, 10)) < 0.5).reshape(1, -1)
        found = area_under_curve(values, positive, everything, cluster)
        covered += found.low <= 0.5 <= found.high
        alone = area_under_curve(values, positive, everything, np.arange(400)[None])
        blind += alone.low <= 0.5 <= alone.high
    assert 0.90 <= covered / 200 <= 0.99
    assert blind / 200 < 0.8  # proves that the clusters matter


def test_without_a_pair_there_is_no_area():
    nothing = area_under_curve(np.ones((1, 3)), np.zeros((1, 3), bool), np.ones((1, 3), bool), np.zeros((1, 3), int))
    assert math.isnan(nothing.value)
