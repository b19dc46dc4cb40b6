"""Markdown tables from result files, and the command that keeps a document's tables up to date.

A document marks each table by where it comes from, relative to the document:

    <!-- table:begin quality results/testbed.json -->
    <!-- table:end -->

`python -m dcp_prune.report.tables README.md` rewrites what lies between the marks; with `--check` it only says whether
anything would change. A result file that does not exist yet leaves a line that says so.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dcp_prune.errors import DcpPruneError, InvalidInputError
from dcp_prune.files import check_writable, write_atomically

Result = Mapping[str, Any]
"""A result file: `results`, a list of rows, and the `environment` that they were measured in."""

NONE = "none"
"""Pruner of the rows that were not pruned: all tokens, or, with 0 tokens, no image."""

MARK = re.compile(
    r"(?P<begin><!-- table:begin (?P<kind>\S+) (?P<file>\S+) -->\n).*?(?P<end><!-- table:end -->)", re.DOTALL
)


def quality(result: Result) -> str:
    """Accuracy in per cent with its 95 % interval for each pruner (row) and number of visual tokens (column).

    Rows go from the best to the worst at the smallest budget. All tokens and no image, where they were measured, are
    the upper bound above the table's rows and the floor below them.
    """
    rows = [row for row in result["results"] if row["task"] == "all"]
    bounds = [row for row in rows if row["pruner"] == NONE]
    pruned = [row for row in rows if row["pruner"] != NONE]
    budgets = sorted({row["num_tokens"] for row in pruned}, reverse=True)
    cells = {(row["pruner"], row["num_tokens"]): row for row in pruned}
    names = sorted({row["pruner"] for row in pruned}, key=lambda name: _order(cells, name, budgets), reverse=True)

    header = ["pruner", *(f"{budget} tokens" for budget in budgets)]
    header += [f"kappa at {budget}" for budget in budgets[-1:]]
    body = []
    for name in names:
        found = [cells.get((name, budget)) for budget in budgets]
        body.append([f"`{name}`", *(_accuracy(row) for row in found), _kappa(found[-1])])
    upper = [[_name(row), *_spread(row, len(budgets)), _kappa(row)] for row in bounds if row["num_tokens"] != 0]
    floor = [[_name(row), *_spread(row, len(budgets)), ""] for row in bounds if row["num_tokens"] == 0]
    return _markdown(header, upper + body + floor)


def tasks(result: Result) -> str:
    """Accuracy in per cent for each pruner (row) and task (column) at the smallest number of visual tokens."""
    rows = result["results"]
    smallest = min(row["num_tokens"] for row in rows if row["pruner"] != NONE)
    names = list(dict.fromkeys(row["task"] for row in rows))
    kept = [row for row in rows if row["pruner"] == NONE or row["num_tokens"] == smallest]
    table: dict[str, dict[str, str]] = {}
    for row in kept:
        table.setdefault(_name(row), {})[row["task"]] = f"{100 * row['accuracy']:.1f}"
    body = [[name, *(cells.get(task, "") for task in names)] for name, cells in table.items()]
    return _markdown([f"at {smallest} tokens", *names], body)


def paired(result: Result) -> str:
    """The first pruner's lead in points over each other one (row) at each budget (column), on the same questions."""
    rows = [row for row in result["paired"] if row["task"] == "all"]
    budgets = sorted({row["num_tokens"] for row in rows}, reverse=True)
    cells = {(row["against"], row["num_tokens"]): row for row in rows}
    body = [
        [f"`{against}`", *(_lead(cells.get((against, budget))) for budget in budgets)]
        for against in dict.fromkeys(row["against"] for row in rows)
    ]
    first = rows[0]["pruner"] if rows else "first"
    return _markdown([f"lead of `{first}` over", *(f"{budget} tokens" for budget in budgets)], body)


def cost(result: Result) -> str:
    """What one image costs up to the first new token, each pruner against no pruning: medians of interleaved runs."""
    header = ["pruner", "visual tokens", "time to first token", "speed-up", "of it selection", "KV cache", "prefill"]
    body = [
        [
            _name(row),
            str(row["num_tokens"]),
            f"{row['ttft_ms']:,.0f} ms",
            f"{1 / row['ttft_ratio']:.2f} x",
            "" if row["selection_share"] is None else f"{row['selection_share']:.1%}".replace("%", " %"),
            f"{row['kv_cache_bytes'] / 2**20:.2f} MiB",
            f"{row['prefill_flops'] / 1e9:,.0f} GFLOP",
        ]
        for row in result["results"]
    ]
    return _markdown(header, body)


def published(result: Result) -> str:
    """Mean share of the unpruned score as the paper reports it, in per cent, for LLaVA-1.5-7B: not measured here."""
    model = result["llava-1.5-7b"]
    budgets = sorted((key for key in model if key.isdigit()), key=int, reverse=True)
    smallest = model[budgets[-1]]
    names = sorted(smallest, key=lambda name: smallest[name][-1], reverse=True)
    body = [[name, *(f"{model[budget][name][-1]:.1f}" for budget in budgets)] for name in names]
    return _markdown(["method", *(f"{budget} tokens" for budget in budgets)], body)


