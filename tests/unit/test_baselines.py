"""The three baselines: random, uniform, [CLS] attention."""

from __future__ import annotations

import pytest
import torch

from dcp_prune import ClsAttentionPruner, InvalidInputError, RandomPruner, UniformPruner, VisualTokens


def blank(rows: int, cols: int, b: int = 1) -> VisualTokens:
    return VisualTokens.from_features(torch.ones(b, rows * cols, 2), grid=(rows, cols))


def images(b: int, n: int = 100, d: int = 32) -> torch.Tensor:
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(0))


def kept(features: torch.Tensor, k: int = 10, seed: int = 0, mask: torch.Tensor | None = None) -> list[list[int]]:
    return RandomPruner(num_tokens=k, seed=seed)(VisualTokens.from_features(features, mask=mask)).indices.tolist()


def test_random_draws_anew_for_each_image_and_seed_and_again_for_the_same():
    features = images(50)
    draws = kept(features)
    assert len({tuple(draw) for draw in draws}) == 50
    assert kept(features) == draws
    assert all(one != other for one, other in zip(draws, kept(features, seed=1), strict=True))
    assert kept(features.flip(0)) == draws[::-1]
    assert [kept(image.unsqueeze(0))[0] for image in features] == draws


def test_random_knows_an_image_again_after_rounding_and_behind_padding():
    features = images(50)
    draws = kept(features)
    assert kept(features * (1 + 1e-6 * images(50).flip(0))) == draws
    assert kept(features + 3.0) == draws
    padded = torch.cat((features, 100 * images(50)[:, :20]), dim=1)
    mask = torch.arange(120).expand(50, 120) < 100
    assert kept(padded, mask=mask) == draws


def test_random_keeps_each_position_equally_often_and_independently():
    draws = torch.tensor(kept(images(2000, 36), k=9))
    counts = torch.zeros(2000, 36).scatter_(1, draws, 1.0)
    assert (counts.mean(dim=0) - 0.25).abs().max() < 0.05  # five standard deviations
    together = (counts.T @ counts / 2000)[~torch.eye(36, dtype=torch.bool)]
    assert (together - 9 * 8 / (36 * 35)).abs().max() < 0.03


def test_a_larger_random_budget_keeps_a_superset():
    tokens = blank(10, 10)
    small, large = (set(RandomPruner(num_tokens=k)(tokens).indices[0].tolist()) for k in (10, 30))
    assert small < large


def test_a_seed_must_be_a_whole_number():
    with pytest.raises(InvalidInputError, match=r"seed must be a whole number, got 0\.5"):
        RandomPruner(num_tokens=4, seed=0.5)  # pyright: ignore[reportArgumentType]


def test_uniform_places_a_square_number_on_a_regular_grid():
    kept = UniformPruner(num_tokens=16)(blank(24, 24)).indices[0]
    assert (kept // 24).unique().tolist() == (kept % 24).unique().tolist()
    assert (kept // 24).unique().diff().tolist() == [6, 6, 6]


def test_uniform_fits_its_lines_to_the_shape_of_the_image():
    wide, tall = (UniformPruner(num_tokens=8)(blank(*grid)).indices[0] for grid in ((4, 16), (16, 4)))
    assert len((wide // 16).unique()) == 1 or len((wide // 16).unique()) == 2
    assert len((wide % 16).unique()) >= 4
    assert len((tall // 4).unique()) >= 4


@pytest.mark.parametrize("k", [1, 2, 3, 7, 16, 17, 40, 63, 64, 100, 143])
@pytest.mark.parametrize("grid", [(12, 12), (8, 18), (1, 144)])
def test_uniform_leaves_no_hole(k, grid):
    tokens = blank(*grid)
    kept = UniformPruner(num_tokens=k)(tokens).indices[0]
    assert len(set(kept.tolist())) == k
    hole = torch.cdist(tokens.positions[0], tokens.positions[0, kept]).amin(dim=1).max()
    spacing = (144 / k) ** 0.5 if min(grid) > 1 else 144 / k
    assert hole <= 1.3 * spacing + 1.0


def test_uniform_spreads_over_the_part_of_the_grid_that_is_not_padding():
    tokens = blank(12, 12)
    mask = (torch.arange(144) // 12 < 6).expand(1, 144)
    padded = VisualTokens.from_features(tokens.features, mask=mask)
    lines = UniformPruner(num_tokens=8)(padded).indices[0] // 12
    assert lines.max() < 6
    assert lines.unique().tolist() == [1, 4]


def test_images_of_different_shape_in_one_batch_have_their_own_grids():
    mask = torch.stack((torch.arange(144) // 12 < 6, torch.arange(144) % 12 < 6))
    both = VisualTokens.from_features(torch.ones(2, 144, 2), mask=mask)
    together = UniformPruner(num_tokens=8)(both).indices
    for i in range(2):
        alone = VisualTokens.from_features(torch.ones(1, 144, 2), mask=mask[i : i + 1])
        assert UniformPruner(num_tokens=8)(alone).indices[0].tolist() == together[i].tolist()


def test_cls_attention_keeps_the_most_attended_and_the_earlier_on_ties():
    attention = torch.tensor([[0.1, 0.3, 0.2, 0.3, 0.0, 0.1]])
    tokens = VisualTokens.from_features(torch.ones(1, 6, 2), cls_attention=attention)
    assert ClsAttentionPruner(num_tokens=3)(tokens).indices.tolist() == [[1, 2, 3]]
    assert ClsAttentionPruner(num_tokens=4)(tokens).indices.tolist() == [[0, 1, 2, 3]]
    assert ClsAttentionPruner(num_tokens=4)(tokens).assignment.tolist() == [[0, 1, 2, 3, -1, -1]]


def test_attention_that_is_no_number_is_refused():
    attention = torch.tensor([[0.1, float("nan"), 0.2]])
    tokens = VisualTokens.from_features(torch.ones(1, 3, 2), cls_attention=attention)
    with pytest.raises(InvalidInputError, match=r"\[CLS\] attention hold NaN or inf"):
        ClsAttentionPruner(num_tokens=2)(tokens)
