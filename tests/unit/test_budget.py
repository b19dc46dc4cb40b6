"""Budgets: exact counts, and one clear sentence for every budget that makes no sense."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_prune import Budget, InvalidInputError


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({}, "neither"),
        ({"num_tokens": 16, "keep_ratio": 0.5}, "both"),
        ({"num_tokens": 0}, "at least 1, got 0"),
        ({"num_tokens": -3}, "at least 1, got -3"),
        ({"num_tokens": 16.0}, "whole number of visual tokens, got 16.0; for a share of the tokens use keep_ratio"),
        ({"num_tokens": 0.5}, "use keep_ratio"),
        ({"num_tokens": True}, "whole number"),
        ({"num_tokens": "16"}, "whole number"),
        ({"keep_ratio": 0.0}, r"in \(0, 1\]"),
        ({"keep_ratio": 1.01}, r"in \(0, 1\]"),
        ({"keep_ratio": -0.1}, r"in \(0, 1\]"),
        ({"keep_ratio": float("nan")}, r"in \(0, 1\]"),
        ({"keep_ratio": "half"}, r"in \(0, 1\]"),
        ({"keep_ratio": True}, r"in \(0, 1\]"),
        ({"num_tokens": 4, "scope": "frame"}, "scope must be one of image, tile, got 'frame'; of a video, image is"),
    ],
)
def test_a_senseless_budget_is_refused_in_one_sentence(given_, says):
    with pytest.raises(InvalidInputError, match=says) as refused:
        Budget(**given_)
    assert "\n" not in str(refused.value)


@given(count=st.integers(1, 5000), tokens=st.integers(1, 5000))
def test_a_count_is_kept_exactly_unless_there_are_fewer(count, tokens):
    assert Budget(num_tokens=count).resolve(tokens) == min(count, tokens)


@given(share=st.floats(0.0, 1.0, exclude_min=True), tokens=st.integers(1, 5000))
def test_a_share_is_rounded_to_the_nearest_count_and_never_to_none(share, tokens):
    kept = Budget(keep_ratio=share).resolve(tokens)
    assert 1 <= kept <= tokens
    assert abs(kept - share * tokens) <= 0.5 or kept == 1


def test_half_a_token_is_rounded_up():
    assert Budget(keep_ratio=0.5).resolve(5) == 3
    assert Budget(keep_ratio=1 / 36).resolve(576) == 16
