"""Files of questions: their lines, and what one line of JSON has to hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar

from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.schema import parse

MARKER = "<image>"
LONGEST_QUESTION = 50_000
"""Characters of a question; what is longer is no question, but a file in the wrong place."""


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _can_be_asked(text: str) -> str:
    if MARKER in _not_blank(text):
        raise ValueError(f"holds {MARKER}; take it out, the image is added for you")
    if len(text) > LONGEST_QUESTION:
        raise ValueError(f"has {len(text):,} characters; {LONGEST_QUESTION:,} are the most")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]
QuestionText = Annotated[str, AfterValidator(_can_be_asked)]


class Line(BaseModel):
    """One line about an image; other keys are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)

    image: Text = Field(description="a text")
    question: QuestionText = Field(description="a text")


class AnsweredLine(Line):
    """One line with what would be right: any of the answers."""

    id: Text | int = Field(description="a text")  # most benchmarks number their questions
    answer: str | list[str] = Field(description="a text or a list of texts")
    task: str = Field("", description="a text")


AnyLine = TypeVar("AnyLine", bound=Line)


def text_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that hold something, with their numbers from 1.

    Raises:
        InvalidInputError: the file is missing, no UTF-8, or has no such line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}; give a file of questions") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidInputError(f"{path}, line {line}: this is not UTF-8 text; save the file as UTF-8") from None
    # Only these end a line: U+2028 may stand inside a JSON text. Files that were put together have several BOMs.
    stripped = (line.strip().removeprefix("\ufeff").strip() for line in text.split("\n"))
    lines = [(number, line) for number, line in enumerate(stripped, 1) if line]
    if not lines:
        raise InvalidInputError(f"{path} holds no question; write one on each line")
    return lines


def json_lines(path: Path, kind: type[AnyLine]) -> Iterator[tuple[int, AnyLine]]:
    """The lines of a JSONL file with their numbers.

    Raises:
        InvalidInputError: with the number of the line, what is wrong with it.
    """
    adapter = TypeAdapter(kind)
    for number, line in text_lines(path):
        yield number, parse(adapter, line, f"{path}, line {number}")


def check_question(text: str, place: str) -> None:
    """Makes sure that a question can be asked about an image.

    Raises:
        InvalidInputError: it is empty, too long, or holds an image placeholder itself.
    """
    try:
        _can_be_asked(text)
    except ValueError as error:
        raise InvalidInputError(f"{place}: the question {error}") from None


def check_image(image: Path, place: str, folder: Path) -> None:
    """Makes sure that there is an image, reading its header only.

    Raises:
        InvalidInputError: there is none.
    """
    try:
        there = image.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        shown = str(image) if len(str(image)) <= 200 else f"{str(image)[:200]}..."
        raise InvalidInputError(f"{place}: there is no image {shown}; paths start at {folder}")
    try:
        Image.open(image).close()
    except Exception:  # Pillow's parsers raise kinds of their own on broken files
        raise InvalidInputError(f"{place}: {image} is not an image that can be read") from None
