"""Pictures show the patches that were kept, where they were kept, and leave those pixels as they are."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dcp_prune.viz.overlay import (
    Grid,
    Tile,
    _areas,
    _slot_colour,
    absorption_map,
    enlarged,
    film,
    heat_map,
    inspection,
    kept_tokens,
    sheet,
)

GRID = Grid(6, 6, 16)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(60, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((48, 48), Image.Resampling.NEAREST)


def _patch(picture: Image.Image, index: int, border: int = 0) -> np.ndarray:
    left, top, right, bottom = GRID.box(index)
    return np.asarray(picture)[top + border : bottom + 1 - border, left + border : right + 1 - border].astype(int)


def test_kept_patches_keep_every_pixel_and_all_others_go_dark(image: Image.Image) -> None:
    kept = [0, 7, 8, 35]
    picture, original = kept_tokens(image, kept, GRID), enlarged(image, GRID)
    assert picture.size == (96, 96)
    for index in range(36):
        same = (_patch(picture, index) == _patch(original, index)).all()
        assert same == (index in kept)
        if index not in kept:  # the middle, which no neighbour's frame reaches
            assert _patch(picture, index, 4).mean() < 0.75 * _patch(original, index, 4).mean()


def test_a_kept_patch_is_framed_in_yellow(image: Image.Image) -> None:
    left, top, right, bottom = GRID.box(14)
    pixels = np.asarray(kept_tokens(image, [14], GRID))
    for y, x in ((top - 1, left), (bottom + 1, right), (top, left - 1), (bottom, right + 1)):
        assert pixels[y, x].tolist() == [255, 225, 25]


def test_empty_slots_are_not_drawn(image: Image.Image) -> None:
    assert np.array_equal(np.asarray(kept_tokens(image, [3, -1], GRID)), np.asarray(kept_tokens(image, [3], GRID)))


def test_the_heat_map_is_brightest_where_saliency_is_highest(image: Image.Image) -> None:
    saliency = np.full(36, 0.01)
    saliency[21] = 1.0
    picture = heat_map(image, saliency, GRID)
    brightness = [_patch(picture, index).sum(axis=-1).mean() for index in range(36)]
    assert int(np.argmax(brightness)) == 21
    assert np.isfinite(np.asarray(heat_map(image, np.zeros(36), GRID), dtype=float)).all()


def test_absorbed_patches_take_their_tokens_colour_and_dropped_ones_none() -> None:
    white = Image.new("RGB", (48, 48), "white")
    assignment = np.zeros(36, dtype=int)
    assignment[18:] = 1
    assignment[30:] = -1
    picture = absorption_map(white, [0, 20], assignment, GRID)
    for index, slot in ((3, 0), (27, 1)):
        expected = 0.72 * np.array(_slot_colour(slot)) + 0.28 * 255
        assert np.abs(np.median(_patch(picture, index).reshape(-1, 3), axis=0) - expected).max() <= 1
    dropped = _patch(picture, 33, 3).reshape(-1, 3)
    assert (dropped == dropped[0, 0]).all()


def test_a_token_is_numbered_once_and_islands_are_pale() -> None:
    white = Image.new("RGB", (48, 48), "white")
    assignment = np.zeros(36, dtype=int)
    assignment[12:] = 1
    assignment[[29, 35]] = 0  # an island of two
    assignment[[0, 1, 6]] = 1  # an area of three, away from its token
    picture = absorption_map(white, [3, 20], assignment, GRID)

    def middle(index: int) -> np.ndarray:
        return np.median(_patch(picture, index, 4).reshape(-1, 3), axis=0)

    assert np.abs(middle(35) - (0.3 * np.array(_slot_colour(0)) + 0.7 * 255)).max() <= 1
    assert np.abs(middle(0) - (0.72 * np.array(_slot_colour(1)) + 0.28 * 255)).max() <= 1
    numbered = [index for index in range(36) if len(np.unique(_patch(picture, index, 4).reshape(-1, 3), axis=0)) > 1]
    assert numbered == [3, 20]


def test_a_frame_shows_on_yellow_and_on_white() -> None:
    left, top, _, _ = GRID.box(14)
    for ground in ((255, 225, 25), (255, 255, 255)):
        pixels = np.asarray(kept_tokens(Image.new("RGB", (48, 48), ground), [14], GRID)).astype(int)
        assert pixels[top, left - 1].tolist() == [255, 225, 25]
        assert pixels[top, left - 3].tolist() == pixels[top, left - 4].tolist() == [0, 0, 0]


def test_every_slot_has_its_own_colour_for_as_many_tokens_as_a_tight_budget_keeps() -> None:
    assert len({_slot_colour(slot) for slot in range(21)}) == 21


def test_areas_are_connected_and_leave_out_dropped_patches() -> None:
    assignment = np.full(36, -1)
    assignment[[0, 1, 7, 35, 34]] = 0
    assignment[2] = 1
    assert _areas(assignment, GRID) == [[0, 1, 7], [2], [34, 35]]


@pytest.mark.parametrize(("rows", "cols"), [(24, 24), (12, 30), (1, 7)])
def test_the_inspection_fits_any_grid(rows: int, cols: int) -> None:
    n = rows * cols
    rng = np.random.default_rng(0)
    picture = inspection(
        Image.new("RGB", (cols * 8, rows * 8), "gray"),
        kept=[0, n - 1],
        assignment=rng.integers(-1, 2, n),
        saliency=rng.random(n),
        shape=(rows, cols),
        title="what is this ? " * 30,
        subtitle="a\nb",
        footer="footer",
    )
    panel = Grid.fit(rows, cols, 384).size
    assert picture.width == 4 * panel[0] + 5 * 20
    assert picture.height > panel[1]


def test_an_encoder_without_saliency_gives_three_panels() -> None:
    pictures = [
        inspection(
            Image.new("RGB", (48, 48)),
            kept=[1],
            assignment=np.zeros(36, dtype=int),
            saliency=saliency,
            shape=(6, 6),
            title="t",
            subtitle="",
            footer="",
        )
        for saliency in (None, np.ones(36))
    ]
    assert pictures[0].width < pictures[1].width


def test_a_sheet_frames_right_and_wrong_differently() -> None:
    tile = Image.new("RGB", (50, 50), "gray")
    page = np.asarray(sheet([[Tile(tile, ("a",), True), Tile(tile, ("b",), False), Tile(tile, ("c",))]], title="t"))
    colours = {tuple(colour) for colour in page.reshape(-1, 3)}
    assert (0, 114, 178) in colours
    assert (213, 94, 0) in colours


def test_a_film_shows_every_frame_with_its_own_tokens(image: Image.Image) -> None:
    frames = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image]
    kept = [[0, 7], [], [35]]
    page = film(frames, kept, (6, 6), title="a film", side=96, columns=2)
    pixels = np.asarray(page)
    panels = [np.asarray(kept_tokens(frame, own, GRID)) for frame, own in zip(frames, kept, strict=True)]
    places = [
        (top, left)
        for top, left in np.argwhere((pixels != 255).any(axis=2)).tolist()
        for panel in panels
        if np.array_equal(pixels[top : top + 96, left : left + 96], panel)
    ]
    (first, second, third) = sorted(places)
    assert first[0] == second[0] < third[0]
    assert first[1] == third[1] < second[1]
    with pytest.raises(ValueError, match="shorter"):
        film(frames, kept[:2], (6, 6), title="a film")
