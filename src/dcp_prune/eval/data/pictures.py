"""A folder of one's own pictures, and questions about them without right answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.data.files import Line, check_image, check_question, json_lines, text_lines
from dcp_prune.images import load_image


@dataclass(frozen=True)
class PictureQuestion:
    """One question about one picture."""

    image: Path
    question: str


@dataclass(frozen=True)
class PictureQuestions:
    """What is to be asked, the questions about one picture next to each other.

    Attributes:
        asked: every question with its picture.
        notes: one sentence for each thing in the files that was left out or changed.
    """

    asked: tuple[PictureQuestion, ...]
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[Path, ...]:
        """Every picture, once, in the order of `asked`."""
        return tuple(dict.fromkeys(asked.image for asked in self.asked))

    @property
    def cluster(self) -> Int[np.ndarray, " q"]:
        """The position in `images` of each question's picture. `q`."""
        place = {image: number for number, image in enumerate(self.images)}
        return np.array([place[asked.image] for asked in self.asked])


def read_pictures(images: Path, questions: Path) -> PictureQuestions:
    """Reads the questions and finds their pictures, without decoding them; see `check_pictures`.

    Args:
        images: a folder.
        questions: a text file with one question a line, each asked about every picture in the folder; or JSON lines
            with the keys `image` (a path, relative ones below the folder) and `question`, others being ignored.

    Raises:
        InvalidInputError: a file or folder that is missing or empty, or a line that cannot be used, with its number.
    """
    if not images.is_dir():
        what = "is no folder" if images.exists() else "does not exist"
        raise InvalidInputError(f"the folder of images {images} {what}; give the folder that holds the images")
    lines = text_lines(questions)
    if questions.suffix.lower() in (".jsonl", ".ndjson") or lines[0][1].startswith("{"):
        return PictureQuestions(_from_json_lines(questions, images))
    seen: dict[str, int] = {}
    for number, line in lines:
        place = f"{questions}, line {number}"
        check_question(line, place)
        if line in seen:
            raise InvalidInputError(f"{place}: the question repeats line {seen[line]}; ask it once")
        seen[line] = number
    found, notes = _images_in(images, questions)
    return PictureQuestions(tuple(PictureQuestion(image, question) for image in found for question in seen), notes)


def check_pictures(
    images: Sequence[Path], progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[str, ...]:
    """Opens every picture once; returns what `load_image` remarks about them.

    Raises:
        InvalidInputError: one that cannot be used, by name.
    """
    notes: list[str] = []
    for number, image in enumerate(images):
        notes.extend(load_image(image).notes)
        progress(number + 1, len(images))
    return tuple(notes)


def sizes_of(images: Sequence[Path]) -> Iterator[tuple[int, int]]:
    """Width and height of each picture, from its header."""
    for image in images:
        with Image.open(image) as opened:
            yield opened.size


def _from_json_lines(path: Path, images: Path) -> tuple[PictureQuestion, ...]:
    seen: dict[PictureQuestion, int] = {}
    for number, line in json_lines(path, Line):
        place = f"{path}, line {number}"
        asked = PictureQuestion(images / line.image, line.question.strip())
        check_image(asked.image, place, images)
        if asked in seen:
            raise InvalidInputError(f"{place}: this image and question repeat line {seen[asked]}; ask it once")
        seen[asked] = number
    first = {asked.image: at for at, asked in reversed([*enumerate(seen)])}
    return tuple(sorted(seen, key=lambda asked: first[asked.image]))


def _images_in(folder: Path, questions: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The images of a folder by name, and a remark about what else lies there."""
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found = tuple(path for path in there if path.is_file() and path.suffix.lower() in endings)
    if not found:
        raise InvalidInputError(
            f"the folder {folder} holds no images; put PNG, JPEG, WebP, GIF or TIFF files directly into it, or name "
            "files of its subfolders in JSON lines"
        )
    others = [path for path in there if path not in set(found) and path.resolve() != questions.resolve()]
    names = [path.name for path in others if path.is_file()] + [f"{path.name}/" for path in others if path.is_dir()]
    if not names:
        return found, ()
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return found, (f"{shown} in {folder}: not asked about, being no image files",)
