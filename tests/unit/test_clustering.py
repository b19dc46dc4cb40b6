"""Facility location, clusters and their representatives."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dcp_prune import VisualTokens, make_pruner
from dcp_prune.functional.clustering import Blend, assign, facility_location, reselect
from dcp_prune.functional.similarity import cosine_similarity

quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covered(similarity: torch.Tensor, picks: list[int], demand: torch.Tensor) -> float:
    return float((similarity[:, picks].amax(dim=1).clamp(min=0.0) * demand).sum())


@quick
@given(seed=seeds, n=st.integers(3, 20), data=st.data())
def test_each_centre_adds_the_most_weighted_coverage(seed, n, data):
    k = data.draw(st.integers(1, n))
    similarity = cosine_similarity(tokens(seed, 1, n, 5))
    demand = torch.rand(1, n, generator=torch.Generator().manual_seed(seed))
    picks = facility_location(similarity, k, demand=demand)[0].tolist()
    assert len(set(picks)) == k
    for step in range(k):
        value = [covered(similarity[0], [*picks[:step], j], demand[0]) for j in range(n) if j not in picks[:step]]
        assert covered(similarity[0], picks[: step + 1], demand[0]) >= max(value) - 1e-4


def test_greedy_coverage_reaches_its_guarantee():
    similarity = cosine_similarity(tokens(0, 1, 12, 4)).clamp(min=0.0)
    demand = torch.ones(12)
    best = max(covered(similarity[0], list(c), demand) for c in itertools.combinations(range(12), 3))
    greedy = covered(similarity[0], facility_location(similarity, 3)[0].tolist(), demand)
    assert greedy >= (1.0 - 1.0 / math.e) * best


def test_merit_multiplies_a_candidates_gain():
    similarity = torch.eye(4).unsqueeze(0)
    merit = torch.tensor([[1.0, 3.0, 2.0, 4.0]])
    assert facility_location(similarity, 4, merit=merit)[0].tolist() == [3, 1, 2, 0]
    assert facility_location(similarity, 4)[0].tolist() == [0, 1, 2, 3]


def test_demand_decides_which_group_is_represented_first():
    x = torch.eye(2).repeat_interleave(torch.tensor([5, 3]), dim=0).unsqueeze(0)
    demand = torch.tensor([[1.0] * 5 + [10.0] * 3])
    assert facility_location(cosine_similarity(x), 2)[0].tolist() == [0, 5]
    assert facility_location(cosine_similarity(x), 2, demand=demand)[0].tolist() == [5, 0]


def test_padding_is_neither_picked_nor_worth_covering():
    x = tokens(1, 2, 15, 4)
    mask = torch.rand(2, 15, generator=torch.Generator().manual_seed(2)) > 0.4
    picks = facility_location(cosine_similarity(x), 4, mask=mask)
    assert mask.gather(1, picks).all()
    for row in range(2):
        alone = facility_location(cosine_similarity(x[row : row + 1, mask[row]]), 4)
        assert picks[row].tolist() == torch.arange(15)[mask[row]][alone[0]].tolist()


def test_facility_location_leaves_its_inputs_alone():
    similarity = cosine_similarity(tokens(3, 1, 9, 4))
    before = similarity.clone()
    facility_location(similarity, 3)
    assert torch.equal(similarity, before)


def test_tokens_join_the_most_similar_centre_and_centres_stay_with_themselves():
    x = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [1.0, 0.0]]])
    similarity = cosine_similarity(x)
    assert assign(similarity, torch.tensor([[0, 2]])).tolist() == [[0, 0, 1, 1, 0]]
    assert assign(similarity, torch.tensor([[0, 4]])).tolist()[0][4] == 1, "an identical centre keeps its own slot"
    mask = torch.tensor([[True, False, True, True, True]])
    assert assign(similarity, torch.tensor([[0, 2]]), mask).tolist() == [[0, -1, 1, 1, 0]]


def test_the_most_central_member_speaks_for_its_cluster_unless_a_bonus_says_otherwise():
    angles = torch.tensor([0.0, 0.2, 0.4, 3.0, 3.1])
    x = torch.stack((angles.cos(), angles.sin()), dim=-1).unsqueeze(0)
    similarity, clusters = cosine_similarity(x), torch.tensor([[0, 0, 0, 1, 1]])
    assert reselect(similarity, clusters, 2)[0, 0] == 1
    bonus = torch.tensor([[0.0, 0.0, 1.0, 0.0, 1.0]])
    assert reselect(similarity, clusters, 2, bonus=bonus).tolist() == [[2, 4]]


@quick
@given(seed=seeds, n=st.integers(4, 20), data=st.data())
def test_reselection_takes_one_member_of_each_cluster(seed, n, data):
    k = data.draw(st.integers(1, n))
    similarity = cosine_similarity(tokens(seed, 2, n, 4))
    clusters = assign(similarity, facility_location(similarity, k))
    members = reselect(similarity, clusters, k)
    assert clusters.gather(1, members).tolist() == [[*range(k)]] * 2


class LargeOperators(TorchDispatchMode):
    """Counts what is not left to one thread on a CPU; products and views do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        large = isinstance(result, torch.Tensor) and result.numel() > 32_768
        self.count += large and not func.is_view and "mm" not in str(func)
        return result


@pytest.mark.parametrize("name", ["dcp", "mmtok", "scope"])
def test_a_larger_budget_asks_for_no_more_large_operators(name):
    generator = torch.Generator().manual_seed(0)
    features, text = torch.randn(1, 400, 16, generator=generator), torch.randn(1, 4, 16, generator=generator)
    attention = torch.rand(1, 400, generator=generator)
    image = VisualTokens.from_features(features, encoder_features=features, cls_attention=attention, text=text)
    counts = []
    for k in (4, 40):
        with LargeOperators() as large:
            make_pruner(name, num_tokens=k)(image)
        counts.append(large.count)
    assert counts[0] == counts[1] > 0


def test_a_blend_is_the_sum_that_it_stands_for():
    generator = torch.Generator().manual_seed(0)
    similarity, vectors = torch.randn(2, 9, 9, generator=generator), torch.randn(2, 9, 3, generator=generator)
    scale = torch.tensor([0.3, 0.9])[:, None, None]
    whole, blend = scale * similarity + vectors @ vectors.mT, Blend(similarity, scale, vectors)
    picks = torch.tensor([[1, 4], [8, 0]])
    torch.testing.assert_close(blend.columns(picks), whole.gather(2, picks.unsqueeze(1).expand(2, 9, 2)))
    torch.testing.assert_close(blend @ vectors, whole @ vectors)
    assert torch.equal(assign(blend, picks), assign(whole, picks))
    clusters = assign(whole, picks)
    assert torch.equal(reselect(blend, clusters, 2), reselect(whole, clusters, 2))