def selection(result: Result) -> str:
    """What choosing tokens costs by itself: CPU ms (wall ms) of each pruner, its authors' code, and which is faster."""
    times, theirs = _times(result["results"]), _times((result.get("authors") or {"results": []})["results"])
    settings = list(dict.fromkeys(setting for _, setting in times))
    header = ["pruner"]
    for images, tokens, kept in settings:
        header += [f"{images} x {tokens}, {kept} each: ours", "authors'", "verdict"]
    body = []
    for name in sorted({name for name, _ in times}):
        cells = [f"`{name}`"]
        for setting in settings:
            ours, other = times.get((name, setting)), theirs.get((name, setting))
            cells += [_clocks(ours), _clocks(other), "" if ours is None or other is None else _verdict(ours, other)]
        body.append(cells)
    return _markdown(header, body)


TABLES: Mapping[str, Callable[[Result], str]] = {
    "quality": quality,
    "tasks": tasks,
    "paired": paired,
    "cost": cost,
    "published": published,
    "selection": selection,
}
"""Name in a document's mark -> what draws the table."""


def rebuild(text: str, folder: Path) -> str:
    """`text` with every marked table drawn anew from result files under `folder`.

    Raises:
        InvalidInputError: a mark names no known kind of table, or a file that is no result file.
    """

    def draw(mark: re.Match[str]) -> str:
        kind, name = mark["kind"], mark["file"]
        if kind not in TABLES:
            raise InvalidInputError(f"a table mark asks for {kind!r}; the kinds are {', '.join(sorted(TABLES))}")
        return f"{mark['begin']}{draw_table(kind, name, folder)}\n{mark['end']}"

    return MARK.sub(draw, text)


def main(arguments: Sequence[str]) -> int:
    """Rebuilds the tables of each named document; with `--check`, returns 1 if one of them is out of date."""
    check = "--check" in arguments
    documents = [Path(name) for name in arguments if name != "--check"]
    if not documents:
        raise InvalidInputError("name at least one document: python -m dcp_prune.report.tables [--check] README.md")
    stale = []
    for document in documents:
        if not document.is_file():
            raise InvalidInputError(f"there is no document {document}")
        text = document.read_text(encoding="utf-8")
        new = rebuild(text, document.parent)
        if new == text:
            continue
        stale.append(str(document))
        if not check:
            write_atomically(check_writable(document), new.encode())
    if check and stale:
        sys.stderr.write(f"out of date with the result files: {', '.join(stale)}; run `make readme`\n")
    return 1 if check and stale else 0


def draw_table(kind: str, name: str, folder: Path) -> str:
    """A result file's table with a line on where it comes from; a file that is not there yet is said to be missing.

    Raises:
        InvalidInputError: the file holds no such results.
    """
    path = folder / name
    if not path.is_file():
        return f"*Not measured yet: no `{name}`.*"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return f"{TABLES[kind](result)}\n\n{_source(name, result)}"
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{path} holds no {kind} results ({error!r}); write it anew") from error


def _source(name: str, result: Result) -> str:
    """One line that says where the numbers come from."""
    if "source" in result:
        return f"<sub>{result['source']}. Data: [`{name}`]({name}).</sub>"
    environment = result["environment"]
    versions = ", ".join(f"{package} {environment['packages'][package]}" for package in ("torch", "transformers"))
    device = " + ".join([*environment["gpus"], f"{environment['cpu']}, {environment['threads']} threads"])
    about = f"{result['description']} " if "description" in result else ""
    if "questions" in result:
        asked = result["questions"]
        model = f", checkpoint `{result['checkpoint']}`" if "checkpoint" in result else ""
        about = (
            f"{asked['questions']:,} questions about {asked['images']:,} {asked['split']} images, "
            f"difficulty `{asked['difficulty']}`{model}; 95 % intervals. "
        )
    return f"<sub>{about}Source: [`{name}`]({name}); {versions}; {device}.</sub>"


def _name(row: Result) -> str:
    if row["pruner"] != NONE:
        return f"`{row['pruner']}`"
    return "all tokens" if row["num_tokens"] else "no image"


def _times(rows: Sequence[Result]) -> dict[tuple[str, tuple[int, int, int]], Result]:
    return {(row["pruner"], (row["images"], row["tokens"], row["num_tokens"])): row for row in rows}


def _clocks(row: Result | None) -> str:
    return "" if row is None else f"{_brief(row['cpu_ms'])} ({_brief(row['wall_ms'])}){'*' * ('one_sequence' in row)}"


def _brief(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 9.95 else f"{milliseconds:.1f}"


def _verdict(ours: Result, theirs: Result) -> str:
    """By CPU time; within a twentieth the two are called equal."""
    factor = theirs["cpu_ms"] / ours["cpu_ms"]
    if 0.95 <= factor <= 1.05:
        return "equal"
    return f"{factor:.1f} x faster" if factor > 1 else f"{1 / factor:.1f} x slower"


def _lead(row: Result | None) -> str:
    if row is None:
        return ""
    low, high = row["ci95"]
    return f"{100 * row['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _order(cells: Mapping[tuple[str, int], Result], name: str, budgets: Sequence[int]) -> tuple[float, ...]:
    """Accuracy at the smallest budget first; what was not measured there comes last."""
    return tuple(cells[name, budget]["accuracy"] if (name, budget) in cells else -1.0 for budget in reversed(budgets))


def _accuracy(row: Result | None) -> str:
    if row is None:
        return ""
    low, high = row["ci95"]
    return f"{100 * row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _spread(row: Result, columns: int) -> list[str]:
    """A bound holds at every budget: it is written once, in the first column."""
    return [_accuracy(row), *[""] * (columns - 1)]


def _kappa(row: Result | None) -> str:
    return "" if row is None or row["kappa"] is None else f"{row['kappa']:.2f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column reads from the left, numbers from the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except DcpPruneError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
