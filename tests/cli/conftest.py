"""The command line in this process, with the testbed's architecture and random weights instead of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dcp_prune import assistant as assistant_module
from dcp_prune.cli import main
from dcp_prune.eval.data import testbed as testbed_questions
from dcp_prune.testbed import worlds
from dcp_prune.testbed.model import make_model, make_processor
from dcp_prune.testbed.world import make_scene


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def random_testbed() -> tuple[Any, Any]:
    return make_model(0).eval(), make_processor()


@pytest.fixture
def dcp_prune(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    random_testbed: tuple[Any, Any],
) -> Callable[..., Outcome]:
    """Runs one command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(assistant_module, "load", lambda checkpoint: random_testbed)
    # Whatever checkpoint is asked for, the model is of the first world.
    for module in (worlds, testbed_questions, assistant_module):
        monkeypatch.setattr(module, "world_of", lambda checkpoint: worlds.FIRST)

    def run(*arguments: object) -> Outcome:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "scene.png"
    Image.fromarray(make_scene(1_000_000_000).image).resize((300, 240)).save(path)
    return path
