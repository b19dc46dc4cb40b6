"""What examples/ shows runs as it stands."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from dcp_prune import registry
from dcp_prune.testbed.load import checkpoint_path
from dcp_prune.testbed.world import make_scene

EXAMPLES = Path(__file__).parents[2] / "examples"
WEAK = checkpoint_path("weak")
SCENES = [make_scene(1_000_000_000 + number) for number in range(3)]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(SCENES[0].image).save(path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_transformers_example_answers_from_sixteen_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], picture: Path
) -> None:
    question = SCENES[0].questions[0]
    run(monkeypatch, "prune_transformers.py", WEAK, picture, question.text)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(": ")[1].split()[0] == question.answer
    assert lines[1].startswith("16 visual tokens: ")
    assert "576" in "".join(lines[2:])
    assert "16" in "".join(lines[2:])


def test_the_file_example_answers_every_line_in_its_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    for number, scene in enumerate(SCENES):
        Image.fromarray(scene.image).save(tmp_path / f"{number}.png")
        asked += [
            {"image": f"{number}.png", "question": each.text, "right": each.answer} for each in scene.questions[:3]
        ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    answers = tmp_path / "answers.jsonl"
    run(monkeypatch, "answer_file.py", WEAK, tmp_path / "asked.jsonl", answers, "--num-tokens", 64, "--batch-size", 4)
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["question"] for row in rows] == [row["question"] for row in asked]
    right = sum(row["answer"].split()[:1] == [row["right"]] for row in rows)
    assert right > len(rows) / 2


def test_the_pruner_of_the_example_is_measured_beside_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", {})
    run(monkeypatch, "own_pruner.py")
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["none", "edges", "dcp", "random"]


@pytest.mark.parametrize("name", ["quickstart", "compare"])
def test_a_notebook_runs_from_top_to_bottom(name: str) -> None:
    notebook: Any = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are left out, so that none is out of date"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown)


def test_the_list_of_examples_names_every_file() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[{path.name}]({path.name})" in listed for path in EXAMPLES.glob("*.[pi]*"))
