"""Any image file a user may have, as the 8-bit RGB picture that a processor expects."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dcp_prune.errors import InvalidInputError

MIN_SIDE = 8
"""Smallest side in pixels. Below it nothing can be seen, and a side of 1 or 3 would pass for the colour channels."""

MAX_PIXELS = 89_478_485
"""Most pixels, unless told otherwise: where Pillow begins to warn. A file of 20 KB can unfold to gigabytes."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "ICO", "TGA", "MPO")
"""What is read, by Pillow's names."""


@dataclass(frozen=True)
class LoadedImage:
    """A picture ready for a processor.

    Attributes:
        image: upright, 8-bit RGB.
        notes: one sentence for each thing that was done to the file's content and that a user may not expect.
    """

    image: Image.Image
    notes: tuple[str, ...] = ()


def load_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> LoadedImage:
    """Reads the first frame of an image file, upright, as 8-bit RGB.

    Honours the EXIF orientation, puts transparency on white, scales 16-bit and floating-point grey values to 8 bits,
    and converts palette, CMYK and any other mode.

    Args:
        path: a local file in one of `FORMATS`.
        max_pixels: the most that the picture may have.

    Raises:
        InvalidInputError: the file is missing, a folder, no image, damaged, larger than `max_pixels`, or has a side of
            fewer than `MIN_SIDE` pixels.
    """
    path = Path(path)
    if not path.exists():
        raise InvalidInputError(f"the image {path} does not exist; give the path of a local file")
    if not path.is_file():
        raise InvalidInputError(f"{path} is not a file; give the path of an image file")
    try:
        with path.open("rb") as file:
            return decode_image(file, path.name, max_pixels=max_pixels, called=str(path))
    except OSError as error:
        raise InvalidInputError(f"the image {path} cannot be opened: {error.strerror or error}") from None


def decode_image(file: BinaryIO, name: str, *, max_pixels: int = MAX_PIXELS, called: str | None = None) -> LoadedImage:
    """`load_image` of an open file or of bytes in memory.

    Args:
        file: at its beginning.
        name: what notes call it.
        max_pixels: the most that the picture may have.
        called: what refusals call it; `name` if not given.

    Raises:
        InvalidInputError: see `load_image`.
    """
    called = called or name
    try:
        # Only these: opening an EPS file, for one, would start another program on it.
        with Image.open(file, formats=_readable()) as opened:
            if opened.width * opened.height > max_pixels:
                raise _too_large(called)
            frames = getattr(opened, "n_frames", 1)
            opened.seek(0)
            opened.load()
            turned = opened.getexif().get(0x0112, 1) != 1
            notes = _notes(name, frames, turned, opened.mode)
            ImageOps.exif_transpose(opened, in_place=True)
            rgb = _to_rgb(opened, called)
    except InvalidInputError:
        raise
    except UnidentifiedImageError:
        raise InvalidInputError(
            f"{called} is not an image that can be read; give a PNG, JPEG, WebP, GIF or TIFF"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
        raise _too_large(called) from None
    except Exception as error:  # a decoder may raise anything on a damaged file, and each has its own kinds
        cause = str(error).rstrip(".") or type(error).__name__
        raise InvalidInputError(
            f"{called} cannot be decoded ({' '.join(cause.split())}); "
            "the file is truncated or damaged, so get a fresh copy"
        ) from None
    if min(rgb.size) < MIN_SIDE:
        raise InvalidInputError(
            f"{called} is {rgb.width} x {rgb.height} pixels, too small; give at least {MIN_SIDE} x {MIN_SIDE}"
        )
    return LoadedImage(rgb, notes)


@functools.cache
def _readable() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF came with Pillow 11.3


def _too_large(called: str) -> InvalidInputError:
    return InvalidInputError(f"{called} has too many pixels to be opened safely; scale it down first")


def _notes(name: str, frames: int, turned: bool, mode: str) -> tuple[str, ...]:
    notes = []
    if frames > 1:
        notes.append(f"{name} holds {frames} frames; only the first is used")
    if turned:
        notes.append(f"{name} was turned upright as its EXIF orientation asks")
    if mode.startswith(("I", "F")):
        notes.append(f"{name} has more than 8 bits per pixel; the grey values were scaled to 8 bits")
    return tuple(notes)


def _to_rgb(image: Image.Image, called: str) -> Image.Image:
    # Pillow clips instead of scaling when it converts these modes, which turns a 16-bit picture white.
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image, dtype=np.float64) / 65535)
    if image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise InvalidInputError(f"{called} holds NaN or inf pixels; repair them before asking about the image")
        low, high = values.min(), values.max()
        if image.mode == "I" and low >= 0 and high <= 65535:
            low, high = 0.0, 65535.0
        elif image.mode == "F" and low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        return _grey((values - low) / max(high - low, 1e-12))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _grey(unit: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(unit * 255).astype(np.uint8)).convert("RGB")
