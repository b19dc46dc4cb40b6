"""Makes the pictures that the natural world is painted from, out of two packages that anyone can fetch.

usage: npm pack @lobehub/fluent-emoji-3d@1.1.0; tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
       pip download --no-deps scikit-image==0.26.0; unzip scikit_image*.whl
       python tools/make_natural_assets.py package/assets skimage/data
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dcp_prune.testbed.natural import ASSETS, BACKGROUND_SIDE, CLASSES, DISTRACTORS, SIGN_SIZE, SPRITE, WORDS

THINGS = dict(
    pair.split(":")
    for pair in str.split(
        "cat:1f408 dog:1f415 fish:1f41f bird:1f426 horse:1f40e cow:1f404 pig:1f416 elephant:1f418 rabbit:1f407 "
        "turtle:1f422 snail:1f40c butterfly:1f98b bee:1f41d crab:1f980 octopus:1f419 whale:1f40b penguin:1f427 "
        "duck:1f986 frog:1f438 car:1f697 bus:1f68c bicycle:1f6b2 boat:26f5 rocket:1f680 airplane:2708-fe0f "
        "train:1f682 tractor:1f69c house:1f3e0 tree:1f333 cactus:1f335 mushroom:1f344 flower:1f33b apple:1f34e "
        "banana:1f34c strawberry:1f353 pineapple:1f34d carrot:1f955 pizza:1f355 burger:1f354 cake:1f382 cheese:1f9c0 "
        "cup:2615 key:1f511 bell:1f514 book:1f4d5 clock:23f0 lamp:1f4a1 umbrella:2602-fe0f crown:1f451 hat:1f3a9 "
        "shoe:1f45f shirt:1f455 guitar:1f3b8 drum:1f941 trumpet:1f3ba camera:1f4f7 phone:260e-fe0f "
        "scissors:2702-fe0f hammer:1f528 anchor:2693 chair:1fa91 heart:2764-fe0f star:2b50 moon:1f319 "
        "globe:1f30d soccer:26bd basketball:1f3c0 teddy:1f9f8 pumpkin:1f383 snowman:26c4 robot:1f916 ghost:1f47b "
        "dice:1f3b2 trophy:1f3c6 magnet:1f9f2 watermelon:1f349 grapes:1f347 donut:1f369 cookie:1f36a popcorn:1f37f "
        "backpack:1f392 broom:1f9f9 compass:1f9ed microscope:1f52c telescope:1f52d palette:1f3a8 unicorn:1f984 "
        "gift:1f381"
    )
)
"""What a thing is called here: the file's name in the package."""

PHOTOGRAPHS = {
    "brick": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "stars": "hubble_deep_field.jpg",
    "coffee": "coffee.png",
    "fur": "chelsea.png",
    "person": "astronaut.png",
    "launch": "rocket.jpg",
}


def sprite(file: Path) -> Image.Image:
    """The thing, cut out, in the middle of a square."""
    image = Image.open(file).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 20)).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)


def shading(image: Image.Image) -> Image.Image:
    """Light and shade without the colour, stretched so that a tint shows: grey and alpha."""
    grey, alpha = image.convert("LA").split()
    levels = np.asarray(grey, dtype=np.float32)
    inside = levels[np.asarray(alpha) > 128]
    low, high = np.percentile(inside, (3, 90))
    stretched = np.clip(40 + (levels - low) / max(high - low, 40) * 215, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(stretched), alpha))


def main() -> None:
    emoji, photographs = map(Path, sys.argv[1:])
    ASSETS.mkdir(parents=True, exist_ok=True)
    for name, mode, things in (("things", "LA", CLASSES), ("distractors", "RGBA", DISTRACTORS)):
        sheet = Image.new(mode, (8 * SPRITE, len(things) // 8 * SPRITE))
        for i, thing in enumerate(things):
            cell = sprite(emoji / f"{THINGS[thing]}.webp")
            sheet.paste(shading(cell) if mode == "LA" else cell, (i % 8 * SPRITE, i // 8 * SPRITE))
        sheet.save(ASSETS / f"{name}.png", optimize=True)
    font = ImageFont.truetype("DejaVuSans-Bold.ttf", 34)
    boards = Image.new("L", (SIGN_SIZE[0], SIGN_SIZE[1] * len(WORDS)))
    for i, word in enumerate(WORDS):
        board = Image.new("L", (SIGN_SIZE[0] + 40, SIGN_SIZE[1]))
        ImageDraw.Draw(board).text((board.width / 2, SIGN_SIZE[1] / 2), word.upper(), 255, font, anchor="mm")
        left, _, right, _ = board.getbbox()
        space = SIGN_SIZE[0] - 12
        board = board.crop((left, 0, right, SIGN_SIZE[1])).resize((space, SIGN_SIZE[1]), Image.Resampling.LANCZOS)
        boards.paste(board, (6, i * SIGN_SIZE[1]))
    boards.save(ASSETS / "signs.png", optimize=True)
    for name, file in PHOTOGRAPHS.items():
        image = Image.open(photographs / file).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        square.resize((BACKGROUND_SIDE, BACKGROUND_SIDE), Image.Resampling.LANCZOS).save(
            ASSETS / f"{name}.jpg", quality=88
        )


if __name__ == "__main__":
    main()
