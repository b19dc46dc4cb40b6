"""`make bench-gpu` on a CPU: every step leaves its record, whatever happens to the others."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "bench_gpu.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "testbed_agrees", lambda device, questions: {})
    return module


def run(tool: Any, monkeypatch: pytest.MonkeyPatch, path: Path, *more: str) -> dict[str, Any]:
    monkeypatch.setattr(
        sys, "argv", ["bench_gpu", "--tiny", "--device", "cpu", "--runs", "1", "--json", str(path), *more]
    )
    tool.main()
    return json.loads(path.read_text())


def test_the_record_holds_every_cell_and_each_has_the_limit(tool: Any, monkeypatch, tmp_path: Path) -> None:
    record = run(tool, monkeypatch, tmp_path / "gpu.json")
    assert [cell["batch"] for cell in record["cells"]] == [2, 1]
    for cell in record["cells"]:
        names = [(row["pruner"], row["num_tokens"]) for row in cell["result"]]
        assert names[0] == ("none", 64)
        assert {("limit", 4), ("limit", 16), ("dcp", 4), ("dcp_progressive", 16)} <= set(names)
    assert record["tests"]["result"]["ran"] is False
    assert record["left_out"] == []


def test_a_cell_that_fails_is_recorded_and_the_next_one_runs(tool: Any, monkeypatch, tmp_path: Path) -> None:
    inner = tool.run_cell

    def fail(cell: Any, *given: Any, **named: Any) -> Any:
        if cell.batch == 2:
            # What came before is on the disk already.
            assert "testbed" in json.loads((tmp_path / "gpu.json").read_text())
            raise RuntimeError("CUDA out of memory")
        return inner(cell, *given, **named)

    monkeypatch.setattr(tool, "run_cell", fail)
    first, second = run(tool, monkeypatch, tmp_path / "gpu.json")["cells"]
    assert first["error"] == "RuntimeError: CUDA out of memory"
    assert second["result"]


def test_cells_without_time_are_named(tool: Any, monkeypatch, tmp_path: Path) -> None:
    record = run(tool, monkeypatch, tmp_path / "gpu.json", "--minutes", "0")
    assert record["cells"] == []
    assert [cell["batch"] for cell in record["left_out"]] == [2, 1]
