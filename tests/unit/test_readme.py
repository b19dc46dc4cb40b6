"""What README.md and the other documents promise holds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dcp_prune.cli import main as main_of_cli
from dcp_prune.registry import get_pruner, list_pruners
from dcp_prune.report.pages import main

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text()
PAGES = ("models.md", "claims.md", "performance.md", "how-to/vllm.md")
"""Those with tables from result files."""
CATALOGUE = PROJECT / "docs" / "methods" / "README.md"
DOCUMENTS = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").rglob("*.md"))]


def test_the_tables_are_up_to_date_with_what_was_measured():
    assert main(["--check", str(PROJECT / "README.md"), *(str(PROJECT / "docs" / page) for page in PAGES)]) == 0


def test_the_python_example_runs_as_it_stands_and_reads_sixteen_tokens(tmp_path):
    # The same architecture, untrained: what is shown must run, not answer well.
    from dcp_prune.testbed.model import make_model, save

    save(make_model(), tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    hub_name = "llava-hf/llava-1.5-7b-hf"
    assert hub_name in example
    names = {"image": Image.new("RGB", (192, 192), "red")}
    exec(example.replace(hub_name, str(tmp_path)), names)
    handle, ids = names["handle"], names["ids"]
    assert (handle.last.tokens_before, handle.last.tokens_after) == (576, 16)  # type: ignore[attr-defined]
    assert ids.shape[1] > names["inputs"]["input_ids"].shape[1]  # type: ignore[attr-defined, index]


def test_the_pruners_are_listed_as_their_files_describe_them(tmp_path):
    written = tmp_path / "pruners.json"
    main_of_cli(["list", "--pruners", "--json", str(written)])
    assert written.read_text() == (PROJECT / "results" / "pruners.json").read_text(), "run `make report`"
    rows = {row["name"]: row for row in json.loads(written.read_text())["pruners"]}
    assert set(rows) == set(list_pruners())
    assert rows["scope"]["paper"] == "arXiv 2510.24214"
    assert rows["random"]["paper"] is None
    assert all(row["summary"] and (PROJECT / row["source"]).is_file() for row in rows.values())


def test_the_options_on_the_pruners_pages_are_those_of_the_code():
    command = [sys.executable, str(PROJECT / "tools" / "pruner_pages.py"), "--check"]
    checked = subprocess.run(command, check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("name", list_pruners())
def test_every_pruner_has_a_page_and_a_row(name):
    (row,) = [line for line in CATALOGUE.read_text().splitlines() if line.startswith(f"| [`{name}`](")]
    assert f"[code](../../src/{get_pruner(name).__module__.replace('.', '/')}.py)" in row
    page = re.search(r"\]\((.*?)\)", row)
    assert page is not None
    assert f"**`{name}`**: `from " in (CATALOGUE.parent / page[1]).read_text()


def test_the_architecture_page_names_every_module_but_the_methods():
    page = (PROJECT / "docs" / "architecture.md").read_text()
    package = PROJECT / "src" / "dcp_prune"
    methods = set((package / "pruners").glob("*.py")) - {package / "pruners" / "base.py"}
    modules = [path for path in package.rglob("*.py") if path.name != "__init__.py" and path not in methods]
    assert len(modules) > 20
    assert not [path.name for path in modules if not re.search(rf"\b{path.name}\b", page)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_to_a_file(document):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing
