"""Intervals: known cases, and the coverage they promise on simulated images."""

from __future__ import annotations

import numpy as np
import pytest

from dcp_prune.eval.statistics.intervals import accuracy, paired_difference, t_quantile


def _simulated(rng: np.random.Generator, images: int, questions: int, share: float, spread: float) -> np.ndarray:
    """Answers whose success rate differs from image to image, so that they are correlated inside an image."""
    rate = np.clip(share + spread * rng.standard_normal((images, 1)), 0, 1)
    return rng.random((images, questions)) < rate


def test_independent_answers_get_the_textbook_wilson_interval() -> None:
    correct = np.arange(1000) < 800
    estimate = accuracy(correct, np.arange(1000))
    assert estimate.mean == 0.8
    assert (estimate.low, estimate.high) == pytest.approx((0.7740, 0.8236), abs=2e-3)
    assert (estimate.n, estimate.clusters) == (1000, 1000)


def test_copies_of_an_answer_do_not_narrow_the_interval() -> None:
    once = np.random.default_rng(1).random(60) < 0.7
    single = accuracy(once, np.arange(60))
    copied = accuracy(np.repeat(once, 14), np.repeat(np.arange(60), 14))
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high), abs=2e-3)


def test_a_perfect_score_is_not_a_certain_one() -> None:
    estimate = accuracy(np.ones(100, dtype=bool), np.arange(100) // 2)
    assert estimate.mean == estimate.high == 1.0
    assert 0.90 < estimate.low < 0.95


@pytest.mark.parametrize(("share", "spread"), [(0.9, 0.1), (0.6, 0.2)])
def test_accuracy_intervals_cover_the_truth_as_often_as_they_promise(share: float, spread: float) -> None:
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(40), 14)
    truth = float(_simulated(rng, 200_000, 1, share, spread).mean())
    covered = clustered_blind = 0
    for _ in range(400):
        answers = _simulated(rng, 40, 14, share, spread).ravel()
        estimate = accuracy(answers, image)
        blind = accuracy(answers, np.arange(len(answers)))
        covered += estimate.low <= truth <= estimate.high
        clustered_blind += blind.low <= truth <= blind.high
    assert 0.92 <= covered / 400 <= 0.98
    assert clustered_blind / 400 < 0.92  # proves that the simulation is clustered enough to tell


def test_paired_intervals_cover_the_true_difference_as_often_as_they_promise() -> None:
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(30), 14)
    covered = 0
    for _ in range(300):
        rate = np.clip(0.7 + 0.2 * rng.standard_normal((30, 1)), 0.2, 0.9)
        luck = rng.random((30, 14))
        gap = np.where(rng.random((30, 1)) < 0.5, 0.1, 0.0)  # true mean difference .05
        estimate = paired_difference((luck < rate + gap).ravel(), (luck < rate).ravel(), image, resamples=1000)
        covered += estimate.low <= 0.05 <= estimate.high
    assert 0.92 <= covered / 300 <= 0.985


def test_pairing_makes_a_small_difference_visible() -> None:
    rng = np.random.default_rng(2)
    image = np.repeat(np.arange(100), 10)
    second = _simulated(rng, 100, 10, 0.6, 0.2).ravel()
    first = second | (rng.random(1000) < 0.05)
    assert paired_difference(first, second, image).excludes_zero
    alone = accuracy(first, image), accuracy(second, image)
    assert alone[0].low < alone[1].high  # the two intervals by themselves overlap


def test_a_method_against_itself_differs_by_exactly_nothing() -> None:
    answers = np.random.default_rng(0).random(50) < 0.5
    estimate = paired_difference(answers, answers, np.arange(50))
    assert (estimate.mean, estimate.low, estimate.high) == (0.0, 0.0, 0.0)
    assert not estimate.excludes_zero


def test_the_same_answers_give_the_same_interval_and_swapping_mirrors_the_mean() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.random(200) < 0.8, rng.random(200) < 0.6
    image = np.arange(200) // 4
    assert paired_difference(first, second, image) == paired_difference(first, second, image)
    assert paired_difference(second, first, image).mean == -paired_difference(first, second, image).mean


def test_one_image_says_nothing_about_the_next() -> None:
    first, second = np.ones(14, dtype=bool), np.zeros(14, dtype=bool)
    estimate = paired_difference(first, second, np.zeros(14, dtype=int))
    assert estimate.mean == 1.0
    assert not estimate.excludes_zero
    assert accuracy(first, np.zeros(14, dtype=int)).low < 0.2


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        accuracy(np.zeros(0, dtype=bool), np.zeros(0, dtype=int))
    with pytest.raises(ValueError, match="same questions"):
        paired_difference(np.ones(3), np.ones(4), np.arange(3))
    with pytest.raises(ValueError, match="one resample"):
        paired_difference(np.ones(3), np.ones(3), np.arange(3), resamples=0)


@pytest.mark.parametrize(("freedom", "quantile"), [(3, 3.1824), (10, 2.2281), (30, 2.0423), (1000, 1.9623)])
def test_the_t_quantile_matches_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, rel=0.01)
