"""Image files of every awkward kind arrive as the upright 8-bit RGB picture that a person sees, or are refused."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from dcp_prune.errors import InvalidInputError
from dcp_prune.images import decode_image, load_image


@pytest.fixture
def gradient() -> Image.Image:
    """Red grows to the right, green grows downwards: any turn or flip shows."""
    rows, cols = np.mgrid[0:20, 0:30]
    return Image.fromarray(np.stack((cols * 8, rows * 12, np.full_like(rows, 40)), axis=-1).astype(np.uint8))


def _pixel(image: Image.Image, x: int, y: int) -> np.ndarray:
    return np.asarray(image)[y, x].astype(int)


def test_a_plain_picture_passes_unchanged_and_without_remarks(tmp_path: Path, gradient: Image.Image) -> None:
    gradient.save(tmp_path / "plain.png")
    loaded = load_image(tmp_path / "plain.png")
    assert (np.asarray(loaded.image) == np.asarray(gradient)).all()
    assert loaded.notes == ()


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_exif_orientation_is_honoured_and_mentioned(tmp_path: Path, gradient: Image.Image, orientation: int) -> None:
    undo: dict[int, Image.Transpose] = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    gradient.transpose(undo[orientation]).save(tmp_path / "turned.png", exif=exif)
    loaded = load_image(tmp_path / "turned.png")
    assert (np.asarray(loaded.image) == np.asarray(gradient)).all()
    assert "EXIF" in loaded.notes[0]


def test_only_the_first_frame_of_an_animation_is_used_and_said_so(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    loaded = load_image(tmp_path / "moving.gif")
    assert tuple(_pixel(loaded.image, 8, 8)) == (255, 0, 0)
    assert loaded.notes == ("moving.gif holds 3 frames; only the first is used",)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 20 * 20).reshape(20, 20).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    loaded = load_image(tmp_path / "deep.png")
    assert np.abs(np.asarray(loaded.image)[..., 0].astype(float) - ramp / 257).max() <= 0.51
    assert "8 bits" in loaded.notes[0]


@pytest.mark.parametrize(("mode", "scale"), [("F", 1.0), ("F", 30.0), ("I", 65535.0), ("I", 1e6)])
def test_wide_grey_values_fill_the_range(tmp_path: Path, mode: str, scale: float) -> None:
    ramp = np.linspace(0, scale, 400).reshape(20, 20)
    dtype = np.float32 if mode == "F" else np.int32
    Image.fromarray(ramp.astype(dtype)).save(tmp_path / "wide.tiff")
    grey = np.asarray(load_image(tmp_path / "wide.tiff").image)[..., 0]
    assert (grey.min(), grey.max()) == (0, 255)


def test_a_palette_shows_its_colours_and_transparency_becomes_white(tmp_path: Path) -> None:
    indexed = Image.new("P", (12, 12), 1)
    indexed.putpalette([0, 0, 0, 10, 200, 30])
    indexed.putpixel((0, 0), 0)
    indexed.save(tmp_path / "palette.png", transparency=0)
    image = load_image(tmp_path / "palette.png").image
    assert tuple(_pixel(image, 5, 5)) == (10, 200, 30)
    assert tuple(_pixel(image, 0, 0)) == (255, 255, 255)


def test_cmyk_ink_becomes_light(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "ink.tiff")
    red, green, blue = _pixel(load_image(tmp_path / "ink.tiff").image, 8, 8)
    assert red < 60 < 180 < min(green, blue)


def _text(path: Path) -> None:
    path.write_text("not a picture")


def _empty(path: Path) -> None:
    path.touch()


def _truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:2000])


def _truncated_jpeg(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:1500])


def _dot(path: Path) -> None:
    Image.new("RGB", (1, 1)).save(path, format="PNG")


def _nan(path: Path) -> None:
    Image.fromarray(np.full((16, 16), np.nan, dtype=np.float32)).save(path, format="TIFF")


def _bomb_of_a_limit_lifted(path: Path) -> None:
    Image.new("1", (10000, 9000)).save(path, format="PNG")


def _damaged(path: Path, kind: str) -> None:
    frames = [Image.effect_noise((32, 32), 90).convert("RGB") for _ in range(2)]
    frames[0].save(path, format=kind, save_all=kind == "GIF", append_images=frames[1:] if kind == "GIF" else [])


def _postscript(path: Path) -> None:
    Image.new("RGB", (32, 32)).save(path, format="EPS")


def _bomb(path: Path) -> None:
    Image.new("1", (16000, 12000)).save(path, format="PNG")


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (_text, "not an image"),
        (_empty, "not an image"),
        (_truncated, "truncated"),
        (_truncated_jpeg, "truncated"),
        (_dot, "1 x 1 pixels"),
        (_nan, "NaN"),
        (_bomb, "too many pixels"),
        (_bomb_of_a_limit_lifted, "too many pixels"),
        (_postscript, "not an image"),
        (Path.mkdir, "not a file"),
        (lambda path: None, "does not exist"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_sentence(
    tmp_path: Path, make: Callable[[Path], None], cause: str
) -> None:
    path = tmp_path / "input"
    make(path)
    with pytest.raises(InvalidInputError, match=cause) as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "AVIF", "BMP"])
def test_a_file_with_a_changed_byte_is_shown_or_refused_and_never_a_traceback(tmp_path: Path, kind: str) -> None:
    path, draw = tmp_path / "image", np.random.default_rng(0)
    _damaged(path, kind)
    whole = path.read_bytes()
    for _ in range(60):
        changed = bytearray(whole)
        changed[draw.integers(min(len(whole), 400))] = draw.integers(256)
        path.write_bytes(changed)
        with contextlib.suppress(InvalidInputError):
            load_image(path)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, IndexError, KeyError, AssertionError, struct.error])
def test_whatever_a_decoder_raises_is_one_sentence(
    tmp_path: Path, gradient: Image.Image, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise error("two\n", "lines")

    gradient.save(tmp_path / "plain.png")
    monkeypatch.setattr(PngImageFile, "load", fail)
    with pytest.raises(InvalidInputError, match=r"plain.png cannot be decoded .*lines.*get a fresh copy"):
        load_image(tmp_path / "plain.png")


def test_bytes_are_read_like_files(gradient: Image.Image) -> None:
    stream = io.BytesIO()
    gradient.save(stream, format="PNG")
    stream.seek(0)
    assert (np.asarray(decode_image(stream, "picture").image) == np.asarray(gradient)).all()
    stream.seek(0)
    with pytest.raises(InvalidInputError, match="picture has too many pixels"):
        decode_image(stream, "picture", max_pixels=599)
