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
    output: Annotated[Path, Parameter(help="The folder of the records. A sweep that was stopped there goes on.")],
    pruner: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            help="A pruner as name or name(option=value, ...), or none for all tokens. Add @none, @wrong or "
            "@noise=SHARE to hide the question from the pruner, or @lookup to read it as the model's first layer "
            "does. Repeat the option. Default: none, dcp, random.",
        ),
    ] = None,
    num_tokens: Annotated[
        list[str] | None,
        Budgets,
        Parameter(help="Numbers of visual tokens to keep, separated by commas. 0 means no image. Default: 16."),
    ] = None,
    questions: Annotated[
        Path | None,
        Parameter(
            help='A JSONL file of questions instead of the testbed, with lines like {"id": "1", "image": "cat.jpg", '
            '"question": "...", "answer": "cat", "task": "..."}. Paths are relative to the file, answer may be a list '
            "of right answers, and task may be left out."
        ),
    ] = None,
    model: Annotated[
        str | None,
        Parameter(
            help="With --questions: the model that answers; testbed, or a LLaVA-1.5 model by its folder or hub name."
        ),
    ] = None,
    max_new_tokens: Annotated[int, Whole, Parameter(help="With --questions: the longest answer, in tokens.")] = 16,
    batch_size: Annotated[int, Whole, Parameter(help="With --questions: how many to answer at once.")] = 8,
    limit: Annotated[
        int | None, Whole, Parameter(help="How many questions to ask. Default: 1000 of the testbed, or all of a file.")
    ] = None,
    task: Annotated[
        list[str] | None,
        Parameter(negative="", help="Ask only questions of this task. Repeat the option for more tasks."),
    ] = None,
    checkpoint: Annotated[
        str, Parameter(help="Testbed: natural, weak, or the folder of a model trained on the testbed.")
    ] = "natural",
    difficulty: Annotated[
        Literal["standard", "crowded", "cluttered"],
        Parameter(help="Testbed: how full an image is. Only natural has cluttered images."),
    ] = "standard",
    tiles: Tiles = False,
    seed_range: Annotated[
        str | None,
        Parameter(help="Testbed: the seeds of the scenes, as A:B, from A to B - 1. Default: all held-out seeds."),
    ] = None,
    distances: Annotated[
        bool, Parameter(negative="", help="Record every distance, not only kappa. This takes several times as long.")
    ] = False,
    distance: Annotated[
        list[str] | None, Parameter(negative="", help="Record this distance too. Repeat the option for more.")
    ] = None,
    processes: Annotated[
        int | None,
        Whole,
        Parameter(help="How many processes work at once. Default: one per core, or one with --questions."),
    ] = None,
    ray: Annotated[
        bool, Parameter(negative="", help="Work on the Ray cluster that RAY_ADDRESS names, or on this machine.")
    ] = False,
    compact: Annotated[bool, Parameter(negative="", help="Join all records into one file at the end.")] = False,
) -> None:
    """Measure pruners at several budgets on many questions, and keep a record of every answer.

    All pruners answer the same questions in the same order. You may stop the sweep at any moment, even with `kill -9`:
    the same command continues where it was. A command with more pruners or budgets measures only what is missing.
    `dcp-prune report` draws tables and figures from the records.
    """
    from dcp_prune.testbed.seeds import HELD_OUT

    if tiles and questions is not None:
        raise InvalidInputError(
            "--tiles are for pictures of the testbed; with --questions, the model cuts its own tiles"
        )
    if (questions is None) != (model is None):
        raise InvalidInputError(
            "--questions and --model belong together: a file of questions, and the model that answers them"
        )
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
