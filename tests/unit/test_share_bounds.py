"""One-sided bounds of a share, for answers that belong together by image."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import beta

from dcp_prune.eval.statistics.bounds import fewest_images, images_needed, share_lower_bound


@pytest.mark.parametrize(("hits", "n"), [(1, 3), (3, 3), (50, 60), (99, 100), (980, 1000)])
def test_one_answer_an_image_gives_the_bound_of_clopper_and_pearson(hits: int, n: int) -> None:
    bound = share_lower_bound(np.arange(n) < hits, np.arange(n))
    assert bound == pytest.approx(beta.ppf(0.05, hits, n - hits + 1), abs=1e-9)


def test_images_on_which_all_or_nothing_holds_count_once() -> None:
    holds = np.repeat(np.arange(40) < 38, 14)
    assert share_lower_bound(holds, np.repeat(np.arange(40), 14)) == pytest.approx(beta.ppf(0.05, 38, 3), abs=1e-9)


def test_the_drawn_bound_agrees_with_the_exact_one() -> None:
    holds, images = np.arange(200) < 190, np.arange(200)
    drawn = share_lower_bound(holds, images, copies=1 + 1e-9)
    assert drawn == pytest.approx(share_lower_bound(holds, images), abs=5e-4)


def test_one_more_answer_that_holds_never_lowers_the_bound() -> None:
    images = np.arange(70) // 14
    bounds = [share_lower_bound(np.arange(70) < hits, images) for hits in range(50, 71)]
    assert all(later >= earlier - 1e-3 for earlier, later in pairwise(bounds))
    assert bounds[-1] == pytest.approx(0.05 ** (1 / 5))


def test_an_image_with_many_questions_does_not_count_as_many_images() -> None:
    images = np.array([0] * 50 + [1, 2, 3])
    assert share_lower_bound(np.ones(53, dtype=bool), images) <= 0.05 ** (1 / 4) + 1e-3


def test_nothing_that_holds_bounds_nothing() -> None:
    assert share_lower_bound(np.zeros(5, dtype=bool), np.arange(5)) == 0.0


@pytest.mark.parametrize(("a", "b", "images", "questions"), [(9, 0.5, 10, 6), (50, 1, 40, 10), (0.1, 0.005, 60, 14)])
def test_the_bound_exceeds_the_truth_no_more_often_than_promised(
    a: float, b: float, images: int, questions: int
) -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        holds = (rng.random((images, questions)) < rng.beta(a, b, images)[:, None]).ravel()
        wrong += share_lower_bound(holds, np.repeat(np.arange(images), questions), draws=4000) > a / (a + b)
    assert wrong / 300 <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_as_many_images_as_are_said_to_be_needed_are_enough() -> None:
    holds, images = np.arange(100) < 97, np.arange(100)
    needed = images_needed(holds, images, 0.95)
    assert needed is not None
    assert beta.ppf(0.05, round(0.97 * needed * 1.05), round(needed * 1.05 * 0.03) + 1) >= 0.949
    assert beta.ppf(0.05, round(0.97 * needed * 0.8), round(needed * 0.8 * 0.03) + 1) < 0.95


def test_no_number_of_images_shows_what_was_not_observed() -> None:
    assert images_needed(np.arange(100) < 95, np.arange(100), 0.95) is None
    assert images_needed(np.arange(100) < 80, np.arange(100), 0.95) is None


@pytest.mark.parametrize(("share", "images"), [(0.95, 59), (0.9, 29), (0.5, 5)])
def test_complete_agreement_shows_the_share_from_the_fewest_images_on(share: float, images: int) -> None:
    assert fewest_images(share) == images
    for count, enough in ((images, True), (images - 1, False)):
        assert (share_lower_bound(np.ones(count, dtype=bool), np.arange(count)) >= share) == enough
