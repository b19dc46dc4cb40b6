"""A procedural visual-question world: pictures of tinted sprites and one sign, with questions in seven tasks.

Everything is drawn from a seed at run time; the same seed gives the same bytes in every process. Objects lie on a grid
of patches, 24 x 24 unless a larger picture is asked for. The tasks follow the benchmarks that visual-token pruning is
measured on: existence (POPE), attribute and relation (GQA), counting and position (MME), reading (TextVQA), choice
(ScienceQA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ASSETS = Path(__file__).parent / "assets"

PATCH = 8
"""Pixels per patch side."""
GRID = 24
"""Patches per image side: 576 visual tokens."""
SPRITE_SIZES = (24, 32)
"""Pixels; 3 or 4 patches."""
SIGN_SIZE = (48, 16)
"""Pixels, width and height; 6 x 2 patches."""

CLASSES = tuple(
    str.split(
        "cat dog fish bird car tree house apple star heart moon bell key book cup umbrella mushroom rocket guitar "
        "clock crown boat butterfly anchor"
    )
)
COLORS = {
    "red": (225, 45, 45),
    "yellow": (245, 215, 50),
    "green": (50, 180, 70),
    "blue": (60, 100, 240),
    "purple": (180, 70, 215),
    "white": (245, 245, 245),
}
WORDS = tuple(str.split("open exit stop taxi cafe bank park shop bus gym zoo news sale food post milk"))
NUMBERS = ("one", "two", "three", "four")
QUADRANTS = ("upper-left", "upper-right", "lower-left", "lower-right")
LETTERS = ("a", "b", "c", "d")
TASKS = ("existence", "attribute", "relation", "counting", "position", "reading", "choice")

Difficulty = Literal["standard", "crowded"]
OBJECT_COUNTS: dict[str, tuple[int, int]] = {"standard": (4, 7), "crowded": (9, 13)}
"""Fewest and most objects of a picture."""

RELATION_MARGIN = 4
"""Patches by which the centres of two related objects differ at least, so that the answer is beyond doubt."""
POSITION_MARGIN = 1.5
"""Patches by which an object's centre is away from the middle lines, for the same reason."""


@dataclass(frozen=True)
class SceneObject:
    """One sprite: its class, its tint, and the square of patches that it covers."""

    name: str
    color: str
    row: int
    col: int
    size: int
    """Side of the square, in patches."""

    @property
    def center(self) -> tuple[float, float]:
        """(row, col) in patches."""
        return self.row + self.size / 2, self.col + self.size / 2


