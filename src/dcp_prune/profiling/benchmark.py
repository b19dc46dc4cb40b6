"""What the benchmarks share: variants that take turns, and how a result is shown and written."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from cyclopts import App
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dcp_prune.environment import environment
from dcp_prune.errors import DcpPruneError, InvalidInputError
from dcp_prune.files import check_outputs, to_json, write_atomically

Sample = TypeVar("Sample")


def take_turns(
    names: Iterable[str], rounds: Iterable[Any], measure: Callable[[str], Sample]
) -> Iterator[dict[str, Sample]]:
    """Measures everybody once in every round, in a new order each time, always the same orders."""
    order, names = random.Random(0), list(names)
    for _ in rounds:
        shuffled = names.copy()
        order.shuffle(shuffled)
        yield {name: measure(name) for name in shuffled}


class Report:
    """The end of a benchmark's command: a table on the screen, and a result file if one is asked for.

    Args:
        json: the file.
        runs: rounds that count.
        reads: files that are read, and so not to be written to.

    Raises:
        InvalidInputError: no round, or a file that cannot be written or is read.
    """

    def __init__(self, json: Path | None, runs: int, *, reads: Sequence[Path] = ()) -> None:
        if runs < 1:
            raise InvalidInputError(f"a median needs at least one round, got --runs {runs}")
        check_outputs([] if json is None else [json], reads)
        self.target = json
        self.runs = runs
        self.console = Console()

    def track(self, rounds: Sequence[int], what: str) -> Any:
        """The rounds under a progress bar."""
        return track(rounds, description=what, console=self.console, transient=True)

    def say(self, sentence: str) -> None:
        self.console.print(sentence, highlight=False)

    def finish(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], costs: Iterable[Any], **more: Any
    ) -> None:
        """Shows the table and writes the costs, which are dataclasses, with what else there is to say of them."""
        table = Table("pruner", title=title)
        for column in columns:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
        if self.target is not None:
            made_in = more.pop("environment", None) or environment()
            result = {**more, "runs": self.runs, "results": [asdict(cost) for cost in costs], "environment": made_in}
            write_atomically(self.target, to_json(result).encode())
            self.say(f"wrote {self.target}")


def run_command(app: App, arguments: Sequence[str] | None) -> int:
    """The exit code of a command; what the user got wrong is one sentence on stderr and code 2."""
    try:
        app(arguments, result_action="return_value")
    except DcpPruneError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0
