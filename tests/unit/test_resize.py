"""Resizing: means of cells, which cells there are, and who stands for one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from dcp_prune import VisualTokens, make_pruner
from dcp_prune.models.layout import frames_layout
from dcp_prune.pruners.resize import ResizePruner, grid_cells


def make_tokens(rows: int, cols: int, d: int = 5, b: int = 1) -> VisualTokens:
    features = torch.randn(b, rows * cols, d, generator=torch.Generator().manual_seed(rows * cols))
    return VisualTokens.from_features(features, grid=(rows, cols))


@pytest.mark.parametrize(
    ("grid", "cells"),
    [((24, 24), (4, 4)), ((24, 24), (8, 8)), ((12, 48), (2, 8)), ((24, 24), (1, 1)), ((4, 6), (4, 6))],
)
def test_where_cells_divide_the_grid_it_is_average_pooling(grid, cells):
    tokens = make_tokens(*grid, b=2)
    pruned = ResizePruner(num_tokens=cells[0] * cells[1])(tokens)
    pictures = tokens.features.mT.unflatten(2, grid)
    torch.testing.assert_close(pruned.features, adaptive_avg_pool2d(pictures, cells).flatten(2).mT)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 8, 10, 11, 13, 16, 20, 32, 40, 61, 79, 80])
@pytest.mark.parametrize("grid", [(9, 9), (3, 27), (27, 3), (1, 81)])
def test_any_budget_has_exactly_as_many_cells_of_nearly_one_size(grid, k):
    cells = grid_cells(make_tokens(*grid), k)[0]
    sizes = torch.bincount(cells, minlength=k)
    assert sizes.shape == (k,)
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 2


@pytest.mark.parametrize(("k", "lines"), [(16, 4), (32, 4), (20, 4), (12, 3), (7, 3), (13, 4)])
def test_cells_are_about_square_and_their_lines_equal_where_the_budget_is_such_a_product(k, lines):
    cells = grid_cells(make_tokens(24, 24), k)[0].view(24, 24)
    first = cells[:, 0].unique()
    assert len(first) == lines
    if k % lines == 0:
        assert first.tolist() == [*range(0, k, k // lines)]


def test_the_token_in_the_middle_stands_for_its_cell_and_all_others_are_merged_into_it():
    pruned = ResizePruner(num_tokens=4)(make_tokens(6, 6))
    assert pruned.indices.tolist() == [[7, 10, 25, 28]]
    assert pruned.assignment[0].view(6, 6).tolist() == [[0, 0, 0, 1, 1, 1]] * 3 + [[2, 2, 2, 3, 3, 3]] * 3


def test_padding_takes_part_in_no_mean():
    tokens = make_tokens(6, 8)
    inside = (tokens.positions[..., 1] < 6) & (tokens.positions[..., 0] >= 0)
    padded = replace(tokens, mask=inside, features=tokens.features.masked_fill(~inside.unsqueeze(2), 900.0))
    alone = VisualTokens.from_features(tokens.features[:, inside[0]], grid=(6, 6))
    torch.testing.assert_close(ResizePruner(num_tokens=9)(padded).features, ResizePruner(num_tokens=9)(alone).features)


def test_the_frames_of_a_video_are_pooled_one_by_one_where_the_budget_allows():
    tokens = make_tokens(1, 4 * 36)
    tokens = replace(tokens, positions=frames_layout(4, 6, 6).positions.unsqueeze(0))
    pruned = make_pruner("resize", num_tokens=16)(tokens)
    for frame in range(4):
        alone = VisualTokens.from_features(tokens.features[:, 36 * frame : 36 * (frame + 1)])
        expected = ResizePruner(num_tokens=4)(alone).features
        torch.testing.assert_close(pruned.features[:, 4 * frame : 4 * (frame + 1)], expected)
