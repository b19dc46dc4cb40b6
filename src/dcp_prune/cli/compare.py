"""`compare`: what pruning changes on one's own images and questions, without knowing the right answers."""

from __future__ import annotations

from math import floor
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from dcp_prune.cli.common import (
    Budgets,
    Json,
    Model,
    Whole,
    app,
    check_outputs,
    environment_now,
    load_assistant,
    note,
    progress_bar,
    report_result,
    whole_numbers,
)
from dcp_prune.errors import InvalidInputError

EXAMPLES = 3


@app.command
def compare(
    *,
    images: Annotated[Path, Parameter(help="The folder with your images.")],
    questions: Annotated[
        Path,
        Parameter(
            help="A text file with one question per line, each asked about every image; or JSON lines with the keys "
            "image and question."
        ),
    ],
    num_tokens: Annotated[
        list[str] | None,
        Budgets,
        Parameter(help="Numbers of visual tokens to keep, separated by commas. Default: 16,32,64,128."),
    ] = None,
    model: Model = "testbed",
    pruner: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            help="A pruner as name or name(option=value, ...). Repeat the option to compare several. Default: dcp.",
        ),
    ] = None,
    keep: Annotated[float, Parameter(help="The share of answers that must stay the same, below 1.")] = 0.95,
    max_new_tokens: Annotated[int, Whole, Parameter(help="The longest answer, in tokens.")] = 32,
    batch_size: Annotated[int, Whole, Parameter(help="How many questions to answer at once.")] = 8,
    json: Json = None,
) -> None:
    """Find out how few visual tokens are enough for your own images and questions. You need no right answers.

    The model answers every question with all visual tokens and with each number of tokens. A table shows how many
    answers stay the same, how far the distribution of the first word moves, and what it costs. The last lines name the
    smallest number of tokens that keeps the wanted share of answers, with 95 % confidence for images like these.
    Questions about one image count as belonging together.
    """
    budgets = sorted(whole_numbers(num_tokens or ["16,32,64,128"]), reverse=True)
    if budgets[-1] < 1:
        raise InvalidInputError(f"--num-tokens must be at least 1, got {budgets[-1]}")
    names = list(dict.fromkeys(pruner or ["dcp"]))
    for option, value in (("--max-new-tokens", max_new_tokens), ("--batch-size", batch_size)):
        if value < 1:
            raise InvalidInputError(f"{option} must be at least 1, got {value}")
    from dcp_prune.eval.data.pictures import check_pictures, read_pictures, sizes_of

    asked = read_pictures(images, questions)
    check_outputs(json, inputs=(questions, model, *asked.images))

    from dcp_prune.eval.compare import check_method
    from dcp_prune.eval.compare import compare as run
    from dcp_prune.eval.specs import plan
    from dcp_prune.eval.verdict import check_keep, decide, summarise, too_few

    check_keep(keep)
    methods = plan(names, budgets)
    for method in methods:
        check_method(method)
    with progress_bar("Reading the images", then="Reading the images") as advance:
        remarks = check_pictures(asked.images, advance)
    doubt = too_few(asked, keep, len(names))
    for remark in (*asked.notes, *remarks, *([doubt] if doubt else [])):
        note(remark)
    with progress_bar("Loading the model") as advance:
        assistant = load_assistant(model)
        if strange := assistant.doubt((each.question for each in asked.asked), sizes_of(asked.images)):
            note(strange)
        comparison = run(
            assistant.model,
            assistant.processor,
            asked,
            methods,
            prompt=assistant.prompt,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=advance,
        )
    verdicts = decide(comparison, keep)
    result: dict[str, Any] = {
        "model": assistant.name,
        "keep": keep,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        **summarise(comparison, verdicts),
        "environment": environment_now(),
    }

    def show(console: Console) -> None:
        console.print(
            f"{result['questions']:,} questions about {result['images']:,} images, {assistant.name}\n",
            highlight=False,
            markup=False,
        )
        console.print(_table(result))
        for example in _changed(result):
            console.print(example, highlight=False, markup=False)
        console.print()
        for verdict in verdicts:
            console.print(verdict.sentence, highlight=False, markup=False)
        console.print(
            "\nsame: answers equal to those with all tokens but for case, punctuation and articles; in brackets the "
            "lower bound.\nexact: to the letter. KL: divergence of the first new token's distribution from that with "
            "all tokens, in nats.\nkappa: shift of the visual tokens. ms: to the first new token, encoder included.",
            style="dim",
            highlight=False,
        )

    report_result(result, json, show)


def _table(result: dict[str, Any]) -> Table:
    table = Table("pruner", "tokens", "same", "exact", "KL", "kappa", "prefill", "KV MiB", "GFLOP", "ms",
                  box=None, pad_edge=False)  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for row in ({"pruner": "all tokens", **result["all_tokens"]}, *result["results"]):
        quality = ("", "", "", "")
        if "agreement" in row:
            quality = (
                f"{100 * row['agreement']:.1f} % (>= {floor(1000 * row['agreement_at_least']) / 10:.1f})",
                f"{100 * row['exact_agreement']:.1f} %",
                f"{row['kl_first_token_nats']:.3f}",
                f"{row['kappa']:.2f}",
            )
        table.add_row(
            row["pruner"],
            str(row["visual_tokens"]),
            *quality,
            f"{row['prefill_tokens']:.0f}",
            f"{row['kv_cache_bytes'] / 2**20:.2f}",
            "-" if row["prefill_flops"] is None else f"{row['prefill_flops'] / 1e9:,.1f}",
            f"{row['first_token_ms']:,.0f}",
        )
    return table


def _changed(result: dict[str, Any]) -> list[str]:
    """A few answers that the largest budget with any change changed: numbers alone do not say how bad a change is."""
    for place in range(len(result["results"])):
        rows = [(row, row["pruned"][place]) for row in result["answers"] if not row["pruned"][place]["same"]]
        if rows:
            pruner, tokens = rows[0][1]["pruner"], rows[0][1]["num_tokens"]
            return [
                f"\n{pruner} at {tokens} tokens changed {len(rows):,} of {len(result['answers']):,} answers, such as",
                *(
                    f"  {Path(row['image']).name}: {row['question']}  {row['all_tokens'][:60]!r} -> "
                    f"{pruned['answer'][:60]!r}"
                    for row, pruned in rows[:EXAMPLES]
                ),
            ]
    return []
