"""Adaptive budgets: the fewest tokens below a bound, and in all else the fixed budget of that number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from dcp_prune import (
    TATCS,
    Budget,
    DCPPruner,
    InvalidInputError,
    PrunedTokens,
    VisualTokens,
    list_pruners,
    make_pruner,
)
from dcp_prune.functional.clustering import unmet_demand
from dcp_prune.functional.distribution import coverage, coverage_of_prefixes
from dcp_prune.functional.similarity import cosine_similarity, gather_tokens
from dcp_prune.pruners.batching import take_rows

SIDE, D = 12, 32
N = SIDE * SIDE
LOW, HIGH = 3, 20
THINGS = (2, 5, 9, 12)
"""Different things in each image of the batch, 3 patches each."""
NAMES = ("dcp", "dcp_lookup", "dcp_progressive")


def scenes(things: Sequence[int] = THINGS, *, seed: int = 0, question: bool = True) -> VisualTokens:
    """Images that need different numbers of tokens: things on a plain background, and a question about one of them."""
    generator = torch.Generator().manual_seed(seed)
    looks = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    features = 0.1 * torch.randn(len(things), N, D, generator=generator) + looks[-1]
    for image, count in enumerate(things):
        for thing in range(count):
            noise = 0.05 * torch.randn(3, D, generator=generator)
            features[image, 12 * thing + 4 : 12 * thing + 7] = looks[thing] + noise
    text = torch.stack((looks[0], torch.nn.functional.normalize(torch.randn(D, generator=generator), dim=-1)))
    attention = torch.rand(len(things), N, generator=generator)
    return VisualTokens.from_features(
        features,
        cls_attention=attention / attention.sum(dim=1, keepdim=True),
        text=text.expand(len(things), 2, D) if question else None,
    )


def kept(pruned: PrunedTokens) -> list[int]:
    return pruned.mask.sum(dim=1).tolist()


def adaptive(bound: float, name: str = "dcp", **options: Any) -> DCPPruner:
    pruner = make_pruner(name, **{"num_tokens": (LOW, HIGH), "max_distance": bound, **options})
    assert isinstance(pruner, DCPPruner)
    return pruner


def middle(tokens: VisualTokens, **options: Any) -> float:
    """A bound that gives the images of `scenes` different numbers of tokens."""
    reached = adaptive(math.inf, num_tokens=(6, HIGH), **options)(tokens).stats["reached"]
    return 1.001 * float(reached.median())  # not on the edge, where rounding decides


# --- how many ---


def test_images_that_hold_more_keep_more() -> None:
    tokens = scenes()
    counts = kept(adaptive(middle(tokens))(tokens))
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("question", [True, False])
@pytest.mark.parametrize("bounded", ["demand", "coverage"])
def test_a_smaller_bound_keeps_no_fewer_and_never_leaves_the_range(name: str, question: bool, bounded: str) -> None:
    tokens = scenes(question=question)
    bounds = [math.inf, 1.0, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.0]
    counts = [torch.tensor(kept(adaptive(bound, name, bounded=bounded)(tokens))) for bound in bounds]
    for fewer, more in pairwise(counts):
        assert (more >= fewer).all()
    assert counts[0].tolist() == [LOW] * len(THINGS)
    assert counts[-1].tolist() == [HIGH] * len(THINGS)
    assert len(torch.stack(counts).unique()) > 4


def demand_left(tokens: VisualTokens, k: int) -> float:
    """Of one image, from the definition: plain cosines as representation, no question."""
    fixed = make_pruner("dcp", num_tokens=k, centre_temperature=None, reselect_members=False)(tokens)
    similarity = cosine_similarity(tokens.features)[0].clamp(min=0.0)
    weights = fixed.stats["scores"][0]
    met = similarity[:, fixed.indices[0]].amax(dim=1)
    return float(1.0 - (weights * met).sum() / (weights * similarity.amax(dim=1)).sum())


def coverage_left(tokens: VisualTokens, k: int) -> float:
    fixed = make_pruner("dcp", num_tokens=k, reselect_members=False)(tokens)
    weights = fixed.stats["relevance"] ** TATCS().relevance_power
    return float(coverage(fixed.features, tokens.features, weights=weights))


@pytest.mark.parametrize(
    ("question", "options", "distance"),
    [(False, {"centre_temperature": None}, demand_left), (True, {"bounded": "coverage"}, coverage_left)],
)
def test_the_number_is_the_smallest_one_below_the_bound(
    question: bool, options: dict[str, Any], distance: Callable[[VisualTokens, int], float]
) -> None:
    tokens = scenes(question=question)
    bound = middle(tokens, **options)
    pruned = adaptive(bound, reselect_members=False, **options)(tokens)
    assert len(set(kept(pruned))) > 1
    for image, count in enumerate(kept(pruned)):
        one = take_rows(tokens, [image])
        distances = [distance(one, k) for k in (count - 1, count)]
        assert distances[1] == pytest.approx(float(pruned.stats["reached"][image]), abs=1e-6)
        assert distances[1] < bound or count == HIGH
        assert distances[0] >= bound or count == LOW


def test_prefixes_have_the_coverage_of_each_by_itself() -> None:
    tokens = scenes()
    generator = torch.Generator().manual_seed(1)
    picks = torch.stack([torch.randperm(N, generator=generator)[:9] for _ in THINGS])
    weights = torch.rand(len(THINGS), N, generator=generator)
    mask = torch.rand(len(THINGS), N, generator=generator) > 0.2
    found = coverage_of_prefixes(tokens.features, picks, full_mask=mask, weights=weights)
    for k in range(1, 10):
        alone = coverage(gather_tokens(tokens.features, picks[:, :k]), tokens.features, full_mask=mask, weights=weights)
        torch.testing.assert_close(found[:, k - 1], alone)
    assert (found.diff(dim=1) <= 0).all()


def test_demand_that_prefixes_leave_unmet_is_what_facility_location_could_still_gain() -> None:
    similarity = torch.tensor([[[1.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 1.0]]])
    demand = torch.tensor([[1.0, 1.0, 2.0]])
    found = unmet_demand(similarity, torch.tensor([[2, 0, 1]]), demand=demand)
    assert found[0].tolist() == pytest.approx([1 - 2.2 / 4, 1 - 3.5 / 4, 0.0])
    mask = torch.tensor([[True, True, False]])
    found = unmet_demand(similarity, torch.tensor([[1, 0]]), demand=demand, mask=mask)
    assert found[0].tolist() == pytest.approx([1 - 1.5 / 2, 0.0])
    assert unmet_demand(similarity, torch.tensor([[1]]), demand=torch.zeros(1, 3)).tolist() == [[0.0]]


# --- which ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bounded": "coverage"},
        {"reselect_members": False},
        {"threshold": 0.05},
        {"threshold": math.inf},
        {"threshold": math.inf, "first_choice": "saliency"},
        {"threshold": 1.0, "distance": "kappa", "first_choice": "coverage"},
        {"centre_temperature": None},
    ],
    ids=str,
)
def test_an_image_keeps_the_tokens_of_the_fixed_budget_of_its_number(name: str, options: dict[str, Any]) -> None:
    tokens = scenes(seed=3)
    pruner = adaptive(middle(tokens, **options), name, **options)
    pruned = pruner(tokens)
    counts = kept(pruned)
    assert len(set(counts)) > 1
    for image, count in enumerate(counts):
        fixed = make_pruner(name, num_tokens=count, **options)(take_rows(tokens, [image]))
        assert torch.equal(pruned.indices[image, :count], fixed.indices[0])
        assert torch.equal(pruned.assignment[image], fixed.assignment[0])
        torch.testing.assert_close(pruned.features[image, :count], fixed.features[0])
        for key in ("kappa", "distance", "scores", "relevance", "confidence"):
            torch.testing.assert_close(pruned.stats[key][image], fixed.stats[key][0])
        assert bool(pruned.stats["reselected"][image]) == bool(fixed.stats["reselected"][0])


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_single_images_whatever_its_neighbours_keep(name: str) -> None:
    tokens = scenes()
    pruner = adaptive(middle(tokens), name)
    together = pruner(tokens)
    assert together.indices.shape[1] == max(kept(together))
    for image in range(len(THINGS)):
        alone = pruner(take_rows(tokens, [image]))
        real = together.mask[image]
        assert alone.mask.all()
        assert torch.equal(together.indices[image][real], alone.indices[0])
        assert torch.equal(together.assignment[image], alone.assignment[0])
        for key, value in alone.stats.items():
            torch.testing.assert_close(together.stats[key][image], value[0], rtol=1e-3, atol=1e-5)


def test_empty_slots_come_last_hold_nothing_and_absorb_nothing() -> None:
    tokens = scenes()
    pruned = adaptive(middle(tokens))(tokens)
    assert (pruned.mask.diff(dim=1) == 0).logical_or(~pruned.mask[:, 1:]).all()
    assert (pruned.indices[~pruned.mask] == -1).all()
    assert (pruned.features[~pruned.mask] == 0).all()
    for image, count in enumerate(kept(pruned)):
        assert (pruned.indices[image, :count].diff() > 0).all()
        assert sorted(set(pruned.assignment[image].tolist())) == [*range(count)]


def test_padding_is_never_kept_and_never_counts() -> None:
    counts = (N, 40, 10, LOW - 1)
    mask = torch.arange(N) < torch.tensor(counts).unsqueeze(1)
    tokens = replace(scenes((12, 3, 1, 1)), mask=mask)
    for bound in (0.0, middle(tokens), math.inf):
        pruned = adaptive(bound)(tokens)
        for image, count in enumerate(counts):
            length = int(pruned.mask[image].sum())
            assert min(LOW, count) <= length <= min(HIGH, count)
            assert pruned.indices[image].max() < count
            alone = take_rows(tokens, [image])
            assert alone.encoder is not None
            assert alone.encoder.cls_attention is not None
            cut = VisualTokens.from_features(
                alone.features[:, :count],
                grid=(1, count),
                cls_attention=alone.encoder.cls_attention[:, :count],
                text=alone.text,
            )
            cut = replace(cut, positions=alone.positions[:, :count])
            without = adaptive(bound)(cut)
            assert torch.equal(without.indices[0], pruned.indices[image, :length])


def test_a_share_of_the_tokens_can_be_a_range_too() -> None:
    tokens = scenes()
    bound = middle(tokens)
    shares = DCPPruner(keep_ratio=(3 / N, 20 / N), max_distance=bound)(tokens)
    counts = adaptive(bound)(tokens)
    assert torch.equal(shares.indices, counts.indices)


def test_a_range_up_to_all_tokens_may_keep_all_of_them() -> None:
    tokens = scenes()
    assert kept(DCPPruner(num_tokens=(1, 10 * N), max_distance=0.0)(tokens)) == [N] * len(THINGS)
    whole = DCPPruner(num_tokens=(N, 10 * N), max_distance=0.0)(tokens)
    assert torch.equal(whole.features, tokens.features)
    assert torch.equal(whole.assignment, tokens.assignment)


def test_a_range_of_one_number_is_that_number() -> None:
    tokens = scenes()
    fixed = DCPPruner(num_tokens=8)(tokens)
    one = DCPPruner(num_tokens=(8, 8), max_distance=0.1)(tokens)
    assert torch.equal(one.indices, fixed.indices)
    assert torch.equal(one.assignment, fixed.assignment)


def test_each_tile_gets_a_number_of_its_own() -> None:
    tokens = scenes((9, 12))
    lengths = (72, 72)
    tiles = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths)).expand(2, N)
    joined = replace(tokens, tiles=tiles, tile_lengths=(lengths, lengths))
    pruned = adaptive(middle(tokens), scope="tile")(joined)
    of_tile = [[int(((row >= start) & (row < start + 72)).sum()) for start in (0, 72)] for row in pruned.indices]
    assert all(LOW <= count <= HIGH for row in of_tile for count in row)
    assert len({count for row in of_tile for count in row}) > 1
    assert pruned.indices.shape[1] == max(map(sum, of_tile))
    assert pruned.stats["reached"].shape == (4,)


def test_the_choice_never_waits_for_the_device() -> None:
    def to_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    tokens = scenes()
    assert tokens.encoder is not None
    encoder = replace(tokens.encoder, **{key: to_meta(value) for key, value in vars(tokens.encoder).items()})
    on_meta = replace(tokens, **{key: to_meta(value) for key, value in vars(tokens).items()} | {"encoder": encoder})
    chosen = adaptive(0.1).prune(on_meta, HIGH)
    assert chosen.mask is not None
    assert chosen.kept.shape == chosen.mask.shape == (len(THINGS), HIGH)


def test_stages_inside_the_encoder_leave_enough_for_the_whole_range() -> None:
    stages = adaptive(0.1, "dcp_progressive", num_tokens=(8, 200)).encoder_stages(576, 24)
    assert [stage.num_tokens for stage in stages] == [288, 200]


# --- what is refused ---


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_tokens": (8, 16)}, r"the range num_tokens=\(8, 16\) needs max_distance"),
        ({"keep_ratio": (0.1, 0.2)}, r"the range keep_ratio=\(0.1, 0.2\) needs max_distance"),
        ({"num_tokens": 16, "max_distance": 0.1}, r"num_tokens must be \(fewest, most\), got 16"),
        ({"keep_ratio": 0.5, "max_distance": 0.1}, r"keep_ratio must be \(fewest, most\), got 0.5"),
        ({"num_tokens": (16, 8), "max_distance": 0.1}, r"write it as \(8, 16\)"),
        ({"num_tokens": (0, 8), "max_distance": 0.1}, "at least 1, got 0"),
        ({"num_tokens": (1.5, 8), "max_distance": 0.1}, "whole number of visual tokens, got 1.5"),
        ({"num_tokens": (True, 8), "max_distance": 0.1}, "whole number of visual tokens, got True"),
        ({"num_tokens": (8,), "max_distance": 0.1}, r"\(fewest, most\), got \(8,\)"),
        ({"num_tokens": (1, 2, 3), "max_distance": 0.1}, r"\(fewest, most\)"),
        ({"num_tokens": (), "max_distance": 0.1}, r"\(fewest, most\)"),
        ({"keep_ratio": (0.1, 1.5), "max_distance": 0.1}, r"in \(0, 1\], got 1.5"),
        ({"keep_ratio": (0.5, 0.1), "max_distance": 0.1}, r"write it as \(0.1, 0.5\)"),
        ({"num_tokens": (8, 16), "keep_ratio": (0.1, 0.2), "max_distance": 0.1}, "both"),
        ({"max_distance": 0.1}, "neither"),
        ({"num_tokens": (8, 16), "max_distance": -0.1}, "max_distance must be a number of at least 0, got -0.1"),
        ({"num_tokens": (8, 16), "max_distance": math.nan}, "max_distance must be a number of at least 0, got nan"),
        ({"num_tokens": (8, 16), "max_distance": "low"}, "max_distance must be a number of at least 0, got 'low'"),
        ({"num_tokens": (8, 16), "max_distance": True}, "max_distance must be a number of at least 0, got True"),
    ],
)
@pytest.mark.parametrize("make", [Budget, DCPPruner])
def test_a_senseless_range_is_refused_in_one_sentence(make: type, given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says) as refused:
        make(**given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [name for name in list_pruners() if name not in NAMES])
@pytest.mark.parametrize("given", [{"num_tokens": (8, 16)}, {"keep_ratio": [0.1, 0.2]}], ids=str)
def test_every_other_pruner_refuses_a_range(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=r"keeps a fixed number of tokens, so (num_tokens|keep_ratio) must be"):
        make_pruner(name, **given)
    with pytest.raises(InvalidInputError, match="no option 'max_distance'"):
        make_pruner(name, num_tokens=8, max_distance=0.1)


def test_a_range_from_a_configuration_file_is_as_good_as_a_tuple() -> None:
    as_list = DCPPruner(num_tokens=[8, 16], max_distance=0.1)  # pyright: ignore[reportArgumentType]
    assert as_list == DCPPruner(num_tokens=(8, 16), max_distance=0.1)
    hash(as_list)


def test_a_budget_knows_both_ends() -> None:
    budget = Budget(num_tokens=(8, 128), max_distance=0.1)
    assert (budget.is_range, budget.fewest(576), budget.resolve(576)) == (True, 8, 128)
    assert (budget.fewest(5), budget.resolve(64)) == (5, 64)
    shares = Budget(keep_ratio=(0.1, 0.5), max_distance=0.1)
    assert (shares.fewest(100), shares.resolve(100)) == (10, 50)
    fixed = Budget(num_tokens=16)
    assert (fixed.is_range, fixed.fewest(576), fixed.resolve(576)) == (False, 16, 16)
