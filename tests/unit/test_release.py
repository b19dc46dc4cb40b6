"""What is released installs and runs outside the repository: sdist and wheel, in environments of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from PIL import Image

PROJECT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, command)], check=False, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds both; the wheel is built from the sdist, so that nothing is missing there."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, PROJECT, cwd=folder)
    return folder


def test_the_description_renders_and_both_forms_are_there(dist: Path) -> None:
    assert {path.suffix for path in dist.iterdir()} == {".whl", ".gz"}
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist)


@pytest.mark.parametrize("form", ["*.whl", "*.tar.gz"])
def test_it_answers_a_question_in_an_environment_of_its_own(dist: Path, tmp_path: Path, form: str) -> None:
    """Dependencies are those of the running environment, which are gigabytes; the package itself is installed anew."""
    (package,) = dist.glob(form)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", package, cwd=tmp_path)
    installed = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (installed / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    where = run(python, "-c", "import dcp_prune; print(dcp_prune.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)
    program = tmp_path / "env" / "bin" / "dcp-prune"
    assert run(program, "--version", cwd=tmp_path).startswith("dcp-prune ")
    Image.new("RGB", (336, 336), "red").save(tmp_path / "red.png")
    asked = ("--image", "red.png", "--question", "what color is the cat ?", "--model", "testbed-weak")
    assert "16 of 576 visual tokens" in run(program, "run", *asked, cwd=tmp_path)
