"""Any image file a user may have, as the 8-bit RGB picture that a processor expects."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dcp_prune.errors import InvalidInputError

MIN_SIDE = 8
"""Smallest side in pixels. Below it nothing can be seen, and a side of 1 or 3 would pass for the colour channels."""


@dataclass(frozen=True)
class LoadedImage:
    """A picture ready for a processor.

    Attributes:
        image: upright, 8-bit RGB.
        notes: one sentence for each thing that was done to the file's content and that a user may not expect.
    """

    image: Image.Image
    notes: tuple[str, ...] = ()


def load_image(path: str | Path) -> LoadedImage:
    """Reads the first frame of an image file, upright, as 8-bit RGB.

    Honours the EXIF orientation, puts transparency on white, scales 16-bit and floating-point grey values to 8 bits,
    and converts palette, CMYK and any other mode.

    Args:
        path: a local file in any format that Pillow reads.

    Raises:
        InvalidInputError: the file is missing, a folder, no image, truncated, too large to be safe, or has a side of
            fewer than `MIN_SIDE` pixels.
    """
    path = Path(path)
    if not path.exists():
        raise InvalidInputError(f"the image {path} does not exist; give the path of a local file")
    if not path.is_file():
        raise InvalidInputError(f"{path} is no file; give the path of an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                frames = getattr(opened, "n_frames", 1)
                opened.seek(0)
                opened.load()
                turned = opened.getexif().get(0x0112, 1) != 1
                upright = ImageOps.exif_transpose(opened)
                notes = _notes(path, frames, turned, opened.mode)
                rgb = _to_rgb(upright, path)
    except UnidentifiedImageError:
        raise InvalidInputError(f"{path} is no image that can be read; give a PNG, JPEG, WebP, GIF or TIFF") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidInputError(f"{path} has too many pixels to be opened safely; scale it down first") from None
    except InvalidInputError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on broken files
        raise InvalidInputError(
            f"{path} cannot be decoded ({str(error).rstrip('.') or type(error).__name__}); "
            "the file is truncated or damaged, so get a fresh copy"
        ) from None
    if min(rgb.size) < MIN_SIDE:
        raise InvalidInputError(
            f"{path} is {rgb.width} x {rgb.height} pixels, too small; give at least {MIN_SIDE} x {MIN_SIDE}"
        )
    return LoadedImage(rgb, notes)


def _notes(path: Path, frames: int, turned: bool, mode: str) -> tuple[str, ...]:
    notes = []
    if frames > 1:
        notes.append(f"{path.name} holds {frames} frames; only the first is used")
    if turned:
        notes.append(f"{path.name} was turned upright as its EXIF orientation asks")
    if mode.startswith(("I", "F")):
        notes.append(f"{path.name} has more than 8 bits per pixel; the grey values were scaled to 8 bits")
    return tuple(notes)


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    # Pillow clips instead of scaling when it converts these modes, which turns a 16-bit picture white.
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image, dtype=np.float64) / 65535)
    if image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise InvalidInputError(f"{path} holds NaN or inf pixels; repair them before asking about the image")
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
