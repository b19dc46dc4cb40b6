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
    *records: Annotated[Path, Parameter(help="Folders that a sweep wrote, or folders that contain such folders.")],
    output: Annotated[Path, Parameter(help="The folder to write to. It is created if it does not exist.")],
    resamples: Annotated[int, Whole, Parameter(help="How many times images are drawn anew for each interval.")] = 2000,
) -> None:
    """Turn the records of sweeps into figures and tables, with 95 % intervals.

    Records of the same model and the same questions belong together, whatever folder they are in. The output folder
    gets report.md, all tables in markdown and LaTeX (booktabs), and all figures as PNG and SVG: accuracy and kappa
    against kept tokens, relative scores plain and above the no-image floor, paired leads, the ablation, the effect of
    noise in the question, and which distance predicts the loss. Intervals resample images, for all methods together.
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
