"""A hook of mkdocs: files of the repository that a page links to become pages of the site, so that every link works.

On GitHub a page of docs/ may link to `../src/dcp_prune/budget.py`. The site has no such file, so this hook adds a page
`repository/src/dcp_prune/budget.py.md` with the file's text, and turns the link.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PROJECT = Path(__file__).resolve().parents[1]
DOCS = PROJECT / "docs"
LINK = re.compile(r"(\]\()(?!\w+:)([^)#\s]+)((?:#[^)\s]*)?\))")
"""A relative link: its opening, its path, and the rest with the anchor."""
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".yml": "yaml", ".sh": "bash"}
_homes: dict[str, Path] = {}
"""For each page its file in the repository, by path within the site."""


def on_files(files: Files, config: Any) -> Files:
    """Adds what pages link to, and what that links to in turn."""
    _homes.clear()
    waiting = [(file.src_uri, DOCS / file.src_uri) for file in files.documentation_pages()]
    while waiting:
        page, home = waiting.pop()
        _homes[page] = home
        for target in _outside(home):
            name = _page_of(target)
            if name in _homes or files.get_file_from_path(name) is not None:
                continue
            if (text := _as_page(target)) is None:
                files.append(File.generated(config, name, abs_src_path=str(target)))
            else:
                files.append(File.generated(config, name, content=text))
            if target.suffix == ".md":
                waiting.append((name, target))
            _homes.setdefault(name, target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links that leave docs/ to the pages that `on_files` added."""
    name = page.file.src_uri
    home = _homes.get(name)
    if home is None or (name.startswith("repository/") and home.suffix != ".md"):
        return markdown

    def turned(link: re.Match[str]) -> str:
        target = (home.parent / link[2]).resolve()
        if not target.exists():
            return link[0]
        return f"{link[1]}{os.path.relpath(_page_of(target), Path(name).parent)}{link[3]}"

    return LINK.sub(turned, markdown)


def _outside(home: Path) -> list[Path]:
    """Files of the repository outside docs/ that a file links to."""
    if home.suffix != ".md":
        return []
    targets = {(home.parent / link[2]).resolve() for link in LINK.finditer(home.read_text(encoding="utf-8"))}
    return sorted(
        target
        for target in targets
        if target.exists() and target.is_relative_to(PROJECT) and not target.is_relative_to(DOCS)
    )


def _page_of(target: Path) -> str:
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    name = f"repository/{target.relative_to(PROJECT).as_posix()}"
    if target.is_dir():
        return f"{name}/index.md"
    return f"{name}.md" if target.suffix in LANGUAGES else name


def _as_page(target: Path) -> str | None:
    """The page of a file, or of a folder; None for a file that is no text and is copied."""
    if target.suffix == ".md":
        return target.read_text(encoding="utf-8")
    head = f"---\nsearch:\n  exclude: true\n---\n# {target.relative_to(PROJECT).as_posix()}\n\n"
    if target.is_dir():
        return head + "".join(f"- `{each.name}`\n" for each in sorted(target.iterdir()))
    if target.suffix in LANGUAGES:
        return f"{head}````{LANGUAGES[target.suffix]}\n{target.read_text(encoding='utf-8')}\n````\n"
    return None
