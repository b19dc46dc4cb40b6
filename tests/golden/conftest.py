"""`pytest tests/golden --golden-dir DIR` checks any folder of the layout described in README.md here."""

from __future__ import annotations

from pathlib import Path

import pytest

DEFAULT = Path(__file__).parent / "dev"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", type=Path, default=DEFAULT, help="folder with golden files (*.npz)")


def pytest_configure(config: pytest.Config) -> None:
    if not golden_files(config):
        raise pytest.UsageError(
            f"--golden-dir: there is no golden file (*.npz) in or below {golden_folder(config)}; name a folder of the "
            "layout that tests/golden/README.md describes"
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        files = golden_files(metafunc.config)
        metafunc.parametrize("golden_file", files, ids=[file.stem for file in files])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line per file, when the golden files are what was asked for."""
    reports = [
        (dict(report.user_properties)["golden"], outcome, report)
        for outcome in ("passed", "failed", "skipped")
        for report in terminalreporter.getreports(outcome)
        if "golden" in dict(report.user_properties)
    ]
    if not reports or config.getoption("--golden-dir", default=None) is None:
        return
    terminalreporter.section(f"golden files of {golden_folder(config)}")
    width = max(len(name) for name, _, _ in reports)
    for name, outcome, report in sorted(reports, key=lambda row: row[0]):
        told = dict(report.user_properties).get("compared", "")
        if outcome == "skipped" and isinstance(report.longrepr, tuple):
            told = report.longrepr[2].removeprefix("Skipped: ")
        if outcome == "failed":
            told = _cause(report)
        terminalreporter.write_line(f"{name:<{width}}  {outcome:<7}  {told}")


def golden_folder(config: pytest.Config) -> Path:
    # A run over all tests meets this file too late for the option, and takes the default.
    return config.getoption("--golden-dir", default=None) or DEFAULT


def golden_files(config: pytest.Config) -> list[Path]:
    return sorted(golden_folder(config).rglob("*.npz"))


def _cause(report: pytest.TestReport) -> str:
    """The first line of what went wrong."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longreprtext).strip().splitlines()[0]
