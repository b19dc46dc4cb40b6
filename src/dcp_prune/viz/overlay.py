"""What a pruner did, drawn over the picture that the model saw. Pillow only; nothing here knows a model or a pruner.

Pictures are enlarged so that every patch is a whole number of pixels; `Grid` says which. Colours are told apart by
people with colour-blindness (Okabe-Ito, viridis), and numbers say the same again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito (2008) without black and grey.
_HUES = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
_TINTS = (0.0, 0.45, -0.35)  # as they are, towards white, towards black
_VIRIDIS = (
    (68, 1, 84),
    (71, 44, 122),
    (59, 81, 139),
    (44, 113, 142),
    (33, 144, 141),
    (39, 173, 129),
    (92, 200, 99),
    (170, 220, 50),
    (253, 231, 37),
)
RIGHT, WRONG = (0, 114, 178), (213, 94, 0)
_INK, _SOFT, _PAPER = (25, 25, 25), (95, 95, 95), (255, 255, 255)
_FRAME = (255, 225, 25)
_ISLAND = 3
"""Fewer connected patches than this, away from their token, are too small to follow and fade."""
_MARGIN = 20


@dataclass(frozen=True)
class Grid:
    """How patches and pixels of a panel go together.

    Attributes:
        rows, cols: patches.
        cell: side of a patch in the panel, in pixels.
    """

    rows: int
    cols: int
    cell: int

    @classmethod
    def fit(cls, rows: int, cols: int, side: int) -> Grid:
        """The largest whole cell with which the panel's longer side is at most `side` pixels (but at least 1)."""
        return cls(rows, cols, max(1, side // max(rows, cols)))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the panel in pixels."""
        return self.cols * self.cell, self.rows * self.cell

    def box(self, index: int) -> tuple[int, int, int, int]:
        """First and last pixel (left, top, right, bottom) of the patch with this raster index, both inclusive."""
        row, col = divmod(index, self.cols)
        left, top = col * self.cell, row * self.cell
        return left, top, left + self.cell - 1, top + self.cell - 1

    def spread(self, values: np.ndarray) -> np.ndarray:
        """One value per patch (`rows*cols ...`) -> one per pixel (`height width ...`)."""
        grid = values.reshape(self.rows, self.cols, *values.shape[1:])
        return grid.repeat(self.cell, axis=0).repeat(self.cell, axis=1)


@dataclass(frozen=True)
class Tile:
    """A captioned panel of a sheet.

    Attributes:
        image: the panel.
        caption: paragraphs below it, wrapped; the first is dark, the others are soft.
        correct: draws a frame in the colour for right or wrong; None draws none.
    """

    image: Image.Image
    caption: tuple[str, ...] = field(default=())
    correct: bool | None = None


def enlarged(image: Image.Image, grid: Grid) -> Image.Image:
    """The picture at the panel's size, as 8-bit RGB."""
    smooth = grid.size[0] < image.width
    return image.convert("RGB").resize(grid.size, Image.Resampling.LANCZOS if smooth else Image.Resampling.BICUBIC)


def heat_map(image: Image.Image, saliency: Float[np.ndarray, "n"], grid: Grid) -> Image.Image:
    """Saliency by patch over the picture in grey: dark violet is least, yellow is most.

    The colour follows the square root of the saliency, cut at its 99th percentile, since a few patches hold most of it.

    Args:
        image: what the model saw.
        saliency: non-negative, one per patch in raster order. `n = rows * cols`.
        grid: of the panel.
    """
    top = max(float(np.quantile(saliency, 0.99)), 1e-12)
    level = np.sqrt(np.clip(saliency / top, 0, 1))
    steps = np.linspace(0, 1, len(_VIRIDIS))
    colour = np.stack([np.interp(level, steps, channel) for channel in np.array(_VIRIDIS).T], axis=-1)
    grey = np.asarray(enlarged(image, grid).convert("L"), dtype=np.float64)[..., None]
    return _picture(0.78 * grid.spread(colour) + 0.22 * grey)


def kept_tokens(image: Image.Image, kept: Sequence[int], grid: Grid) -> Image.Image:
    """The picture with the kept patches as they are and framed, all others dark and greyish.

    Args:
        image: what the model saw.
        kept: raster indices of the kept patches; -1 marks an empty slot and is skipped.
        grid: of the panel.
    """
    panel = np.asarray(enlarged(image, grid), dtype=np.float64)
    keep = np.zeros(grid.rows * grid.cols, dtype=bool)
    keep[[index for index in kept if index >= 0]] = True
    dim = 0.3 * panel.mean(axis=-1, keepdims=True) + 0.15 * panel + 20
    picture = _picture(np.where(grid.spread(keep)[..., None], panel, dim))
    _outline(picture, np.flatnonzero(keep).tolist(), grid)
    return picture


def absorption_map(
    image: Image.Image, kept: Sequence[int], assignment: Int[np.ndarray, "n"], grid: Grid
) -> Image.Image:
    """Which kept token absorbed which patch: one colour and one number per kept token, dropped patches dark.

    Each token's number stands once, on its own patch, or in its largest area where the patch itself went to another
    token. Islands of one or two patches are pale.

    Args:
        image: what the model saw.
        kept: raster indices of the kept patches, by slot.
        assignment: slot that absorbed each patch, -1 if it was dropped. `n = rows * cols`.
        grid: of the panel.
    """
    grey = np.asarray(enlarged(image, grid).convert("L"), dtype=np.float64)[..., None]
    colours = np.array([_slot_colour(slot) for slot in range(max(len(kept), 1))], dtype=np.float64)
    absorbed = assignment >= 0
    colour = grid.spread(colours[np.where(absorbed, assignment, 0)])
    areas = _areas(assignment, grid)
    strength = np.full(grid.rows * grid.cols, 0.72)
    strength[[index for area in areas if len(area) < _ISLAND and not {*area} & {*kept} for index in area]] = 0.3
    share = grid.spread(strength)[..., None]
    picture = _picture(np.where(grid.spread(absorbed)[..., None], share * colour + (1 - share) * grey, 0.3 * grey + 12))
    _borders(picture, assignment, grid)
    _outline(picture, [index for index in kept if index >= 0], grid, _PAPER)
    _number_tokens(picture, kept, assignment, areas, grid)
    return picture


def inspection(
    image: Image.Image,
    *,
    kept: Sequence[int],
    assignment: Int[np.ndarray, "n"],
    saliency: Float[np.ndarray, "n"] | None,
    shape: tuple[int, int],
    title: str,
    subtitle: str,
    footer: str,
    side: int = 384,
) -> Image.Image:
    """One picture of everything: the original, its saliency, the kept tokens, and who absorbed whom.

    Args:
        image: what the model saw.
        kept: raster indices of the kept patches, by slot.
        assignment: slot that absorbed each patch, -1 if it was dropped. `n`.
        saliency: one non-negative number per patch, or None where the encoder gives none. `n`.
        shape: (rows, cols) of the patch grid.
        title, subtitle, footer: lines of text, wrapped where needed.
        side: longer side of a panel in pixels.
    """
    grid = Grid.fit(*shape, side)
    count, total = sum(index >= 0 for index in kept), shape[0] * shape[1]
    merged = int((assignment >= 0).sum()) - count
    tiles = [Tile(enlarged(image, grid), ("What the model saw", f"{total} patches, {shape[0]} x {shape[1]}"))]
    if saliency is not None:
        caption = ("Where the encoder looks", "attention of [CLS]: violet is least, yellow is most")
        tiles.append(Tile(heat_map(image, saliency, grid), caption))
    tiles.append(Tile(kept_tokens(image, kept, grid), ("What it kept", f"{count} of {total} visual tokens, outlined")))
    fate = f"{merged} patches joined a kept token" if merged else "nothing was absorbed"
    dropped = total - count - merged
    tiles.append(
        Tile(
            absorption_map(image, kept, assignment, grid),
            ("Which token stands for which patch", f"{fate}, {dropped} dropped" if dropped else fate),
        )
    )
    return sheet([tiles], title=title, subtitle=subtitle, footer=footer)


def film(
    frames: Sequence[Image.Image],
    kept: Sequence[Sequence[int]],
    shape: tuple[int, int],
    *,
    title: str,
    subtitle: str = "",
    footer: str = "",
    side: int = 192,
    columns: int = 4,
) -> Image.Image:
    """The kept tokens of a video, or of several pictures, side by side in the order of time.

    Args:
        frames: what the model saw.
        kept: for each frame the raster indices of its kept patches.
        shape: (rows, cols) of the patch grid of a frame.
        title, subtitle, footer: lines of text, wrapped where needed.
        side: longer side of a frame in pixels.
        columns: frames in a row.
    """
    grid, total = Grid.fit(*shape, side), shape[0] * shape[1]
    tiles = [
        Tile(kept_tokens(frame, own, grid), (f"Frame {number}", f"{len(own)} of {total} visual tokens"))
        for number, (frame, own) in enumerate(zip(frames, kept, strict=True), 1)
    ]
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    return sheet(rows, title=title, subtitle=subtitle, footer=footer)


def sheet(rows: Sequence[Sequence[Tile]], *, title: str, subtitle: str = "", footer: str = "") -> Image.Image:
    """Tiles in rows on white paper under a title.

    Args:
        rows: tiles, left to right; rows may differ in length.
        title, subtitle, footer: text, wrapped to the sheet's width; empty means none.
    """
    width = max(sum(tile.image.width + _MARGIN for tile in row) for row in rows) + _MARGIN
    text = [(title, 22, _INK), (subtitle, 15, _SOFT)]
    heads = [(line, size, ink) for words, size, ink in text for line in _wrapped(words, size, width - 2 * _MARGIN)]
    feet = [(line, 13, _SOFT) for line in _wrapped(footer, 13, width - 2 * _MARGIN)]
    captions = [[_caption(tile) for tile in row] for row in rows]
    heights = [
        max(tile.image.height + 19 * len(lines) + 6 for tile, lines in zip(row, texts, strict=True)) + _MARGIN
        for row, texts in zip(rows, captions, strict=True)
    ]
    lines_height = sum(round(size * 1.4) for _, size, _ in heads + feet)
    page = Image.new("RGB", (width, lines_height + sum(heights) + 2 * _MARGIN + (8 if heads else 0)), _PAPER)
    draw = ImageDraw.Draw(page)
    top = _lines(draw, heads, _MARGIN) + (8 if heads else 0)
    for row, texts, height in zip(rows, captions, heights, strict=True):
        left = _MARGIN
        for tile, caption in zip(row, texts, strict=True):
            page.paste(tile.image, (left, top))
            right, bottom = left + tile.image.width, top + tile.image.height
            if tile.correct is not None:
                frame = (left - 4, top - 4, right + 3, bottom + 3)
                draw.rectangle(frame, outline=RIGHT if tile.correct else WRONG, width=4)
            for number, (line, ink) in enumerate(caption):
                draw.text((left, bottom + 6 + 19 * number), line, ink, _font(14))
            left = right + _MARGIN
        top += height
    _lines(draw, feet, top)
    return page


def _caption(tile: Tile) -> list[tuple[str, tuple[int, int, int]]]:
    return [
        (line, _SOFT if number else _INK)
        for number, words in enumerate(tile.caption)
        for line in _wrapped(words, 14, tile.image.width)
    ]


def _picture(values: Float[np.ndarray, "h w 3"]) -> Image.Image:
    pixels: UInt8[np.ndarray, "h w 3"] = np.clip(np.round(values), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def _slot_colour(slot: int) -> tuple[int, int, int]:
    tint = _TINTS[slot // len(_HUES) % len(_TINTS)]
    goal = 255 if tint > 0 else 0
    red, green, blue = (round(c + abs(tint) * (goal - c)) for c in _HUES[slot % len(_HUES)])
    return red, green, blue


def _outline(picture: Image.Image, indices: Sequence[int], grid: Grid, ink: tuple[int, int, int] = _FRAME) -> None:
    # A light frame inside a black one of the same width shows on any ground, yellow and white included. It lies around
    # the patch, and no frame covers a kept patch.
    boxes = [grid.box(index) for index in indices]
    patches = [picture.crop((left, top, right + 1, bottom + 1)) for left, top, right, bottom in boxes]
    draw = ImageDraw.Draw(picture)
    width = 2 if grid.cell >= 12 else 1
    for reach, colour in ((2 * width, (0, 0, 0)), (width, ink)):
        for left, top, right, bottom in boxes:
            draw.rectangle((left - reach, top - reach, right + reach, bottom + reach), fill=colour)
    for (left, top, _, _), patch in zip(boxes, patches, strict=True):
        picture.paste(patch, (left, top))


def _borders(picture: Image.Image, assignment: Int[np.ndarray, "n"], grid: Grid) -> None:
    if grid.cell < 6:
        return
    slots = assignment.reshape(grid.rows, grid.cols)
    draw = ImageDraw.Draw(picture)
    for row, col in np.argwhere(slots[:, 1:] != slots[:, :-1]).tolist():
        x = (col + 1) * grid.cell
        draw.line((x, row * grid.cell, x, (row + 1) * grid.cell), _PAPER)
    for row, col in np.argwhere(slots[1:] != slots[:-1]).tolist():
        y = (row + 1) * grid.cell
        draw.line((col * grid.cell, y, (col + 1) * grid.cell, y), _PAPER)


def _number_tokens(
    picture: Image.Image,
    kept: Sequence[int],
    assignment: Int[np.ndarray, "n"],
    areas: Sequence[Sequence[int]],
    grid: Grid,
) -> None:
    if grid.cell < 11:
        return
    draw = ImageDraw.Draw(picture)
    largest: dict[int, Sequence[int]] = {}
    for area in sorted(areas, key=len):
        largest[int(assignment[area[0]])] = area
    for slot, area in largest.items():
        rows, cols = np.divmod(np.array(area), grid.cols)
        middle = area[int(np.argmin((rows - rows.mean()) ** 2 + (cols - cols.mean()) ** 2))]
        home = kept[slot] if slot < len(kept) else -1
        left, top, right, bottom = grid.box(home if home >= 0 and assignment[home] == slot else middle)
        draw.text(
            ((left + right) / 2 + 0.5, (top + bottom) / 2 + 0.5),
            str(slot + 1),
            fill=_PAPER,
            font=_font(max(9, round(grid.cell * 0.62))),
            anchor="mm",
            stroke_width=1,
            stroke_fill=(0, 0, 0),
        )


def _areas(assignment: Int[np.ndarray, "n"], grid: Grid) -> list[list[int]]:
    """Connected areas of one slot as lists of raster indices; dropped patches form none."""
    slots = assignment.tolist()
    seen = [slot < 0 for slot in slots]
    areas = []
    for start in range(len(slots)):
        if seen[start]:
            continue
        seen[start], area, front = True, [], [start]
        while front:
            index = front.pop()
            area.append(index)
            row, col = divmod(index, grid.cols)
            for r, c in ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)):
                near = r * grid.cols + c
                if 0 <= r < grid.rows and 0 <= c < grid.cols and not seen[near] and slots[near] == slots[index]:
                    seen[near] = True
                    front.append(near)
        areas.append(sorted(area))
    return areas


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrapped(text: str, size: int, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and _font(size).getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(_cut(line, size, width))
    return lines


def _cut(text: str, size: int, width: int) -> str:
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _lines(draw: ImageDraw.ImageDraw, lines: Sequence[tuple[str, int, tuple[int, int, int]]], top: int) -> int:
    for line, size, ink in lines:
        draw.text((_MARGIN, top), line, ink, _font(size))
        top += round(size * 1.4)
    return top
