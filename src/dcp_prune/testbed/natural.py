"""The natural world: photographs with shaded things and a sign on them, asked about in nine tasks.

The first world (`world.py`) puts flat sprites on patch borders, which suits a vision encoder that was trained on them.
Here things have 2 to 9 patches a side, lie at any pixel, are turned, lit and partly covered, as a pretrained encoder
knows them. The tasks are those of the first world and two more: size and scene. Everything is drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dcp_prune.testbed.world import COLORS, LETTERS, QUADRANTS, Question

ASSETS = Path(__file__).parent / "assets" / "natural"

PATCH = 14
"""Pixels per patch side."""
GRID = 24
"""Patches per image side: 576 visual tokens."""
SPRITE = 128
"""Pixels of a thing's square in the sheets; it is painted smaller."""
SIGN_SIZE = (112, 42)
"""Pixels of a sign, width and height: 8 x 3 patches."""
BACKGROUND_SIDE = 448
"""Pixels of a photograph; a picture shows a part of it."""

CLASSES = tuple(
    str.split(
        "cat dog fish bird horse cow pig elephant rabbit turtle snail butterfly bee crab octopus whale penguin "
        "duck frog car bus bicycle boat rocket airplane train tractor house tree cactus mushroom flower apple "
        "banana strawberry pineapple carrot pizza burger cake cheese cup key bell book clock lamp umbrella crown "
        "hat shoe shirt guitar drum trumpet camera phone scissors hammer anchor chair heart star moon"
    )
)
DISTRACTORS = tuple(
    str.split(
        "globe soccer basketball teddy pumpkin snowman robot ghost dice trophy magnet watermelon grapes donut cookie "
        "popcorn backpack broom compass microscope telescope palette unicorn gift"
    )
)
"""Things in their own colours that nobody asks about."""
WORDS = tuple(str.split("open exit stop taxi cafe bank park shop sale food post milk"))
SCENES = tuple(str.split("brick grass gravel stars coffee fur person launch"))
NUMBERS = ("one", "two", "three")
TASKS = ("existence", "attribute", "relation", "counting", "position", "reading", "choice", "size", "scene")

Difficulty = Literal["standard", "crowded", "cluttered"]


@dataclass(frozen=True)
class Level:
    """How full a picture is.

    Attributes:
        things: fewest and most of those that are asked about.
        distractors: fewest and most of the others.
        sizes: pixels of the smallest and the largest thing.
    """

    things: tuple[int, int]
    distractors: tuple[int, int]
    sizes: tuple[int, int]


LEVELS: dict[str, Level] = {
    "standard": Level((4, 6), (0, 2), (42, 122)),
    "crowded": Level((8, 11), (1, 3), (34, 92)),
    "cluttered": Level((9, 12), (7, 10), (28, 76)),
}

RELATION_MARGIN = 4 * PATCH
"""Pixels by which the centres of two related things differ at least, so that the answer is beyond doubt."""
POSITION_MARGIN = 2 * PATCH
"""Pixels by which a thing's centre is away from the middle lines, for the same reason."""
SIZE_MARGIN = 1.4
"""How many times as large as the other the larger of two compared things is at least."""
VISIBLE = 0.7
"""Share of a thing's square that other things leave free."""


@dataclass(frozen=True)
class Thing:
    """One thing: what it is, its tint, and the square of pixels that it is painted into."""

    name: str
    color: str
    """A word of `COLORS`; empty for a distractor, which has its own."""
    y: int
    x: int
    size: int
    """Side of the square, in pixels."""

    @property
    def center(self) -> tuple[float, float]:
        """(y, x) in pixels."""
        return self.y + self.size / 2, self.x + self.size / 2


