"""Output files are refused early or written whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcp_prune.errors import InvalidInputError
from dcp_prune.files import check_writable, to_json, write_atomically


def test_checking_a_path_leaves_nothing_behind(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "new.json") == tmp_path / "new.json"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "cause"), [(".", "folder"), ("missing/out.json", "does not exist"), ("x" * 300, "cannot write")]
)
def test_an_impossible_path_is_refused_before_any_work(tmp_path: Path, name: str, cause: str) -> None:
    with pytest.raises(InvalidInputError, match=cause):
        check_writable(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_replaces_its_predecessor_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_a_failed_write_keeps_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_a_device_is_written_to_and_stays_a_device() -> None:
    write_atomically(check_writable("/dev/null"), b"x")
    assert Path("/dev/null").is_char_device()


def test_json_never_holds_nan() -> None:
    assert to_json({"kappa": None}) == '{\n  "kappa": null\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        to_json({"kappa": float("nan")})
