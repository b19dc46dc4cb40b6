"""Every method on every question, in blocks that finish or leave no trace: what was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import polars as pl

from dcp_prune.environment import environment
from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.asking.distances import check_distances
from dcp_prune.eval.data.questions import Block, QuestionSet
from dcp_prune.eval.records import RecordsFolder
from dcp_prune.eval.specs import ALL_TOKENS, Method
from dcp_prune.eval.workers import Job, Task, work_here, work_in_processes


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
    questions: QuestionSet,
    methods: Sequence[Method],
    folder: str | Path,
    *,
    distances: Sequence[str] = (),
    processes: int = 1,
    threads: int = 1,
    backend: Literal["processes", "ray"] = "processes",
    compact: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Swept:
    """Lets every method answer every question, and keeps a record of each answer; goes on where it was stopped.

    Args:
        questions: with the model that answers them.
        methods: from `plan`.
        folder: of the records; new, or of an earlier sweep over the same questions.
        distances: names in `eval.asking.distances.DISTANCE_NAMES`, measured beside kappa.
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
    job = Job(questions, check_distances(distances), threads)
    questions.check(methods)
    with RecordsFolder.open(folder, _manifest(job, methods)) as records:
        tasks = list(_missing(records.rows(), questions.blocks, methods))
        total = sum(len(block.questions) for block in questions.blocks) * len(methods)
        before = done = total - sum(task.answers for task in tasks)
        progress(done, total)
        for task, part in _work(job, tasks, processes, backend):
            records.add(task.block.number, part)
            done += task.answers
            progress(done, total)
        records.manifest["updated"] = _now()
        records.write_manifest()
        if compact:
            records.compact()
        return Swept(Path(folder), total, done - before)


def _work(
    job: Job, tasks: Sequence[Task], processes: int, backend: Literal["processes", "ray"]
) -> Iterator[tuple[Task, bytes]]:
    if not tasks:
        return iter(())
    if backend == "ray":
        from dcp_prune.eval.ray_workers import work_on_ray

        return work_on_ray(job, tasks, processes)
    return work_here(job, tasks) if processes == 1 else work_in_processes(job, tasks, min(processes, len(tasks)))


def _missing(rows: pl.DataFrame, blocks: Sequence[Block], methods: Sequence[Method]) -> Iterator[Task]:
    """Every block that some methods have not answered yet, with these."""
    answered: dict[tuple[str, int], set[str]] = {}
    for label, num_tokens, questions in rows.group_by("method", "num_tokens").agg("question").iter_rows():
        answered.setdefault(_key(label, num_tokens), set()).update(questions)
    for block in blocks:
        missing = tuple(
            method
            for method in methods
            if not answered.get(_key(method.name, method.num_tokens), set()).issuperset(block.questions)
        )
        if missing:
            yield Task(block, missing)


def _key(label: str, num_tokens: int | None) -> tuple[str, int]:
    """How a method is told from others; the unpruned model has as many tokens as the image, so its count says nothing
    but whether there is an image."""
    if label == ALL_TOKENS:
        return label, 0 if num_tokens == 0 else -1
    assert num_tokens is not None
    return label, num_tokens


def _manifest(job: Job, methods: Sequence[Method]) -> dict[str, Any]:
    model, source = job.questions.describe()
    now = _now()
    return {
        "model": model,
        "source": source,
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
        "distances": list(job.distances),
        "environment": {**environment(), "threads": job.threads},
        "started": now,
        "updated": now,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
