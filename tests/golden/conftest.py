"""`pytest tests/golden --golden-dir DIR` checks any folder of the layout described in README.md here."""

from __future__ import annotations

from pathlib import Path

import pytest

DEFAULT = Path(__file__).parent / "dev"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", type=Path, default=DEFAULT, help="folder with golden files (*.npz)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        # A run over all tests meets this file too late for the option, and takes the default.
        folder = metafunc.config.getoption("--golden-dir", default=None) or DEFAULT
        files = sorted(folder.rglob("*.npz"))
        if not files:
            raise pytest.UsageError(f"no golden files (*.npz) under {folder}")
        metafunc.parametrize("golden_file", files, ids=[file.stem for file in files])
