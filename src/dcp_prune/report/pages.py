"""Keeps the generated parts of a document up to date with the records of sweeps and with result files.

A document marks each part by what it shows and where that comes from, relative to the document:

    <!-- table:begin summary ../results/sweeps -->
    <!-- table:end -->
    <!-- table:begin cost ../results/latency-cpu.json -->
    <!-- table:end -->

The kinds are those of `sections.SECTIONS`, for a folder with records or one that holds such folders, and those of
`tables.TABLES`, for a result file. Figures go to docs/figures. `python -m dcp_prune.report.pages README.md` rewrites
what lies between the marks; with `--check` it only says whether anything would change. What was not measured yet leaves
a line that says so.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dcp_prune.errors import DcpPruneError, InvalidInputError
from dcp_prune.files import check_writable, write_atomically
from dcp_prune.report.results import find_records, load_cells
from dcp_prune.report.sections import SECTIONS, Analysis, Output
from dcp_prune.report.tables import TABLES, draw_table

MARK = re.compile(
    r"(?P<begin><!-- table:begin (?P<kind>\S+) (?P<source>\S+) -->\n).*?(?P<end><!-- table:end -->)", re.DOTALL
)


def render(text: str, folder: Path) -> tuple[str, dict[str, bytes]]:
    """The document with its parts drawn anew, and its figures by path relative to it.

    Args:
        text: of the document.
        folder: where it lies.

    Raises:
        InvalidInputError: an unknown kind, or a result file that holds no such results.
        RecordsError: records that cannot be read.
    """
    out = Output(folder, "figures" if folder.name == "docs" else "docs/figures", with_tables=False, formats=("png",))
    read: dict[str, list[Analysis]] = {}  # the parts of a page mostly share their records

    def part(kind: str, name: str) -> str:
        if kind in TABLES:
            return draw_table(kind, name, folder)
        if kind not in SECTIONS:
            raise InvalidInputError(f"unknown part {kind!r}; the kinds are {', '.join(sorted({*TABLES, *SECTIONS}))}")
        if not find_records(folder / name):
            return f"*Not measured yet: no records in `{name}`.*"
        if name not in read:
            read[name] = [Analysis(cell) for cell in load_cells([folder / name])]
        return SECTIONS[kind][1](read[name], out)

    new = MARK.sub(lambda mark: f"{mark['begin']}{part(mark['kind'], mark['source'])}\n{mark['end']}", text)
    return new, out.files


def main(arguments: Sequence[str]) -> int:
    """Rewrites the documents, or with `--check` returns 1 if that would change one or one of its figures.

    Raises:
        InvalidInputError: no document is named, or one cannot be read or written.
        RecordsError: records that cannot be read.
    """
    check = "--check" in arguments
    documents = [Path(argument) for argument in arguments if argument != "--check"]
    if not documents:
        raise InvalidInputError("name the documents to rebuild, as in: python -m dcp_prune.report.pages README.md")
    stale = []
    for document in documents:
        try:
            text = document.read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidInputError(f"cannot read {document}: {error.strerror or error}; name a document") from None
        new, figures = render(text, document.absolute().parent)
        files = {document.parent / name: data for name, data in figures.items()} | {document: new.encode()}
        for path, data in files.items():
            if path.is_file() and path.read_bytes() == data:
                continue
            stale.append(str(path))
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(check_writable(path), data)
    if check and stale:
        sys.stderr.write(f"out of date with what was measured: {', '.join(stale)}; run `make report`\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except DcpPruneError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
