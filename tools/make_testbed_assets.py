"""Draws the testbed's sprite sheet and sign boards once; the results are committed, so nobody needs to run this.

Inputs: the 64-pixel images of the npm package `emoji-datasource-google` 16.0.0 (Noto Emoji, Apache-2.0), unpacked, and
DejaVu Sans Bold as matplotlib ships it (Bitstream Vera licence).

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python tools/make_testbed_assets.py package
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from dcp_prune.testbed.world import ASSETS, CLASSES, SIGN_SIZE, SPRITE_SIZES, WORDS

SHORT_NAMES = {
    "tree": "deciduous_tree",
    "moon": "crescent_moon",
    "cup": "coffee",
    "clock": "alarm_clock",
    "boat": "sailboat",
}


def main(package: Path) -> None:
    emoji = {name: e["image"] for e in json.loads((package / "emoji.json").read_text()) for name in e["short_names"]}
    for size in SPRITE_SIZES:
        sheet = Image.new("LA", (size * len(CLASSES), size))
        for i, name in enumerate(CLASSES):
            file = package / "img" / "google" / "64" / emoji[SHORT_NAMES.get(name, name)]
            sprite = Image.open(file).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS).convert("LA")
            sheet.paste(sprite, (i * size, 0))
        sheet.save(ASSETS / f"sprites-{size}.png", optimize=True)

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf"), 13)
    width, height = SIGN_SIZE
    boards = Image.new("L", (width, height * len(WORDS)))
    draw = ImageDraw.Draw(boards)
    for i, word in enumerate(WORDS):
        draw.text((width / 2, height * (i + 0.5)), word, fill=255, font=font, anchor="mm")
    boards.save(ASSETS / "signs.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
