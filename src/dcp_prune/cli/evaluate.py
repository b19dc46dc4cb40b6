"""`testbed eval`: a quick look at accuracy, on the screen."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from dcp_prune.cli.common import (
    DEFAULT_NUM_TOKENS,
    Budgets,
    Json,
    Tiles,
    Whole,
    app,
    check_outputs,
    environment_now,
    load_assistant,
    progress_bar,
    report_result,
    seed_range_of,
    whole_numbers,
)
from dcp_prune.errors import InvalidInputError

testbed = App(name="testbed", help="Measure pruners on the small models that come with this program.")
app.command(testbed)


@testbed.command(name="eval")
def eval_(
    *,
    pruner: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            help="A pruner, or none for all tokens. Repeat the option to compare. Default: none, dcp, random.",
        ),
    ] = None,
    num_tokens: Annotated[
        list[str] | None,
        Budgets,
        Parameter(help="Numbers of visual tokens to keep, separated by commas. 0 means no image. Default: 16."),
    ] = None,
    seed_range: Annotated[
        str | None, Parameter(help="The seeds of the scenes, as A:B, from A to B - 1. Default: all held-out seeds.")
    ] = None,
    limit: Annotated[int, Whole, Parameter(help="How many questions to ask. Each image has 14 or 18.")] = 1000,
    difficulty: Annotated[
        Literal["standard", "crowded", "cluttered"],
        Parameter(help="How full an image is. Only natural has cluttered images."),
    ] = "standard",
    checkpoint: Annotated[
        str, Parameter(help="natural, weak, or the folder of a model trained on the testbed.")
    ] = "natural",
    tiles: Tiles = False,
    json: Json = None,
) -> None:
    """Measure accuracy on questions that the model has never seen, for any pruners at any budgets.

    Every pruner answers the same questions. Accuracies have 95 % intervals, which allow for the fact that questions
    about one image belong together. Differences to the first pruner are paired. Seeds below 900000000 are for training,
    those up to 999999999 for tuning, and those from 1000000000 are held out.
    """
    from dcp_prune.testbed.seeds import HELD_OUT

    names = pruner or ["none", "dcp", "random"]
    budgets = whole_numbers(num_tokens) if num_tokens else [DEFAULT_NUM_TOKENS]
    seeds = HELD_OUT if seed_range is None else seed_range_of(seed_range)
    if limit < 1:
        raise InvalidInputError(f"--limit must be at least 1 question, got {limit}")
    check_outputs(json, inputs=(checkpoint,))

    from dcp_prune.eval.data.testbed import split_name
    from dcp_prune.eval.evaluate import evaluate, summarise
    from dcp_prune.eval.specs import plan
    from dcp_prune.testbed.load import CHECKPOINTS
    from dcp_prune.testbed.tiles import TILED_GRID, with_tiles
    from dcp_prune.testbed.world import GRID

    methods = plan(names, budgets)
    split_name(seeds)
    with progress_bar("Loading the model") as advance:
        assistant = load_assistant(f"testbed-{checkpoint}" if checkpoint in CHECKPOINTS else checkpoint)
        model, processor = assistant.model, assistant.processor
        if tiles:
            model, processor = with_tiles(model, processor)
        grid = TILED_GRID if tiles else GRID
        evaluation = evaluate(
            model,
            processor,
            methods,
            seeds,
            limit,
            difficulty=difficulty,
            grid=grid,
            checkpoint=checkpoint,
            progress=advance,
        )
    result = {**summarise(evaluation), "checkpoint": checkpoint, "tiles": tiles, "environment": environment_now()}

    def show(console: Console) -> None:
        asked = result["questions"]
        console.print(
            f"{asked['questions']} questions about {asked['images']} {asked['difficulty']} images, "
            f"{asked['split']} seeds {asked['first_seed']} to {asked['last_seed']}, checkpoint {checkpoint}"
            f"{', in tiles' if tiles else ''}\n",
            highlight=False,
        )
        tasks = list(dict.fromkeys(row["task"] for row in result["results"]))
        table = Table("pruner", "tokens", *tasks, "kappa", box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for answers in evaluation.answers:
            rows = {
                row["task"]: row
                for row in result["results"]
                if (row["pruner"], row["num_tokens"]) == (answers.method.name, answers.num_tokens)
            }
            low, high = rows["all"]["ci95"]
            table.add_row(
                answers.method.name,
                f"{answers.num_tokens:.1f}" if answers.method.is_adaptive else str(answers.num_tokens),
                f"{100 * rows['all']['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})",
                *(f"{100 * rows[task]['accuracy']:.0f}" for task in tasks[1:]),
                "-" if rows["all"]["kappa"] is None else f"{rows['all']['kappa']:.2f}",
            )
        console.print(table)
        for pair in result["paired"]:
            if pair["task"] == "all":
                low, high = (100 * bound for bound in pair["ci95"])
                console.print(
                    f"\n{pair['pruner']} - {pair['against']} at {pair['num_tokens']} tokens: "
                    f"{100 * pair['difference']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}",
                    highlight=False,
                    end="",
                )
        console.print("\n\nAccuracy in per cent; in brackets the 95 % interval.", style="dim", highlight=False)

    report_result(result, json, show)
