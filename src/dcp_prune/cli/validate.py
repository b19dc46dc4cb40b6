"""`validate`: a planned run checked before hours are spent."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dcp_prune.cli.common import (
    DEFAULT_NUM_TOKENS,
    Budgets,
    Json,
    Whole,
    app,
    check_outputs,
    report_result,
    seed_range_of,
    whole_numbers,
)
from dcp_prune.errors import InvalidInputError

COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@app.command
def validate(
    *,
    pruner: Annotated[
        list[str] | None, Parameter(negative="", help="As for sweep. Repeat the option. Default: none, dcp, random.")
    ] = None,
    num_tokens: Annotated[
        list[str] | None,
        Budgets,
        Parameter(help="As for sweep: numbers of visual tokens to keep, separated by commas. Default: 16."),
    ] = None,
    model: Annotated[str | None, Parameter(help="testbed, or a model by its folder or hub name.")] = None,
    checkpoint: Annotated[
        str, Parameter(help="As for sweep, instead of a model: natural, weak, or a folder.")
    ] = "natural",
    task: Annotated[
        list[str] | None, Parameter(negative="", help="Testbed: as for sweep. Repeat the option for more tasks.")
    ] = None,
    tasks: Annotated[
        str | None, Parameter(help="Benchmarks of lmms-eval, separated by commas, such as gqa,mme,pope.")
    ] = None,
    questions: Annotated[Path | None, Parameter(help="As for sweep: a JSONL file instead of the testbed.")] = None,
    output: Annotated[Path | None, Parameter(help="The folder of the records.")] = None,
    limit: Annotated[
        int | None, Whole, Parameter(help="How many questions to ask. Default: 1000 of the testbed.")
    ] = None,
    batch_size: Annotated[int, Whole, Parameter(help="How many questions to answer at once.")] = 8,
    max_new_tokens: Annotated[int, Whole, Parameter(help="The longest answer, in tokens.")] = 16,
    processes: Annotated[
        int | None, Whole, Parameter(help="As for sweep: how many processes work at once. Default: one per core.")
    ] = None,
    difficulty: Annotated[
        Literal["standard", "crowded", "cluttered"], Parameter(help="Testbed: as for sweep.")
    ] = "standard",
    seed_range: Annotated[str | None, Parameter(help="Testbed: as for sweep.")] = None,
    distances: Annotated[bool, Parameter(negative="", help="As for sweep.")] = False,
    distance: Annotated[
        list[str] | None, Parameter(negative="", help="As for sweep. Repeat the option for more.")
    ] = None,
    ray: Annotated[bool, Parameter(negative="", help="As for sweep.")] = False,
    compact: Annotated[bool, Parameter(negative="", help="As for sweep.")] = False,
    json: Json = None,
) -> None:
    """Check a planned run before it costs hours: write `validate` instead of `sweep`, or name benchmarks.

    It checks that the model is there and its files are complete, its adapter, the signals that each pruner needs,
    budgets, tasks, disk and memory. It loads no weights. The exit code is 1 if there is a problem.
    """
    from dcp_prune.testbed.load import CHECKPOINTS, DEFAULT_CHECKPOINT, checkpoint_path
    from dcp_prune.testbed.worlds import world_of

    for option, value in (
        ("--limit", limit),
        ("--batch-size", batch_size),
        ("--max-new-tokens", max_new_tokens),
        ("--processes", processes),
    ):
        if value is not None and value < 1:
            raise InvalidInputError(f"{option} must be at least 1, got {value}")
    check_outputs(json, inputs=(questions, model))
    del difficulty, distances, compact  # nothing about them can be wrong

    from dcp_prune.eval.asking.distances import check_distances
    from dcp_prune.eval.data.testbed import split_name

    check_distances(distance or ())
    if seed_range is not None:
        split_name(seed_range_of(seed_range))
    name = model or (f"testbed-{checkpoint}" if checkpoint in CHECKPOINTS else checkpoint)
    shipped = {"testbed": DEFAULT_CHECKPOINT, **{f"testbed-{each}": each for each in CHECKPOINTS}}
    benchmarks = tuple(each.strip() for each in (tasks or "").split(",") if each.strip())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    from dcp_prune.eval.validate import Plan
    from dcp_prune.eval.validate import validate as run

    plan = Plan(
        name=name,
        model=str(checkpoint_path(shipped[name])) if name in shipped else name,
        pruners=tuple(pruner or ("none", "dcp", "random")),
        budgets=tuple(whole_numbers(num_tokens)) if num_tokens else (DEFAULT_NUM_TOKENS,),
        questions=limit if limit is not None or benchmarks or questions is not None else 1000,
        tasks=tuple(task or ()),
        known_tasks=world_of(checkpoint).tasks,
        benchmarks=benchmarks,
        data=questions,
        output=output,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        processes=processes or (1 if benchmarks or questions is not None else cores),
        ray=ray,
    )
    with Console(stderr=True).status("looking") as status:
        checks = run(plan, lambda subject: status.update(f"looking at: {subject}"))
    problems = sum(check.state == "problem" for check in checks)
    result = {"model": name, "problems": problems, "checks": [asdict(check) for check in checks]}

    def show(console: Console) -> None:
        table = Table("check", "", "what was found", "what to do", box=None, pad_edge=False)
        for check in checks:
            state = f"[{COLOURS[check.state]}]{check.state}[/]"
            table.add_row(escape(check.subject), state, escape(check.found), escape(check.advice))
        console.print(table)
        warnings = sum(check.state == "warning" for check in checks)
        counts = [
            f"{n} {word}{'' if n == 1 else 's'}" for n, word in ((problems, "problem"), (warnings, "warning")) if n
        ]
        console.print(f"\n{' and '.join(counts) or 'All is well'}.", highlight=False)

    report_result(result, json, show)
    if problems:
        raise SystemExit(1)