@dataclass(frozen=True)
class Question:
    """A question with its one-word answer; `objects` are indices of the scene's objects that it names."""

    task: str
    text: str
    answer: str
    objects: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scene:
    """A picture, what is in it, and what is asked about it."""

    seed: int
    objects: tuple[SceneObject, ...]
    word: str
    """What the sign says."""
    sign: tuple[int, int]
    """(row, col) of the sign's first patch."""
    questions: tuple[Question, ...]
    grid: int = GRID
    """Patches per side of the picture."""

    @cached_property
    def image(self) -> NDArray[np.uint8]:
        """The picture, painted when it is first looked at; `grid * PATCH` pixels a side. `192 192 3`."""
        rng = np.random.default_rng((self.seed, self.grid, len(self.objects)))
        return _paint(rng, self.objects, self.sign, self.word, self.grid)

    def patches(self, index: int) -> NDArray[np.bool_]:
        """Which patches object `index` covers. `grid grid`."""
        covered = np.zeros((self.grid, self.grid), dtype=bool)
        o = self.objects[index]
        covered[o.row : o.row + o.size, o.col : o.col + o.size] = True
        return covered

    def sign_patches(self) -> NDArray[np.bool_]:
        """Which patches the sign covers. `grid grid`."""
        covered = np.zeros((self.grid, self.grid), dtype=bool)
        row, col = self.sign
        covered[row : row + SIGN_SIZE[1] // PATCH, col : col + SIGN_SIZE[0] // PATCH] = True
        return covered


def make_scene(seed: int, difficulty: Difficulty = "standard", grid: int = GRID) -> Scene:
    """Draws the scene of a seed: picture, objects, sign and 14 questions, two a task.

    Args:
        seed: of everything.
        difficulty: how many objects there are.
        grid: patches per side of the picture; what is in it stays as large as it is.

    Raises:
        KeyError: an unknown difficulty.
    """
    fewest, most = OBJECT_COUNTS[difficulty]
    rng = np.random.default_rng((seed, fewest) if grid == GRID else (seed, fewest, grid))
    while True:
        layout = _layout(rng, int(rng.integers(fewest, most + 1)), grid, singles=2)
        if layout is None:
            continue
        objects, sign = layout
        word = str(rng.choice(WORDS))
        questions = _questions(rng, objects, word, grid)
        if questions is not None:
            return Scene(seed, objects, word, sign, questions, grid)


def make_small_picture(seed: int, grid: int = 12) -> Scene:
    """A picture of fewer patches without questions, for warming up a vision encoder cheaply."""
    rng = np.random.default_rng((seed, grid, 0))
    while True:
        layout = _layout(rng, int(rng.integers(2, 6)), grid, singles=0)
        if layout is not None:
            objects, sign = layout
            word = str(rng.choice(WORDS))
            return Scene(seed, objects, word, sign, (), grid)


def _layout(
    rng: np.random.Generator, count: int, grid: int, singles: int
) -> tuple[tuple[SceneObject, ...], tuple[int, int]] | None:
    """Places `count` objects and the sign without overlap; None if they did not fit."""
    names = _names(rng, count, singles)
    free = np.ones((grid, grid), dtype=bool)

    def place(height: int, width: int) -> tuple[int, int] | None:
        for _ in range(60):
            row, col = int(rng.integers(grid - height + 1)), int(rng.integers(grid - width + 1))
            if free[row : row + height, col : col + width].all():
                free[row : row + height, col : col + width] = False
                return row, col
        return None

    sign = place(SIGN_SIZE[1] // PATCH, SIGN_SIZE[0] // PATCH)
    if sign is None:
        return None
    objects = []
    for name in names:
        size = int(rng.choice(SPRITE_SIZES)) // PATCH
        spot = place(size, size)
        if spot is None:
            return None
        objects.append(SceneObject(name, str(rng.choice(list(COLORS))), *spot, size))
    return tuple(objects), sign


def _names(rng: np.random.Generator, count: int, singles: int) -> list[str]:
    """Two classes that may repeat up to four times, the rest once each; `singles` classes occur once for sure."""
    first = int(rng.integers(1, max(1, min(4, count - singles)) + 1))
    second = int(rng.integers(1, max(1, min(4, count - singles - first)) + 1)) if first < count else 0
    copies = [first, second] + [1] * (count - first - second)
    classes = rng.permutation(CLASSES)
    return [str(classes[i]) for i, times in enumerate(copies) for _ in range(times)]


def _questions(
    rng: np.random.Generator, objects: tuple[SceneObject, ...], word: str, grid: int
) -> tuple[Question, ...] | None:
    """Two questions a task; None if this layout does not allow one without doubt."""
    where: dict[str, list[int]] = {}
    for i, o in enumerate(objects):
        where.setdefault(o.name, []).append(i)
    single = [indices[0] for indices in where.values() if len(indices) == 1]
    absent = [name for name in CLASSES if name not in where]
    present = list(where)
    clear = [i for i in single if all(abs(c - grid / 2) >= POSITION_MARGIN for c in objects[i].center)]
    pairs = [
        (i, j, axis)
        for i in single
        for j in single
        for axis in (0, 1)
        if i != j and abs(objects[i].center[axis] - objects[j].center[axis]) >= RELATION_MARGIN
    ]
    if len(single) < 2 or len(clear) < 2 or len(pairs) < 2:
        return None

    def pick(options: Sequence[Any], k: int) -> list[Any]:  # without replacement
        return [options[i] for i in rng.permutation(len(options))[:k]]

    def yes_no(yes: bool) -> str:
        return "yes" if yes else "no"

    def options(answer: str, others: Sequence[str]) -> tuple[str, str]:
        letter = int(rng.integers(4))
        words = pick([w for w in others if w != answer], 3)
        words.insert(letter, answer)
        return " ".join(f"{a} {w}" for a, w in zip(LETTERS, words, strict=True)), LETTERS[letter]

    questions: list[Question] = []

    for there in rng.permutation([True, False]) if rng.random() < 0.5 else rng.random(2) < 0.5:
        name = pick(present if there else absent, 1)[0]
        questions.append(
            Question(
                "existence", f"is there a {name} in the picture ?", yes_no(bool(there)), tuple(where.get(name, ()))
            )
        )

    i, j = pick(single, 2)
    questions.append(Question("attribute", f"what color is the {objects[i].name} ?", objects[i].color, (i,)))
    color = objects[j].color if rng.random() < 0.5 else str(rng.choice([c for c in COLORS if c != objects[j].color]))
    questions.append(
        Question("attribute", f"is the {objects[j].name} {color} ?", yes_no(color == objects[j].color), (j,))
    )

    for i, j, axis in pick(pairs, 2):
        before = objects[i].center[axis] < objects[j].center[axis]
        asks_before = bool(rng.random() < 0.5)
        relation = (("above", "left of") if asks_before else ("below", "right of"))[axis]
        text = f"is the {objects[i].name} {relation} the {objects[j].name} ?"
        questions.append(Question("relation", text, yes_no(before == asks_before), (i, j)))

    for name in present[:2]:
        text = f"how many {name} objects are there ?"
        questions.append(Question("counting", text, NUMBERS[len(where[name]) - 1], tuple(where[name])))

    for i in pick(clear, 2):
        row, col = objects[i].center
        quadrant = QUADRANTS[2 * (row > grid / 2) + (col > grid / 2)]
        questions.append(Question("position", f"where is the {objects[i].name} ?", quadrant, (i,)))

    questions.append(Question("reading", "what does the sign say ?", word))
    shown = word if rng.random() < 0.5 else str(rng.choice([w for w in WORDS if w != word]))
    questions.append(Question("reading", f"does the sign say {shown} ?", yes_no(shown == word)))

    name = pick(present, 1)[0]
    text, letter = options(name, absent)
    questions.append(Question("choice", f"which one is in the picture ? {text}", letter, tuple(where[name])))
    i = pick(single, 1)[0]
    text, letter = options(objects[i].color, list(COLORS))
    questions.append(Question("choice", f"what color is the {objects[i].name} ? {text}", letter, (i,)))
    return tuple(questions)


def _paint(
    rng: np.random.Generator, objects: tuple[SceneObject, ...], sign: tuple[int, int], word: str, grid: int
) -> NDArray[np.uint8]:
    canvas = _background(rng, grid * PATCH)
    sprites = _sprites()
    for o in objects:
        luminance, alpha = sprites[o.size * PATCH][CLASSES.index(o.name)]
        light = rng.uniform(0.9, 1.1)
        tint = np.asarray(COLORS[o.color], dtype=np.float32) * (light * (0.25 + 0.75 * luminance))[..., None]
        y, x, side = o.row * PATCH, o.col * PATCH, o.size * PATCH
        window = canvas[y : y + side, x : x + side]
        window += alpha[..., None] * (tint - window)
    dark, bright = rng.uniform(15, 50, 3), rng.uniform(200, 250, 3)
    ink, board = (dark, bright) if rng.random() < 0.5 else (bright, dark)
    y, x = sign[0] * PATCH, sign[1] * PATCH
    letters = _signs()[WORDS.index(word)][..., None]
    canvas[y : y + SIGN_SIZE[1], x : x + SIGN_SIZE[0]] = board + letters * (ink - board)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * 4
    return canvas.clip(0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, side: int) -> NDArray[np.float32]:
    """A muted two-tone pattern: waves along a random direction at a random scale."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(10, 90), rng.uniform(0, 2 * np.pi)
    wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * (2 * np.pi / period) + phase)
    if rng.random() < 0.5:
        wave = wave * np.sin((np.sin(angle) * x - np.cos(angle) * y) * (2 * np.pi / period))
    first, second = rng.uniform(50, 150, (2, 3))
    second = first + (second - first) * 0.4
    return (first + (second - first) * ((wave + 1) / 2)[..., None]).astype(np.float32)


@cache
def _sprites() -> dict[int, list[tuple[NDArray[np.float32], NDArray[np.float32]]]]:
    """Pixel size -> (luminance, alpha) in 0..1 of every class."""
    sheets = {}
    for size in SPRITE_SIZES:
        sheet = np.asarray(Image.open(ASSETS / f"sprites-{size}.png"), dtype=np.float32) / np.float32(255)
        cells = [sheet[:, i * size : (i + 1) * size] for i in range(len(CLASSES))]
        sheets[size] = [(cell[..., 0], cell[..., 1]) for cell in cells]
    return sheets


@cache
def _signs() -> NDArray[np.float32]:
    """Letter coverage in 0..1 of every word's board. `words height width`."""
    boards = np.asarray(Image.open(ASSETS / "signs.png"), dtype=np.float32) / np.float32(255)
    return boards.reshape(len(WORDS), SIGN_SIZE[1], SIGN_SIZE[0])