@dataclass(frozen=True)
class NaturalScene:
    """A picture, what is in it, and what is asked about it."""

    seed: int
    objects: tuple[Thing, ...]
    distractors: tuple[Thing, ...]
    background: str
    """Which photograph it shows, of `SCENES`."""
    word: str
    """What the sign says."""
    sign: tuple[int, int]
    """(y, x) of the sign's first pixel."""
    questions: tuple[Question, ...]
    grid: int = GRID
    """Patches per side of the picture."""

    @property
    def image(self) -> NDArray[np.uint8]:
        """The picture, painted when it is first looked at; `grid * PATCH` pixels a side. `336 336 3`."""
        return self.painted[0]

    @cached_property
    def painted(self) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
        """The picture, and what each pixel shows: an object's index, `len(objects)` for the sign, -1 for neither."""
        return _paint(self)

    def patches(self, index: int) -> NDArray[np.bool_]:
        """Patches of which object `index` covers a third or more, or its best patch if there is none. `grid grid`."""
        shares = self.shares(index)
        return (shares >= 1 / 3) | ((shares == shares.max()) & (shares > 0))

    def sign_patches(self) -> NDArray[np.bool_]:
        """Which patches the sign covers by a third or more. `grid grid`."""
        return self.shares(len(self.objects)) >= 1 / 3

    def shares(self, index: int) -> NDArray[np.float64]:
        """Share of each patch that shows this; `index` as in `painted`. `grid grid`."""
        shown = (self.painted[1] == index).reshape(self.grid, PATCH, self.grid, PATCH)
        return shown.mean(axis=(1, 3))


def make_scene(seed: int, difficulty: Difficulty = "standard", grid: int = GRID) -> NaturalScene:
    """Draws the scene of a seed: picture, things and 18 questions, two a task.

    Args:
        seed: of everything.
        difficulty: how many things there are, how small, and how many distractors lie between them.
        grid: patches per side of the picture; what is in it stays as large as it is.

    Raises:
        KeyError: an unknown difficulty.
    """
    level = LEVELS[difficulty]
    rng = np.random.default_rng((seed, list(LEVELS).index(difficulty), grid))
    while True:
        layout = _layout(rng, level, grid * PATCH)
        if layout is None:
            continue
        objects, distractors, sign = layout
        word, background = str(rng.choice(WORDS)), str(rng.choice(SCENES))
        questions = _questions(rng, objects, word, background, grid * PATCH)
        if questions is not None:
            return NaturalScene(seed, objects, distractors, background, word, sign, questions, grid)


def ask_anew(scene: NaturalScene, rng: np.random.Generator) -> NaturalScene:
    """The same picture with other questions about it, so that training does not learn answers by heart."""
    questions = _questions(rng, scene.objects, scene.word, scene.background, scene.grid * PATCH)
    assert questions is not None  # that there is something to ask depends on the picture alone
    return replace(scene, questions=questions)


CELL = 7
"""Pixels of the cells in which covering is counted while things are placed."""


