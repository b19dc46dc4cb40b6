"""A folder with everything that records show: report.md, its tables in two forms, its figures in two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.statistics.bootstrap import RESAMPLES
from dcp_prune.files import write_atomically
from dcp_prune.report.results import load_cells
from dcp_prune.report.sections import SECTIONS, Analysis, Output


def build(
    folders: Sequence[str | Path],
    output: Path,
    *,
    resamples: int = RESAMPLES,
    progress: Callable[[str], None] = lambda title: None,
) -> dict[str, bytes]:
    """The report's files by path relative to `output`; `report.md` is the last. Writes nothing.

    Args:
        folders: records folders, or folders that hold some; what has the same model and questions is one cell.
        output: where the report will lie, for its links to the records.
        resamples: draws of images behind every interval.
        progress: called with the title of each part before it is made.

    Raises:
        RecordsError: folders that cannot be read or do not belong together, see `load_cells`.
    """
    analyses = [Analysis(cell, resamples) for cell in load_cells(folders)]
    out = Output(output)
    page = ["# Report"]
    for title, make in SECTIONS.values():
        progress(title)
        page.append(f"## {title}\n\n{make(analyses, out)}")
    return {**out.files, "report.md": ("\n\n".join(page) + "\n").encode()}


def prepare(output: Path) -> Path:
    """Makes the output folder if it is not there.

    Raises:
        InvalidInputError: it is a file, or cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InvalidInputError(f"cannot write a report to {output}: it is a file; name a folder") from None
    except OSError as error:
        raise InvalidInputError(f"cannot make the folder {output}: {error.strerror or error}; name another") from None
    return output


def write(files: dict[str, bytes], output: Path) -> None:
    """Writes each file atomically; the page comes last, so that it never speaks of figures that are not there.

    Raises:
        InvalidInputError: the folder cannot be written.
    """
    prepare(output)
    try:
        for name, data in files.items():
            path = output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
    except OSError as error:
        raise InvalidInputError(f"cannot write {output}: {error.strerror or error}; name another folder") from None
