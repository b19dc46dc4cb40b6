"""These tests drive the app in a real, headless Chromium and need an environment of their own: `make test-browser`.
Without a Chromium they are skipped, and fail where CI is set; elsewhere they are not seen."""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []
RESULTS = Path(__file__).parents[2] / "results" / "sweeps"


def pytest_configure() -> None:
    if MISSING and os.environ.get("DCP_PRUNE_TEST_BROWSER"):
        raise pytest.UsageError(f"{' and '.join(MISSING)} is not installed; run: make test-browser")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        complain = pytest.fail if os.environ.get("CI") else pytest.skip
        complain("there is no Chromium; install your system's package, or name the program in CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def app() -> Any:
    from dcp_prune.app.page import App
    from dcp_prune.assistant import Assistant

    return App(Assistant.load("testbed"), RESULTS)


@pytest.fixture(scope="session")
def url(app: Any) -> Iterator[str]:
    from dcp_prune.app.page import launch
    from dcp_prune.integrations.serving.sockets import listen

    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    page = launch(app, "127.0.0.1", port, block=False)
    yield f"http://127.0.0.1:{port}"
    page.close()


@pytest.fixture
def open_page(chromium: Any, url: str) -> Iterator[Any]:
    """Opens the app as a visitor of its own."""
    visitors = []

    def visit() -> Any:
        visitors.append(chromium.new_context(viewport={"width": 1280, "height": 1400}))
        page = visitors[-1].new_page()
        page.set_default_timeout(30_000)
        page.goto(url)
        page.locator("#ask").wait_for()
        return page

    yield visit
    for visitor in visitors:
        visitor.close()