def _layout(
    rng: np.random.Generator, level: Level, side: int
) -> tuple[tuple[Thing, ...], tuple[Thing, ...], tuple[int, int]] | None:
    """Places the things so that each keeps `VISIBLE` of its square; None if they did not fit."""
    cells = side // CELL
    owner = np.full((cells, cells), -1)
    areas: list[int] = []

    def place(height: int, width: int, alone: bool = False) -> tuple[int, int] | None:
        for _ in range(50):
            y, x = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
            window = owner[y // CELL : -(-(y + height) // CELL), x // CELL : -(-(x + width) // CELL)]
            if alone and (window >= 0).any():
                continue
            covered, counts = np.unique(window[window >= 0], return_counts=True)
            left = {int(i): int((owner == i).sum()) - int(n) for i, n in zip(covered, counts, strict=True)}
            if all(free >= VISIBLE * areas[i] for i, free in left.items()):
                window[:] = len(areas)
                areas.append(window.size)
                return y, x
        return None

    def things(names: Sequence[str], colors: Sequence[str]) -> tuple[Thing, ...] | None:
        placed = []
        for name in names:
            size = int(rng.integers(level.sizes[0], level.sizes[1] + 1))
            spot = place(size, size)
            if spot is None:
                return None
            placed.append(Thing(name, str(rng.choice(colors)), *spot, size))
        return tuple(placed)

    count = int(rng.integers(level.distractors[0], level.distractors[1] + 1))
    distractors = things([str(rng.choice(DISTRACTORS)) for _ in range(count)], [""])
    if distractors is None:
        return None
    objects = things(_names(rng, int(rng.integers(level.things[0], level.things[1] + 1))), list(COLORS))
    sign = place(SIGN_SIZE[1], SIGN_SIZE[0])
    return None if objects is None or sign is None else (objects, distractors, sign)


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Two classes that may repeat up to three times, the rest once each; two classes occur once for sure."""
    first = int(rng.integers(1, max(1, min(3, count - 2)) + 1))
    second = int(rng.integers(1, max(1, min(3, count - 2 - first)) + 1))
    copies = [first, second] + [1] * (count - first - second)
    classes = rng.permutation(CLASSES)
    return [str(classes[i]) for i, times in enumerate(copies) for _ in range(times)]


def _questions(
    rng: np.random.Generator, objects: tuple[Thing, ...], word: str, background: str, side: int
) -> tuple[Question, ...] | None:
    """Two questions a task; None if this layout does not allow one without doubt."""
    where: dict[str, list[int]] = {}
    for i, o in enumerate(objects):
        where.setdefault(o.name, []).append(i)
    single = [indices[0] for indices in where.values() if len(indices) == 1]
    absent = [name for name in CLASSES if name not in where]
    present = list(where)
    clear = [i for i in single if all(abs(c - side / 2) >= POSITION_MARGIN for c in objects[i].center)]
    pairs = [
        (i, j, axis)
        for i in single
        for j in single
        for axis in (0, 1)
        if i != j and abs(objects[i].center[axis] - objects[j].center[axis]) >= RELATION_MARGIN
    ]
    sizes = [
        (i, j)
        for i in single
        for j in single
        if max(objects[i].size, objects[j].size) >= SIZE_MARGIN * min(objects[i].size, objects[j].size)
    ]
    if len(single) < 2 or len(clear) < 2 or len(pairs) < 2 or len(sizes) < 2:
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

    def or_another(truth: str, words: Sequence[str]) -> str:
        return truth if rng.random() < 0.5 else str(rng.choice([w for w in words if w != truth]))

    questions: list[Question] = []

    for there in rng.random(2) < 0.5:
        name = pick(present if there else absent, 1)[0]
        text = f"is there a {name} in the picture ?"
        questions.append(Question("existence", text, yes_no(bool(there)), tuple(where.get(name, ()))))

    i, j = pick(single, 2)
    questions.append(Question("attribute", f"what color is the {objects[i].name} ?", objects[i].color, (i,)))
    color = or_another(objects[j].color, list(COLORS))
    text = f"is the {objects[j].name} {color} ?"
    questions.append(Question("attribute", text, yes_no(color == objects[j].color), (j,)))

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
        y, x = objects[i].center
        quadrant = QUADRANTS[2 * (y > side / 2) + (x > side / 2)]
        questions.append(Question("position", f"where is the {objects[i].name} ?", quadrant, (i,)))

    questions.append(Question("reading", "what does the sign say ?", word))
    shown = or_another(word, WORDS)
    questions.append(Question("reading", f"does the sign say {shown} ?", yes_no(shown == word)))

    name = pick(present, 1)[0]
    text, letter = options(name, absent)
    questions.append(Question("choice", f"which one is in the picture ? {text}", letter, tuple(where[name])))
    i = pick(single, 1)[0]
    text, letter = options(objects[i].color, list(COLORS))
    questions.append(Question("choice", f"what color is the {objects[i].name} ? {text}", letter, (i,)))

    for i, j in pick(sizes, 2):
        larger = objects[i].size > objects[j].size
        asks_larger = bool(rng.random() < 0.5)
        text = f"is the {objects[i].name} {'larger' if asks_larger else 'smaller'} than the {objects[j].name} ?"
        questions.append(Question("size", text, yes_no(larger == asks_larger), (i, j)))

    questions.append(Question("scene", "what is the background ?", background))
    shown = or_another(background, SCENES)
    questions.append(Question("scene", f"is the background {shown} ?", yes_no(shown == background)))
    return tuple(questions)


def _paint(scene: NaturalScene) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    side = scene.grid * PATCH
    rng = np.random.default_rng((scene.seed, side, len(scene.objects), len(scene.distractors)))
    canvas = _background(rng, scene.background, side)
    owner = np.full((side, side), -1, dtype=np.int16)
    light = rng.uniform(-0.2, 0.2, 2)  # falls off along y and x, on everything alike
    for index, thing in enumerate((*scene.distractors, *scene.objects)):
        size, y, x = thing.size, thing.y, thing.x
        sheet, names = (_sheet("things"), CLASSES) if thing.color else (_sheet("distractors"), DISTRACTORS)
        turned = sheet[names.index(thing.name)].rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC)
        pixels = np.asarray(turned.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255
        ramp = np.linspace(-1, 1, size, dtype=np.float32)
        shade = rng.uniform(0.85, 1.05) * (1 + light[0] * ramp[:, None] + light[1] * ramp[None])
        alpha = pixels[..., -1:]
        tint = np.asarray(COLORS[thing.color], dtype=np.float32) if thing.color else np.float32(255)
        paint = tint * pixels[..., :-1] * shade[..., None].astype(np.float32)
        drop = max(2, size // 20)  # a soft shadow, so that a thing lies on what is behind it
        below = canvas[y + drop : y + drop + size, x + drop : x + drop + size]
        below *= 1 - 0.35 * alpha[: below.shape[0], : below.shape[1]]
        window = canvas[y : y + size, x : x + size]
        window += alpha * (paint - window)
        owner[y : y + size, x : x + size][alpha[..., 0] > 0.5] = max(index - len(scene.distractors), -1)
    dark, bright = rng.uniform(10, 60, 3), rng.uniform(200, 250, 3)
    ink, board = (dark, bright) if rng.random() < 0.5 else (bright, dark)
    y, x = scene.sign
    letters = _signs()[WORDS.index(scene.word)][..., None]
    canvas[y : y + SIGN_SIZE[1], x : x + SIGN_SIZE[0]] = board + letters * (ink - board)
    owner[y : y + SIGN_SIZE[1], x : x + SIGN_SIZE[0]] = len(scene.objects)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * 3
    return canvas.clip(0, 255).astype(np.uint8), owner


def _background(rng: np.random.Generator, name: str, side: int) -> NDArray[np.float32]:
    """A part of the photograph, perhaps mirrored, lighter or darker."""
    photograph = _photograph(name)
    part = int(rng.integers(300, BACKGROUND_SIDE + 1))
    y, x = rng.integers(BACKGROUND_SIDE - part + 1, size=2)
    image = photograph.crop((x, y, x + part, y + part)).resize((side, side), Image.Resampling.BILINEAR)
    canvas = np.asarray(image, dtype=np.float32) * np.float32(rng.uniform(0.7, 1.1))
    return canvas[:, ::-1].copy() if rng.random() < 0.5 else canvas


@cache
def _photograph(name: str) -> Image.Image:
    with Image.open(ASSETS / f"{name}.jpg") as image:
        return image.convert("RGB")


@cache
def _sheet(name: str) -> list[Image.Image]:
    """A square for each thing of the sheet: shading and alpha, or colours and alpha."""
    with Image.open(ASSETS / f"{name}.png") as sheet:
        return [
            sheet.crop((left, top, left + SPRITE, top + SPRITE))
            for top in range(0, sheet.height, SPRITE)
            for left in range(0, sheet.width, SPRITE)
        ]


@cache
def _signs() -> NDArray[np.float32]:
    """Letter coverage in 0..1 of every word's board. `words height width`."""
    boards = np.asarray(Image.open(ASSETS / "signs.png"), dtype=np.float32) / np.float32(255)
    return boards.reshape(len(WORDS), SIGN_SIZE[1], SIGN_SIZE[0])
