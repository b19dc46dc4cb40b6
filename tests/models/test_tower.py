"""What towers share: cells of patches in the place of patches."""

from __future__ import annotations

import torch

from dcp_prune.models.layout import plain_layout
from dcp_prune.models.tower import Walk, merge_cells
from dcp_prune.tokens import EncoderTokens


def test_a_cell_is_the_mean_of_its_patches_and_incomplete_cells_are_left_out() -> None:
    patches = torch.arange(15.0).view(1, 15)  # three rows of five
    assert merge_cells(patches, (3, 5), 2).tolist() == [[3.0, 5.0]]
    assert torch.equal(merge_cells(patches, (3, 5), 1), patches)
    vectors = patches.unsqueeze(-1).expand(1, 15, 4)
    assert torch.equal(merge_cells(vectors, (3, 5), 2), torch.tensor([3.0, 5.0]).view(1, 2, 1).expand(1, 2, 4))


def test_a_walk_over_cells_is_that_over_an_image_of_fewer_patches() -> None:
    torch.manual_seed(0)
    fine, coarse = plain_layout(4, 6), plain_layout(2, 3)
    order = torch.arange(24).expand(2, -1)
    encoder = EncoderTokens(
        torch.randn(2, 24, 8), fine.positions.expand(2, -1, -1), order, torch.rand(2, 24), values=torch.randn(2, 24, 8)
    )
    walk = Walk(encoder, order, (), (), ()).merged((4, 6), 2)
    assert torch.equal(walk.assignment, torch.arange(6).expand(2, -1))
    assert torch.equal(walk.encoder.positions, coarse.positions.expand(2, -1, -1))
    assert walk.encoder.keys is None
    for image in range(2):
        for cell, (row, col) in enumerate(coarse.positions.long().tolist()):
            patches = [(2 * row + down) * 6 + 2 * col + right for down in (0, 1) for right in (0, 1)]
            for name in ("features", "cls_attention", "values"):
                merged, plain = getattr(walk.encoder, name), getattr(encoder, name)
                torch.testing.assert_close(merged[image, cell], plain[image, patches].mean(dim=0))
    tokens = walk.encoded(torch.randn(2, 6, 5), (coarse, coarse), with_encoder=True).tokens
    assert tokens.num_original == 6
    assert tokens.encoder is not None
