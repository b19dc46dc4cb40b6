"""What dropping visual tokens does to a prompt of token ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers.prompt import (
    compact_positions,
    locate_images,
    surviving_columns,
    take_columns,
)

PAD, BOS, IMAGE = 0, 1, 4


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def test_adjacent_images_are_counted_off_by_their_length() -> None:
    rows, places = locate_images(ids([1, 4, 4, 4, 4, 9], [4, 4, 9, 9, 9, 9]), IMAGE, [2, 2, 2])
    assert rows.tolist() == [0, 0, 1]
    assert places.tolist() == [[1, 2], [3, 4], [0, 1]]


@pytest.mark.parametrize(
    ("prompt", "images", "sentence"),
    [
        ([[1, 9, 9]], 1, "no image placeholder"),
        ([[1, 4, 9]], 1, "no multiple of the 2 visual tokens"),
        ([[4, 4, 4, 4]], 1, r"room for 2 image\(s\), but 1 were given"),
        ([[4, 4, 9, 9]], 2, r"room for 1 image\(s\), but 2 were given"),
    ],
)
def test_images_and_placeholders_that_do_not_match_are_refused(
    prompt: list[list[int]], images: int, sentence: str
) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        locate_images(ids(*prompt), IMAGE, [2] * images)


def test_images_of_different_lengths_are_counted_off_in_order() -> None:
    rows, places = locate_images(ids([1, 4, 4, 4, 4, 9], [4, 4, 9, 9, 9, 9]), IMAGE, [1, 3, 2])
    assert rows.tolist() == [0, 0, 1]
    assert places.tolist() == [[1, -1, -1], [2, 3, 4], [0, 1, -1]]


@pytest.mark.parametrize("lengths", [[2, 3, 1], [1, 3], [1, 3, 3]])
def test_images_of_different_lengths_that_do_not_fill_the_rows_are_refused(lengths: list[int]) -> None:
    with pytest.raises(InvalidInputError, match=r"hold \[4, 2\] image placeholders, but the images have"):
        locate_images(ids([1, 4, 4, 4, 4, 9], [4, 4, 9, 9, 9, 9]), IMAGE, lengths)


def test_images_of_different_lengths_keep_what_each_keeps() -> None:
    batch = ids([1, 4, 4, 4, 4, 9], [4, 4, 9, 9, 9, 9])
    rows, places = locate_images(batch, IMAGE, [1, 3, 2])
    columns = surviving_columns(None, batch, rows, places, torch.tensor([[0, -1], [0, 2], [1, -1]]))
    assert columns.tolist() == [[0, 1, 2, 4, 5], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stays_on_its_side_and_shrinks_to_what_is_needed(side: str) -> None:
    long, short = [1, 4, 4, 4, 7, 8], [1, 9, 9]
    mask = torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0, 0]]).bool()
    batch = ids(long, [0] * 3 + short if side == "left" else short + [0] * 3)
    columns = surviving_columns(mask, batch, torch.tensor([0]), torch.tensor([[1, 2, 3]]), torch.tensor([[1]]))
    assert columns[0].tolist() == [0, 2, 4, 5]
    assert columns[1].tolist() == ([-1, 3, 4, 5] if side == "left" else [0, 1, 2, -1])
    assert take_columns(batch, columns, PAD)[1].tolist() == ([0, *short] if side == "left" else [*short, 0])


def test_masked_columns_inside_a_row_stay() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 1]]).bool()
    columns = surviving_columns(
        mask, ids([1, 4, 4, 9, 8]), torch.tensor([0]), torch.tensor([[1, 2]]), torch.tensor([[0]])
    )
    assert columns.tolist() == [[0, 1, 3, 4]]


def test_positions_count_real_tokens_only() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    assert compact_positions(mask, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]
    assert compact_positions(mask, 2).tolist() == [[1, 2], [3, 3]]
