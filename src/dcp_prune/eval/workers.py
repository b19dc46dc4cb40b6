"""Blocks of questions answered in this process or in several; whoever asked writes the records."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch

from dcp_prune.errors import DcpPruneError
from dcp_prune.eval.data.questions import Block, QuestionSet, Session
from dcp_prune.eval.records import to_part
from dcp_prune.eval.specs import Method


@dataclass(frozen=True)
class Job:
    """What a worker is told once.

    Attributes:
        questions: with the model that answers them.
        distances: to measure beside kappa.
        threads: of torch in each worker.
    """

    questions: QuestionSet
    distances: tuple[str, ...]
    threads: int

    def open(self) -> Session:
        """Loads the model."""
        torch.set_num_threads(self.threads)
        return self.questions.open(self.distances)


@dataclass(frozen=True)
class Task:
    """A block and the methods that have not answered it."""

    block: Block
    methods: tuple[Method, ...]

    @property
    def answers(self) -> int:
        """How many rows it gives."""
        return len(self.block.questions) * len(self.methods)

    def run(self, session: Session) -> bytes:
        """A part of the records.

        Raises:
            DcpPruneError: an error of the package as it is; any other with the block that it happened in.
        """
        try:
            return to_part(session.answer(self.block, self.methods))
        except DcpPruneError:
            raise
        except Exception as error:
            first, last = self.block.questions[0], self.block.questions[-1]
            raise DcpPruneError(
                f"questions {first} to {last} failed with {type(error).__name__}: {' '.join(str(error).split())}; "
                "finished parts are kept"
            ) from error


def work_here(job: Job, tasks: Sequence[Task]) -> Iterator[tuple[Task, bytes]]:
    """Each task with its part, one after the other, in this process."""
    before = torch.get_num_threads()
    try:
        session = job.open()
        for task in tasks:
            yield task, task.run(session)
    finally:
        torch.set_num_threads(before)


def work_in_processes(job: Job, tasks: Sequence[Task], processes: int) -> Iterator[tuple[Task, bytes]]:
    """Each task with its part, in the order in which they get ready.

    Raises:
        DcpPruneError: a worker failed or died.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    stop = context.Event()
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=(job, stop))
    try:
        waiting = iter(tasks)
        running: dict[Future[bytes], Task] = {}
        while True:
            for task in waiting:  # few ahead, so that an error does not wait for the whole queue
                running[pool.submit(_run_in_worker, task)] = task
                if len(running) >= 2 * processes:
                    break
            if not running:
                break
            ready, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ready:
                yield running.pop(future), future.result()
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


_session: Session | Exception | None = None
"""Of a worker process; an exception if the model could not be loaded."""


def _start_worker(job: Job, stop: Any) -> None:
    global _session  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and decides
    threading.Thread(target=_leave_when_unwanted, args=(multiprocessing.parent_process(), stop), daemon=True).start()
    try:
        _session = job.open()
    except Exception as error:
        _session = error  # raised here it would only break the pool; the first task tells it


def _leave_when_unwanted(parent: Any, stop: Any) -> None:
    """Ends this worker, whatever it is doing, when the sweep has failed, or when the parent was killed, which no queue
    would tell."""
    while parent.is_alive() and not stop.wait(0.5):
        pass
    os._exit(1)


def _run_in_worker(task: Task) -> bytes:
    if isinstance(_session, Exception):
        raise _session
    assert _session is not None
    return task.run(_session)
