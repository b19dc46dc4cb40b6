"""Choosing tokens: exact counts, stable ties, no padding, and the optimum where it can be enumerated."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_prune.functional.selection import farthest_point, masked_topk
from dcp_prune.functional.similarity import cosine_similarity

quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@quick
@given(seed=seeds, b=st.integers(1, 3), n=st.integers(1, 20), data=st.data())
def test_topk_keeps_the_best_real_tokens_in_raster_order(seed, b, n, data):
    k = data.draw(st.integers(1, n))
    scores = torch.randint(0, 5, (b, n), generator=generator(seed)).float()  # few values, so many ties
    mask = torch.rand(b, n, generator=generator(seed + 1)) > 0.3
    mask[:, :k] |= mask.sum(dim=1, keepdim=True) < k
    picked = masked_topk(scores, mask, k)
    for row in range(b):
        real = [i for i in range(n) if mask[row, i]]
        best = sorted(real, key=lambda i: (-float(scores[row, i]), i))[:k]
        assert picked[row].tolist() == sorted(best)


def test_topk_prefers_the_worst_real_token_to_padding():
    scores = torch.tensor([[9.0, -torch.inf, 9.0, -torch.inf]])
    mask = torch.tensor([[False, True, False, True]])
    assert masked_topk(scores, mask, 2).tolist() == [[1, 3]]


def test_topk_without_a_mask_takes_all_tokens_for_real():
    assert masked_topk(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), None, 2).tolist() == [[1, 2]]


@quick
@given(seed=seeds, n=st.integers(2, 25), data=st.data())
def test_each_farthest_point_is_the_farthest_from_those_before_it(seed, n, data):
    k = data.draw(st.integers(2, n))
    similarity = cosine_similarity(torch.randn(1, n, 6, generator=generator(seed)))
    picks = farthest_point(similarity, k)[0].tolist()
    assert len(set(picks)) == k
    for step in range(1, k):
        gap = (1.0 - similarity[0][:, picks[:step]]).amin(dim=1)
        rest = [i for i in range(n) if i not in picks[:step]]
        assert gap[picks[step]] >= max(float(gap[i]) for i in rest) - 1e-6


def test_farthest_point_is_within_twice_the_best_radius():
    x = torch.nn.functional.normalize(torch.randn(1, 10, 3, generator=generator(3)), dim=-1)
    similarity = cosine_similarity(x)
    chord = (2.0 * (1.0 - similarity[0])).clamp(min=0).sqrt()
    best = min(float(chord[:, list(c)].amin(dim=1).max()) for c in itertools.combinations(range(10), 3))
    picks = farthest_point(similarity, 3)[0].tolist()
    assert float(chord[:, picks].amin(dim=1).max()) <= 2.0 * best + 1e-6


def test_farthest_point_starts_at_the_most_isolated_or_the_heaviest_token():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [1.0, 0.2]]])
    similarity = cosine_similarity(x)
    assert farthest_point(similarity, 1).tolist() == [[2]]
    weights = torch.tensor([[1.0, 9.0, 1.0, 1.0]])
    assert farthest_point(similarity, 2, weights=weights, start="heaviest")[0, 0] == 1


def test_weights_draw_farthest_points_towards_heavy_tokens():
    x = torch.eye(6).unsqueeze(0)
    weights = torch.tensor([[1.0, 1.0, 5.0, 1.0, 4.0, 1.0]])
    assert farthest_point(cosine_similarity(x), 3, weights=weights)[0].tolist() == [2, 4, 0]
    assert farthest_point(cosine_similarity(x), 6, weights=torch.zeros(1, 6))[0].sort().values.tolist() == [*range(6)]


def test_identical_tokens_are_picked_once_each_and_in_order():
    similarity = cosine_similarity(torch.ones(2, 5, 3))
    assert farthest_point(similarity, 5).tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("start", ["isolated", "heaviest"])
def test_farthest_point_never_picks_padding(start):
    x = torch.randn(3, 20, 5, generator=generator(4))
    mask = torch.rand(3, 20, generator=generator(5)) > 0.5
    picks = farthest_point(cosine_similarity(x), 6, mask=mask, start=start)
    assert mask.gather(1, picks).all()
    alone = farthest_point(cosine_similarity(x[:1, mask[0]]), 6, start=start)
    assert picks[:1].tolist() == torch.arange(20)[mask[0]][alone].tolist()


def test_farthest_point_leaves_its_inputs_alone():
    similarity = cosine_similarity(torch.randn(1, 8, 4, generator=generator(6)))
    before = similarity.clone()
    farthest_point(similarity, 4, mask=torch.ones(1, 8, dtype=torch.bool))
    assert torch.equal(similarity, before)
