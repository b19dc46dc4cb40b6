"""`sweep`: pruners times budgets times questions, with a record of every answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from dcp_prune.cli.common import (
    DEFAULT_NUM_TOKENS,
    Budgets,
    Tiles,
    Whole,
    app,
    fail,
    progress_bar,
    seed_range_of,
    whole_numbers,
)
from dcp_prune.errors import InvalidInputError


@app.command
def sweep(
    *,
    output: Annotated[Path, Parameter(help="Folder of the records; a sweep that was stopped there goes on.")],
    pruner: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            help="A pruner as name or name(field=value, ...), with @none, @wrong or @noise=SHARE behind it if it is "
            "not to read the question; none for all tokens; say it several times; if not at all: none, dcp, random.",
        ),
    ] = None,
    num_tokens: Annotated[
        list[str] | None,
        Budgets,
        Parameter(help="Visual tokens to keep, with commas between them; 0 is no image; if not said: 16."),
    ] = None,
    questions: Annotated[
        Path | None,
        Parameter(
            help='A JSONL file of questions instead of the testbed, lines like {"id": "1", "image": "cat.jpg", '
            '"question": "...", "answer": "cat", "task": "..."}; image is relative to the file, answer may be a list '
            "of right ones, task may be left out."
        ),
    ] = None,
    model: Annotated[
        str | None, Parameter(help="Who answers them: testbed, the folder of a LLaVA-1.5 model, or its hub name.")
    ] = None,
    max_new_tokens: Annotated[int, Whole, Parameter(help="With --questions: where an answer is cut off.")] = 16,
    batch_size: Annotated[int, Whole, Parameter(help="With --questions: how many are answered at once.")] = 8,
    limit: Annotated[
        int | None, Whole, Parameter(help="How many questions; if not said: 1000 of the testbed, all of a file.")
    ] = None,
    task: Annotated[
        list[str] | None, Parameter(negative="", help="Only questions of this task; several times.")
    ] = None,
    checkpoint: Annotated[
        str, Parameter(help="Testbed: natural, weak, aligned, or the folder of a model trained on it.")
    ] = "natural",
    difficulty: Annotated[
        Literal["standard", "crowded", "cluttered"],
        Parameter(help="Testbed: how full an image is; cluttered is of the natural world."),
    ] = "standard",
    tiles: Tiles = False,
    seed_range: Annotated[
        str | None, Parameter(help="Testbed: scenes from seed A up to B, as A:B; if not said: all held-out seeds.")
    ] = None,
    distances: Annotated[
        bool, Parameter(negative="", help="Record every distance beside kappa; takes several times as long.")
    ] = False,
    distance: Annotated[
        list[str] | None, Parameter(negative="", help="Record this distance beside kappa; several times.")
    ] = None,
    processes: Annotated[
        int | None,
        Whole,
        Parameter(help="Processes that work at once; if not said: one per core, and one with --questions."),
    ] = None,
    ray: Annotated[bool, Parameter(negative="", help="Work on a Ray cluster (RAY_ADDRESS, or this machine).")] = False,
    compact: Annotated[bool, Parameter(negative="", help="Put all records into one file at the end.")] = False,
) -> None:
    """Measure pruners at several budgets on many questions, and keep a record of every answer.

    Everybody answers the same questions in the same order. The sweep may be stopped at any moment, also by `kill -9`:
    the same command goes on where it was, and one with more pruners or budgets measures only what is missing.
    `dcp-prune report` draws tables and figures from the records.
    """
    from dcp_prune.testbed.seeds import HELD_OUT

    if tiles and questions is not None:
        raise InvalidInputError(
            "--tiles are for pictures of the testbed; with --questions, the model cuts its own tiles"
        )
    if (questions is None) != (model is None):
        raise InvalidInputError("--questions and --model belong together: a file of questions, and who answers them")
    if questions is not None:
        from dcp_prune.eval.data.files import text_lines

        text_lines(questions)  # a file that is not there is told before what takes seconds is loaded
    seeds = HELD_OUT if seed_range is None else seed_range_of(seed_range)
    if limit is not None and limit < 1:
        raise InvalidInputError(f"--limit must be at least 1 question, got {limit}")
    if processes is not None and processes < 1:
        raise InvalidInputError(f"--processes must be at least 1, got {processes}")

    from dcp_prune.eval import records  # noqa: F401  # says what to install, where the extra is missing
    from dcp_prune.eval.asking.distances import DISTANCE_NAMES
    from dcp_prune.eval.data.jsonl import JsonlQuestions, read_questions
    from dcp_prune.eval.data.testbed import TestbedQuestions
    from dcp_prune.eval.specs import plan
    from dcp_prune.eval.sweep import sweep as run_sweep
    from dcp_prune.testbed.tiles import TILED_GRID
    from dcp_prune.testbed.world import GRID

    methods = plan(
        pruner or ["none", "dcp", "random"], whole_numbers(num_tokens) if num_tokens else [DEFAULT_NUM_TOKENS]
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if questions is None or model is None:
        grid = TILED_GRID if tiles else GRID
        asked: Any = TestbedQuestions(seeds, difficulty, limit or 1000, tuple(task or ()), grid, checkpoint)
        processes = processes or (0 if ray else cores)
        threads = 1  # the model is so small that several processes beat several threads
    else:
        own = tuple(each for each in read_questions(questions) if not task or each.task in task)[:limit]
        asked = JsonlQuestions(model, questions, own, batch_size, max_new_tokens)
        processes = processes or 1
        threads = max(1, cores // processes)
    try:
        with progress_bar("Loading the model") as advance:
            swept = run_sweep(
                asked,
                methods,
                output,
                distances=DISTANCE_NAMES if distances else distance or (),
                processes=processes,
                threads=threads,
                backend="ray" if ray else "processes",
                compact=compact,
                progress=advance,
            )
    except KeyboardInterrupt:
        fail(f"interrupted; what was finished is in {output}, and the same command goes on there", code=130)
    print(f"{swept.answers:,} answers in {swept.folder}, {swept.new:,} of them new.")  # noqa: T201
