"""`report`: records of sweeps as figures and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from dcp_prune.cli.common import Whole, app
from dcp_prune.errors import InvalidInputError

MOST_RESAMPLES = 50_000
"""More would fill the memory, and no interval would look different."""


@app.command
def report(
    *records: Annotated[Path, Parameter(help="Folders that a sweep wrote, or folders that hold such folders.")],
    output: Annotated[Path, Parameter(help="Folder to write to; made if it is not there.")],
    resamples: Annotated[int, Whole, Parameter(help="Draws of images behind every interval.")] = 2000,
) -> None:
    """Turn the records of sweeps into figures and tables, with 95 % intervals.

    Records of the same model and the same questions belong together, whichever folder they lie in. The folder
    gets report.md, all its tables in markdown and LaTeX (booktabs), and its figures as PNG and SVG: accuracy and kappa
    against kept tokens, relative scores plain and above the no-image floor, paired leads, the ablation, the effect of
    noise in the question, and which distance predicts the loss. Images are resampled, for all methods together.
    """
    if not records:
        raise InvalidInputError("name at least one folder with the records of a sweep")
    if not 100 <= resamples <= MOST_RESAMPLES:
        raise InvalidInputError(f"--resamples must be from 100 to {MOST_RESAMPLES}, got {resamples}")
    from dcp_prune.report.build import build, prepare, write

    with Console(stderr=True).status("Reading") as status:
        prepare(output)
        files = build(
            records, output, resamples=resamples, progress=lambda title: status.update(f"{title[0].upper()}{title[1:]}")
        )
        write(files, output)
    figures = sum(name.startswith("figures/") for name in files)
    tables = sum(name.startswith("tables/") for name in files)
    Console(soft_wrap=True).print(
        f"{output / 'report.md'}: {figures} figures, {tables} tables", highlight=False, markup=False
    )
