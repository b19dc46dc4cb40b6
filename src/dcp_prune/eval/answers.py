"""A file of questions answered in order: what is written stays, and a run that was stopped goes on where it was.

Answers are appended in the order of the questions, a window at a time, so the last whole line says how far a run came.
Inside a window, images are encoded together and prompts of equal length are prefilled together.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from PIL import Image
from pydantic import Field, TypeAdapter

from dcp_prune.assistant import Assistant, method_of
from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.asking.runner import Question, Runner
from dcp_prune.eval.data.files import Line, check_image, text_lines
from dcp_prune.eval.schema import parse
from dcp_prune.files import check_outputs, to_json, write_atomically
from dcp_prune.images import load_image
from dcp_prune.pruners.base import Pruner

WINDOW = 4
"""Batches of questions that are sorted by length together, and of which nothing is written before all are answered."""


class NamedLine(Line):
    """One line of a batch file; whatever else it holds is ignored."""

    id: str | int | None = Field(None, description="a text")


@dataclass(frozen=True)
class Asked:
    """One question of a batch file.

    Attributes:
        line: its number, from 1.
        id: what the line calls itself, if anything.
        image: path, as the line has it.
        path: of the image; relative ones begin at the folder of the file.
        question: without an image placeholder.
    """

    line: int
    id: str | int | None
    image: str
    path: Path
    question: str


@dataclass(frozen=True)
class Answers:
    """What a run did.

    Attributes:
        output: the file of answers.
        questions: that can be asked.
        new: answers of this run.
        faults: lines that are no questions, or whose picture or prompt cannot be used: number -> sentence.
        seconds: that answering took, without loading.
    """

    output: Path
    questions: int
    new: int
    faults: Mapping[int, str]
    seconds: float


def read_batch(path: Path) -> tuple[tuple[Asked, ...], dict[int, str]]:
    """The questions of a JSONL file, and what is wrong with its other lines, by their numbers.

    A question has the keys `image`, `question` and, if it likes, `id`.

    Raises:
        InvalidInputError: the file cannot be read, is no UTF-8, or holds no line.
    """
    adapter, asked, faults = TypeAdapter(NamedLine), [], {}
    opened: set[Path] = set()
    for number, text in text_lines(path):
        place = f"line {number}"
        try:
            line = parse(adapter, text, place)
            image = path.parent / line.image
            if image not in opened:
                check_image(image, place, path.parent)
                opened.add(image)
        except InvalidInputError as error:
            faults[number] = str(error)
        else:
            asked.append(Asked(number, line.id, line.image, image, line.question))
    return tuple(asked), faults


def answer_file(
    batch_file: str | Path,
    output: str | Path,
    load: Callable[[], Assistant],
    pruner: Pruner | None,
    *,
    model: str,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """Answers every question of a file, or those that an earlier run has left.

    Beside the output lie `OUTPUT.run`, which says what was asked of whom, and `OUTPUT.errors`, which lists lines that
    cannot be asked.

    Args:
        batch_file: as for `read_batch`.
        output: JSON lines, in the order of the questions.
        load: the model; not called if every answer is there.
        pruner: None reads all visual tokens.
        model: its name, by which a run is recognised.
        max_new_tokens: where an answer is cut off at the latest.
        batch_size: prompts that are prefilled, and images that are encoded, at once.
        progress: called with the questions that are done and all of them.

    Raises:
        InvalidInputError: the file holds no question, the output belongs to another run or cannot be written, another
            process writes it, or a number below 1.
    """
    batch_file, output = Path(batch_file), Path(output)
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise InvalidInputError(f"{name} must be at least 1, got {value}")
    asked, faults = read_batch(batch_file)
    check_outputs([output], [batch_file, *{each.path for each in asked}])
    run = {
        "batch_file": hashlib.sha256(batch_file.read_bytes()).hexdigest(),
        "model": model,
        "pruner": repr(pruner) if pruner else "none",
        "max_new_tokens": max_new_tokens,
    }
    with _Output.open(output, run) as out:
        out.note(faults)
        if not asked:
            raise InvalidInputError(
                f"{batch_file} has no line that can be asked; {out.errors} says what is wrong with each"
            )
        left = [each for each in asked if each.line > out.last]
        done = len(asked) - len(left)
        progress(done, len(asked))
        new, seconds = 0, 0.0
        if left:
            asker = _Asker(load(), pruner, max_new_tokens, batch_size)
            for answers, wrong, count, took in asker.windows(left):
                out.add(answers)
                out.note(wrong)
                done, new, seconds = done + count, new + len(answers), seconds + took
                progress(done, len(asked))
        return Answers(output, len(asked), new, dict(out.faults), seconds)


@dataclass(frozen=True, eq=False)
class _Asker:
    """The model, and how it is asked."""

    assistant: Assistant
    pruner: Pruner | None
    max_new_tokens: int
    batch_size: int

    def windows(self, asked: Sequence[Asked]) -> Iterator[tuple[list[dict[str, Any]], dict[int, str], int, float]]:
        """For each window the answers in order, what went wrong by line, its questions, and seconds.

        The pictures of the next window are read meanwhile.
        """
        size = WINDOW * self.batch_size
        parts = [asked[start : start + size] for start in range(0, len(asked), size)]
        with ThreadPoolExecutor(max_workers=4) as workers:
            pictures = [_read(workers, parts[0])]
            for number, part in enumerate(parts):
                if number + 1 < len(parts):
                    pictures.append(_read(workers, parts[number + 1]))
                yield self._answer(part, pictures.pop(0))

    def _answer(
        self, part: Sequence[Asked], pictures: Mapping[Path, Any]
    ) -> tuple[list[dict[str, Any]], dict[int, str], int, float]:
        loaded: dict[Path, Image.Image] = {}
        prompts: dict[int, str] = {}
        wrong: dict[int, str] = {}
        for each in part:
            try:
                loaded[each.path] = pictures[each.path].result().image
                prompts[each.line] = self.assistant.prompt(each.question)
                self.assistant.check_length(prompts[each.line], self.max_new_tokens)
            except InvalidInputError as error:
                wrong[each.line] = f"line {each.line}: {error}"
        good = [each for each in part if each.line not in wrong]
        answers: dict[int, dict[str, Any]] = {}
        seconds = 0.0
        for group in self._groups(good, prompts):
            found, took = self._ask(group, loaded, prompts)
            answers.update(found)
            seconds += took
        return [answers[each.line] for each in good], wrong, len(part), seconds

    def _groups(self, asked: Sequence[Asked], prompts: Mapping[int, str]) -> Iterator[list[Asked]]:
        """Questions whose prompts have as many tokens, at most a batch at once: none of them is padded."""
        tokenizer: Any = self.assistant.processor.tokenizer  # type: ignore[attr-defined]
        by_length: dict[int, list[Asked]] = {}
        for each in asked:
            by_length.setdefault(len(tokenizer(prompts[each.line])["input_ids"]), []).append(each)
        for group in by_length.values():
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _ask(
        self, group: Sequence[Asked], loaded: Mapping[Path, Image.Image], prompts: Mapping[int, str]
    ) -> tuple[dict[int, dict[str, Any]], float]:
        images = list(dict.fromkeys(each.path for each in group))
        runner = Runner(
            self.assistant.model,
            self.assistant.processor,
            [method_of(self.pruner)],
            max_new_tokens=self.max_new_tokens,
        )
        questions = [
            Question(key=str(each.line), image=images.index(each.path), text=None, prompt=prompts[each.line])
            for each in group
        ]
        (answered,) = runner.run([loaded[path] for path in images], questions)
        assert answered.kappa is not None
        found = {
            each.line: {
                "line": each.line,
                **({} if each.id is None else {"id": each.id}),
                "image": each.image,
                "question": each.question,
                "answer": answer,
                "num_tokens": int(kept),
                "kappa": round(float(kappa), 6),
            }
            for each, answer, kept, kappa in zip(group, answered.answers, answered.kept, answered.kappa, strict=True)
        }
        return found, answered.seconds


def _read(workers: ThreadPoolExecutor, part: Sequence[Asked]) -> dict[Path, Any]:
    return {path: workers.submit(load_image, path) for path in dict.fromkeys(each.path for each in part)}


class _Output:
    """The files of a run; see `answer_file`.

    Attributes:
        last: number of the last line that was answered.
        faults: by line.
    """

    def __init__(self, file: IO[bytes], path: Path, last: int, faults: dict[int, str]) -> None:
        self._file = file
        self.errors = path.with_name(f"{path.name}.errors")
        self.last = last
        self.faults = faults

    @classmethod
    @contextmanager
    def open(cls, path: Path, run: dict[str, Any]) -> Iterator[_Output]:
        """Goes on with an output of the same run, or begins one.

        Raises:
            InvalidInputError: the output belongs to another run, or another process writes it.
        """
        sheet = path.with_name(f"{path.name}.run")
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InvalidInputError(f"another run writes {path}; wait for it, or give another --output") from None
        try:
            errors = path.with_name(f"{path.name}.errors")
            if path.exists() or sheet.exists():
                _check_run(path, sheet, run)
            else:
                errors.unlink(missing_ok=True)
                write_atomically(sheet, to_json(run).encode())
            last = _cut_to_whole_lines(path)
            lines = errors.read_text(encoding="utf-8").splitlines() if errors.exists() else []
            faults = {int(number[1]): line for line in lines if (number := re.match(r"line (\d+)", line))}
            with path.open("ab") as file:
                yield cls(file, path, last, faults)
        finally:
            lock.release()

    def add(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Appends answers; when this returns they are on the disk."""
        self._file.write("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in answers).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def note(self, faults: Mapping[int, str]) -> None:
        """Writes down what is wrong with some lines, beside what was noted before."""
        if not faults.keys() <= self.faults.keys():
            self.faults.update({line: " ".join(sentence.split()) for line, sentence in faults.items()})
            text = "".join(f"{self.faults[line]}\n" for line in sorted(self.faults))
            write_atomically(self.errors, text.encode("utf-8", "backslashreplace"))


def _check_run(path: Path, sheet: Path, run: Mapping[str, Any]) -> None:
    words = {"batch_file": "file of questions", "model": "model", "pruner": "pruner", "max_new_tokens": "answer length"}
    try:
        before = json.loads(sheet.read_text(encoding="utf-8"))
        differs = [words[name] for name in words if before[name] != run[name]]
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidInputError(
            f"{path} was not written by such a run, since {sheet.name} does not lie beside it; give another --output"
        ) from None
    if differs:
        raise InvalidInputError(
            f"{path} belongs to a run with another {' and another '.join(differs)}; give another --output, or delete "
            f"it and {sheet.name}"
        )


def _cut_to_whole_lines(path: Path) -> int:
    """Drops what a killed run left of a line; the number of the last question that was answered, 0 for none.

    Raises:
        InvalidInputError: a line is no answer.
    """
    if not path.exists():
        return 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    last = 0
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            last = int(json.loads(line)["line"])
        except (ValueError, KeyError, TypeError):
            raise InvalidInputError(
                f"line {number} of {path} is no answer, so the run cannot go on; give another --output"
            ) from None
    return last
