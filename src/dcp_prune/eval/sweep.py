"""Every method on every question, in blocks that finish or leave no trace: what was killed goes on where it was."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
import torch

from dcp_prune.errors import DcpPruneError, InvalidInputError
from dcp_prune.eval.distances import check_distances
from dcp_prune.eval.environment import environment
from dcp_prune.eval.methods import ALL_TOKENS, Method
from dcp_prune.eval.records import RecordsFolder, to_part

if TYPE_CHECKING:
    from dcp_prune.eval.runner import Answered

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Block:
    """Questions that are answered together.

    Attributes:
        number: position among the blocks of its source.
        items: positions in the source of what is loaded for it.
        questions: ids of its questions, in order.
    """

    number: int
    items: range
    questions: tuple[str, ...]


class Source(ABC):
    """Questions and the model that answers them. Picklable; the model is loaded by `open`, once per process."""

    @abstractmethod
    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The manifest's `model` and `source`; equal descriptions mean equal questions in equal order."""

    @property
    @abstractmethod
    def blocks(self) -> tuple[Block, ...]:
        """All questions, in order."""

    @abstractmethod
    def check(self, methods: Sequence[Method]) -> None:
        """Refuses methods that these questions cannot serve.

        Raises:
            InvalidInputError: in one sentence.
        """

    @abstractmethod
    def open(self, distances: Sequence[str]) -> Session:
        """Loads the model."""


class Session(ABC):
    """A loaded model that answers blocks."""

    @abstractmethod
    def answer(self, block: Block, methods: Sequence[Method]) -> pl.DataFrame:
        """One row per method and question, methods in order, as in `records.SCHEMA`."""


@dataclass(frozen=True)
class Swept:
    """What a sweep did.

    Attributes:
        folder: of the records.
        answers: rows in all.
        new: rows of this run.
    """

    folder: Path
    answers: int
    new: int


def sweep(
    source: Source,
    methods: Sequence[Method],
    folder: str | Path,
    *,
    distances: Sequence[str] = (),
    processes: int = 1,
    threads: int = 1,
    backend: Literal["processes", "ray"] = "processes",
    compact: bool = False,
    progress: Progress = lambda done, total: None,
) -> Swept:
    """Lets every method answer every question, and keeps a record of each answer; goes on where it was stopped.

    Args:
        source: questions and model.
        methods: from `plan`.
        folder: of the records; new, or of an earlier sweep over the same questions.
        distances: names in `eval.distances.DISTANCE_NAMES`, measured beside kappa.
        processes: that work at once; 1 works in this process.
        threads: of each process.
        backend: `ray` runs the same blocks as tasks of a Ray cluster, `processes` of them at once (0: as many as the
            cluster has cores).
        compact: put all parts into one file at the end.
        progress: called with answers (questions times methods) that are there and answers in all.

    Raises:
        InvalidInputError: a method that the questions cannot serve, an unknown distance, fewer than one process.
        RecordsError: the folder cannot be used or written; finished parts stay.
        DcpPruneError: a worker failed or died; finished parts stay.
    """
    if processes < (0 if backend == "ray" else 1):
        raise InvalidInputError(f"a sweep needs at least 1 process, got {processes}")
    distances = check_distances(distances)
    source.check(methods)
    with RecordsFolder.open(folder, _manifest(source, methods, distances, threads)) as records:
        there = _finished(records.rows(), source.blocks, methods)
        todo = [(block, missing) for block in source.blocks if (missing := there.missing(block))]
        total = sum(len(block.questions) for block in source.blocks) * len(methods)
        done = total - sum(len(block.questions) * len(missing) for block, missing in todo)
        before = done
        progress(done, total)
        for block, missing, part in _work_off(source, todo, distances, processes, threads, backend):
            records.add(block.number, part)
            done += len(block.questions) * len(missing)
            progress(done, total)
        records.manifest["updated"] = _now()
        records.write_manifest()
        if compact:
            records.compact()
        return Swept(Path(folder), total, done - before)


@dataclass(frozen=True)
class _Finished:
    """Which methods have answered which questions."""

    methods: tuple[Method, ...]
    answered: Mapping[tuple[str, int], frozenset[str]]

    def missing(self, block: Block) -> tuple[Method, ...]:
        return tuple(
            method
            for method in self.methods
            if not self.answered.get(_cell(method.name, method.num_tokens), frozenset()).issuperset(block.questions)
        )


def _finished(rows: pl.DataFrame, blocks: Sequence[Block], methods: Sequence[Method]) -> _Finished:
    cells = rows.group_by("method", "num_tokens").agg("question").iter_rows()
    answered: dict[tuple[str, int], frozenset[str]] = {}
    for label, num_tokens, questions in cells:
        cell = _cell(label, num_tokens)
        answered[cell] = answered.get(cell, frozenset()) | frozenset(questions)
    return _Finished(tuple(methods), answered)


def _cell(label: str, num_tokens: int | None) -> tuple[str, int]:
    """How a method is told from others; the unpruned model has as many tokens as the image, so its count says nothing
    but whether there is an image."""
    if label == ALL_TOKENS:
        return label, 0 if num_tokens == 0 else -1
    assert num_tokens is not None
    return label, num_tokens


