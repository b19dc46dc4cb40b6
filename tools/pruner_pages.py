"""Writes the generated parts of docs/methods/: the table of all pruners, and the options on each page.

What it writes comes from `results/pruners.json` (`dcp-prune list --pruners --json`), the registry and the docstrings.
`python tools/pruner_pages.py` rewrites what lies between the marks; `--check` only says whether anything would change.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

from docstring_parser import parse

from dcp_prune.pruners.base import Pruner
from dcp_prune.pruners.options import Checked, default_of, groups_of
from dcp_prune.registry import get_pruner, list_pruners

PROJECT = Path(__file__).resolve().parents[1]
PAGES = PROJECT / "docs" / "methods"
SHARED = {each.name for each in fields(Pruner)}
"""Options of every pruner; methods/README.md describes them once."""


def page_of(name: str) -> Path:
    """The page of a pruner: both forms of DCP-Prune share one."""
    return PAGES / ("dcp.md" if name.startswith("dcp") else f"{name}.md")


def catalogue() -> str:
    """One row per pruner: `dcp` first, then the published ones, the floors last."""
    rows = json.loads((PROJECT / "results" / "pruners.json").read_text(encoding="utf-8"))["pruners"]
    rows.sort(key=lambda row: (row["paper"] is None, not row["name"].startswith("dcp"), row["name"]))
    lines = ["| name | what it keeps | it reads | source |", "| --- | --- | --- | --- |"]
    for row in rows:
        where, _, number = (row["paper"] or "").partition(" ")
        paper = f"[paper](https://arxiv.org/abs/{number})" if where == "arXiv" else row["paper"]
        links = ", ".join(filter(None, [f"[code](../../{row['source']})", paper]))
        reads = ", ".join(f"`{signal}`" for signal in row["reads"]) or "features alone"
        lines.append(f"| [`{row['name']}`]({page_of(row['name']).name}) | {row['summary']} | {reads} | {links} |")
    return "\n".join(lines)


def options(cls: type[Checked]) -> str:
    """One row per option of the class itself, as its docstring describes it."""
    text = {each.arg_name: each.description for each in parse(cls.__doc__ or "").params}
    own = [each for each in fields(cls) if each.name not in SHARED | groups_of(cls).keys()]
    if not own:
        return ""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for each in own:
        meaning = " ".join((text.get(each.name) or "").split()).replace("|", "\\|")
        lines.append(f"| `{each.name}` | `{default_of(each)!r}` | {meaning} |")
    return "\n".join(lines)


def card(name: str) -> str:
    """What a program needs to know of a pruner: import, signals, options."""
    cls = get_pruner(name)
    needs = ", ".join(f"`{signal.value}`" for signal in sorted(cls.requires)) or "nothing but features"
    uses = ", ".join(f"`{signal.value}`" for signal in sorted(cls.optional))
    head = f"**`{name}`**: `from {cls.__module__} import {cls.__name__}`."
    if (parent := cls.__mro__[1]) in map(get_pruner, list_pruners()):
        return f"{head} It has the options of `{parent.__name__}`."
    parts = [
        f"{head} It needs {needs}" + (f", and uses {uses} where they exist." if uses else "."),
        options(cls) or "It has no options of its own.",
    ]
    for group, kind in groups_of(cls).items():
        parts += [f"Options in the group `{group}={kind.__name__}(...)`:", options(kind)]
    return "\n\n".join(parts)


def render(page: Path) -> str:
    """The page with its generated parts as they should be.

    Raises:
        ValueError: the page lacks a mark.
    """
    text = page.read_text(encoding="utf-8")
    if page.name == "README.md":
        return _between(text, "pruners", catalogue(), page)
    names = [name for name in list_pruners() if page_of(name) == page]
    return _between(text, "options", "\n\n".join(card(name) for name in names), page)


def _between(text: str, mark: str, content: str, page: Path) -> str:
    new, count = re.subn(
        rf"(<!-- {mark}:begin -->\n).*?(<!-- {mark}:end -->)",
        lambda found: f"{found[1]}{content}\n{found[2]}",
        text,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"{page} needs the lines <!-- {mark}:begin --> and <!-- {mark}:end --> once")
    return new


def main(arguments: list[str]) -> int:
    """Rewrites the pages, or with `--check` returns 1 if that would change one."""
    pages = sorted({PAGES / "README.md", *map(page_of, list_pruners())})
    stale = [page for page in pages if render(page) != page.read_text(encoding="utf-8")]
    for page in stale:
        if "--check" in arguments:
            print(f"out of date: {page.relative_to(PROJECT)}; run `make report`", file=sys.stderr)
        else:
            page.write_text(render(page), encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
