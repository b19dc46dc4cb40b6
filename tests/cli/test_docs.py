"""What the pages tell a newcomer to type works as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import cyclopts
import pytest

from dcp_prune import assistant as assistant_module
from dcp_prune.cli import _with_bare_json, app
from dcp_prune.testbed import load as load_module

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("quickstart.md", "how-to/inspect.md", "how-to/compare.md")


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_python_runs(
    page: str, tmp_path: Path, picture: Path, random_testbed: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photo.png").write_bytes(picture.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load_module, "load", lambda *_: random_testbed)
    monkeypatch.setattr(assistant_module, "load", lambda *_: random_testbed)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def commands_of(page: Path) -> list[str]:
    """Every `dcp-prune` command that a page shows, indented or in a block of shell."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    indented = re.findall(r"^    dcp-prune (.*)$", text, re.MULTILINE)
    return [*indented, *re.findall(r"^ *dcp-prune (.*)$", blocks, re.MULTILINE)]


WITH_COMMANDS = [page for page in sorted(DOCS.rglob("*.md")) if commands_of(page)]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_every_command_of_a_page_is_understood(page: Path) -> None:
    for command in commands_of(page):
        app.parse_args(_with_bare_json(shlex.split(command, comments=True)))


def test_a_command_that_is_not_understood_is_noticed() -> None:
    assert len(WITH_COMMANDS) > 8
    with pytest.raises(cyclopts.CycloptsError):
        app.parse_args(["run", "--no-such-option"])
