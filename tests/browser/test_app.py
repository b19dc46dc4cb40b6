"""What a visitor sees is what the library says, and nothing that a visitor does takes the app down."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from dcp_prune.pruners.dcp import DCPPruner
from dcp_prune.testbed.seeds import HELD_OUT


def asked(page: Any) -> dict[str, str]:
    """Presses the button and reads the table of answers."""
    page.locator("#ask").click()
    page.wait_for_selector("#kappa-a")
    page.wait_for_timeout(300)
    page.wait_for_function("!document.querySelector('#answers .generating, #answers .pending')")
    return read(page)


def read(page: Any) -> dict[str, str]:
    return {cell.get_attribute("id"): cell.inner_text() for cell in page.locator("#answers td").all()}


def slide(page: Any, tokens: int) -> None:
    """Types a number beside the slider and waits for the new answer."""
    field = page.locator("#tokens input[type=number]")
    field.fill(str(tokens))
    field.press("Enter")
    field.blur()


def upload(page: Any, file: Path) -> None:
    page.locator("#upload input[type=file]").set_input_files(str(file))


def expected(app: Any, picture: Any, tokens: int) -> Any:
    pruner = DCPPruner(num_tokens=tokens)
    view = app.assistant.look(picture.image, pruner)
    return app.assistant.ask(view, app.assistant.prompt(picture.question), pruner, max_new_tokens=32)


def bomb(path: Path) -> Path:
    """A PNG of 40,000 x 40,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def broken(path: Path) -> Path:
    path.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    return path


@pytest.mark.parametrize("tokens", [16, 5])
def test_the_page_shows_the_librarys_kappa_count_and_answer(open_page: Any, app: Any, tokens: int) -> None:
    page, reply = open_page(), expected(app, app.another(HELD_OUT[0]), tokens)
    slide(page, tokens)
    shown = asked(page)
    assert shown["count-a"] == str(tokens) == str(reply.visual_tokens)
    assert float(shown["kappa-a"]) == pytest.approx(reply.kappa, abs=1e-4)
    assert shown["answer-a"] == reply.text
    assert int(shown["prefill-full"]) - int(shown["prefill-a"]) == 576 - tokens
    assert shown["count-b"] == str(tokens)
    assert "threshold" in shown["distance-a"]


def test_moving_the_slider_asks_again(open_page: Any) -> None:
    page = open_page()
    asked(page)
    slider = page.locator("#tokens input[type=range]")
    slider.click(position={"x": 200, "y": 3})
    moved = slider.input_value()
    assert moved != "16"
    page.wait_for_function("moved => document.querySelector('#count-a').innerText === moved", arg=moved)


def test_the_record_that_is_downloaded_is_the_answer_on_the_page(open_page: Any) -> None:
    page = open_page()
    shown = asked(page)
    with page.expect_download() as started:
        page.locator("#json-a").click()
    record = json.loads(Path(started.value.path()).read_text())
    assert len(record["indices"]) == int(shown["count-a"])
    assert f"{record['kappa']:.4f}" == shown["kappa-a"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (bomb, "too many pixels"),
        (broken, "not an image"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named_and_the_app_lives_on(
    open_page: Any, tmp_path: Path, make: Any, says: str
) -> None:
    page = open_page()
    upload(page, make(tmp_path / "odd.png"))
    page.get_by_text(says).first.wait_for()
    assert asked(page)["count-a"] == "16"


def test_two_visitors_do_not_disturb_each_other(open_page: Any, app: Any) -> None:
    first, second = open_page(), open_page()
    before = second.locator("#picture img").get_attribute("src")
    second.locator("#example input").click()
    second.get_by_role("option", name="coffee").click()
    second.wait_for_function("before => document.querySelector('#picture img').src !== before", arg=before)
    slide(second, 8)
    first.locator("#ask").click()
    second.locator("#ask").click()
    for page in (first, second):
        page.wait_for_selector("#kappa-a")
    reply = expected(app, app.another(HELD_OUT[0]), 16)
    assert float(read(first)["kappa-a"]) == pytest.approx(reply.kappa, abs=1e-4)
    second.wait_for_function("document.querySelector('#count-a').innerText === '8'")
    assert read(first)["count-a"] == "16"


def test_budgets_are_measured_and_the_leaderboard_is_there(open_page: Any) -> None:
    page = open_page()
    page.get_by_role("tab", name="Budgets").click()
    page.locator("#budgets input, #budgets textarea").first.fill("4, 8")
    page.locator("#sweep").click()
    page.locator("#sweep-rows").get_by_text("B: random").nth(1).wait_for()
    page.get_by_role("tab", name="Leaderboard").click()
    page.locator("#board").get_by_text("natural, cluttered").locator("visible=true").first.wait_for()
