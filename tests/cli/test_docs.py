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


@pytest.mark.parametrize(
    "page", [*PAGES, "how-to/sweep.md", "how-to/profile.md", "how-to/batch.md", "how-to/serve.md", "how-to/vllm.md"]
)
def test_the_pages_commands_are_understood(page: str) -> None:
    commands = re.findall(r"^    dcp-prune (.*)$", (DOCS / page).read_text(), re.MULTILINE)
    assert commands
    for command in commands:
        app.parse_args(_with_bare_json(shlex.split(command, comments=True)))
    with pytest.raises(cyclopts.CycloptsError):
        app.parse_args(["run", "--no-such-option"])
