"""The pages of docs/: their Python runs, every public name is described, and the site shows every page."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dcp_prune
from tiny_llava import make_image

PROJECT = Path(__file__).parents[2]
DOCS = PROJECT / "docs"
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
TESTED_ELSEWHERE = {
    "quickstart.md",
    "how-to/inspect.md",
    "how-to/compare.md",
    "how-to/serve.md",
    "how-to/video.md",
    "how-to/vllm.md",
    "how-to/add-a-model.md",
}


def code_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in TESTED_ELSEWHERE and code_of(page)])
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: str, model: Any, processor: Any, make_inputs: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """With what the page takes for granted: a model, its processor and inputs, and a folder with records."""
    (tmp_path / "records").symlink_to(PROJECT / "results" / "sweeps" / "natural-cluttered")
    monkeypatch.chdir(tmp_path)
    inputs = make_inputs("USER: <image> what is this ASSISTANT:")
    names: dict[str, Any] = {
        "model": model,
        "processor": processor,
        "inputs": inputs,
        "some_of_mine": [inputs],
        "pixel_values": inputs["pixel_values"],
        "questions": ["USER: <image> what is this ASSISTANT:", "USER: <image> where is the cat ASSISTANT:"],
        "image": make_image(0),
        "next_question_ids": inputs["input_ids"][:, -3:],
        "torch": torch,
    }
    for block in code_of(page):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("name", dcp_prune.__all__)
def test_every_public_name_is_described_in_its_docstring_and_in_the_api_reference(name: str) -> None:
    value = getattr(dcp_prune, name)
    assert inspect.getdoc(value), f"{name} has no docstring"
    reference = " ".join((DOCS / page).read_text(encoding="utf-8") for page in PAGES if page.startswith("api/"))
    assert re.search(rf"\b{name}\b", reference) or f"::: {value.__module__}\n" in reference


def test_the_site_builds_without_a_warning_or_a_broken_link(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, check=False, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "dcp_prune.integrations.transformers.prune" in (tmp_path / "api" / "pruning.html").read_text()
    assert (tmp_path / "repository" / "src" / "dcp_prune" / "pruners" / "dcp.py.html").is_file()


def test_the_site_shows_every_page_once() -> None:
    nav = yaml.safe_load((PROJECT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]

    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [page for part in parts for page in pages(part)]

    assert sorted(pages(nav)) == PAGES