def rows_of(
    answered: Sequence[Answered],
    *,
    images: Sequence[str],
    questions: Sequence[str],
    tasks: Sequence[str],
    truths: Sequence[str],
    score: Callable[[Answered], Sequence[float]],
) -> pl.DataFrame:
    """The rows of a block."""
    frames = []
    for each in answered:
        method, q = each.method, len(questions)
        budget = each.num_tokens if method.num_tokens is None else method.num_tokens
        frames.append(
            pl.DataFrame(
                {
                    "method": [method.name] * q,
                    "pruner": [method.registered or method.name] * q,
                    "num_tokens": pl.Series([budget] * q, dtype=pl.Int32),
                    "kept": pl.Series(each.kept, dtype=pl.Int32),
                    "text": [str(method.text)] * q,
                    "image": images,
                    "question": questions,
                    "task": tasks,
                    "truth": truths,
                    "answer": each.answers,
                    "score": pl.Series(score(each), dtype=pl.Float32),
                    "kappa": pl.Series([None] * q if each.kappa is None else each.kappa, dtype=pl.Float32),
                    **{name: pl.Series(values, dtype=pl.Float32) for name, values in each.distances.items()},
                }
            )
        )
    return pl.concat(frames, how="diagonal")


def weights_sha256(folder: Path) -> str:
    """Of a model's weight files, names and contents."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


Piece = tuple[Block, tuple[Method, ...]]
Part = tuple[Block, tuple[Method, ...], bytes]


def _work_off(
    source: Source,
    todo: Sequence[Piece],
    distances: tuple[str, ...],
    processes: int,
    threads: int,
    backend: Literal["processes", "ray"],
) -> Iterator[Part]:
    """The parts of all blocks, in the order in which they get ready."""
    if not todo:
        return
    if backend == "ray":
        from dcp_prune.eval.on_ray import work_on_ray

        yield from work_on_ray(source, todo, distances, processes, threads)
    elif processes == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            session = source.open(distances)
            for block, methods in todo:
                yield block, methods, answer_block(session, block, methods)
        finally:
            torch.set_num_threads(before)
    else:
        yield from _work_in_processes(source, todo, distances, min(processes, len(todo)), threads)


def _work_in_processes(
    source: Source, todo: Sequence[Piece], distances: tuple[str, ...], processes: int, threads: int
) -> Iterator[Part]:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    stop = context.Event()
    pool = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(source, distances, threads, stop)
    )
    try:
        waiting = iter(todo)
        running: dict[Future[bytes], Piece] = {}
        while True:
            for piece in waiting:  # few ahead, so that an error does not wait for the whole queue
                running[pool.submit(_answer_in_worker, *piece)] = piece
                if len(running) >= 2 * processes:
                    break
            if not running:
                break
            ready, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ready:
                block, methods = running.pop(future)
                yield block, methods, future.result()
    except BrokenProcessPool:
        raise DcpPruneError(
            "a worker process of the sweep died, often because the memory is full; finished parts are kept, so run the "
            "same command again, perhaps with fewer --processes"
        ) from None
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_session: Session | None = None
"""Of a worker process."""


def _start_worker(source: Source, distances: tuple[str, ...], threads: int, stop: Any) -> None:
    global _session  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and decides
    threading.Thread(target=_leave_when_unwanted, args=(multiprocessing.parent_process(), stop), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        _session = source.open(distances)
    except Exception as error:
        _failed_start.append(error)  # an error here would only break the pool; the first block tells it


_failed_start: list[Exception] = []


def _leave_when_unwanted(parent: Any, stop: Any) -> None:
    """Ends this worker, whatever it is doing, when the sweep has failed, or when the parent was killed, which no queue
    would tell."""
    while parent.is_alive() and not stop.wait(0.5):
        pass
    os._exit(1)


def _answer_in_worker(block: Block, methods: Sequence[Method]) -> bytes:
    if _failed_start:
        raise _failed_start[0]
    assert _session is not None
    return answer_block(_session, block, methods)


def answer_block(session: Session, block: Block, methods: Sequence[Method]) -> bytes:
    """A part.

    Raises:
        DcpPruneError: an error of the package as it is; any other with the block that it happened in.
    """
    try:
        return to_part(session.answer(block, methods))
    except DcpPruneError:
        raise
    except Exception as error:
        sentence = " ".join(str(error).split())
        raise DcpPruneError(
            f"questions {block.questions[0]} to {block.questions[-1]} failed with {type(error).__name__}: {sentence}; "
            "finished parts are kept"
        ) from error


def _manifest(source: Source, methods: Sequence[Method], distances: Sequence[str], threads: int) -> dict[str, Any]:
    model, described = source.describe()
    now = _now()
    return {
        "model": model,
        "source": described,
        "methods": [
            {
                "method": method.name,
                "pruner": method.registered or method.name,
                "num_tokens": method.num_tokens,
                "text": str(method.text),
                "options": method.options,
            }
            for method in methods
        ],
        "distances": list(distances),
        "environment": {**environment(), "threads": threads},
        "started": now,
        "updated": now,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
