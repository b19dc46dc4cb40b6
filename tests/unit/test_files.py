"""Output files are refused early or written whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dcp_prune.errors import InvalidInputError
from dcp_prune.files import check_outputs, check_writable, to_json, write_atomically


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


def test_an_output_that_is_an_input_is_refused_by_whatever_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photo, model = tmp_path / "photo.jpg", tmp_path / "model"
    photo.write_text("photo")
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "linked.jpg").symlink_to(photo)
    (tmp_path / "hard.jpg").hardlink_to(photo)
    for name in ("photo.jpg", "./photo.jpg", "model/../photo.jpg", "linked.jpg", "hard.jpg"):
        with pytest.raises(InvalidInputError, match="which is read here; choose another name"):
            check_outputs([Path(name)], [photo, model])
    with pytest.raises(InvalidInputError, match=r"it is a file in .*model, which is read here"):
        check_outputs([model / "config.json"], [photo, model])
    assert check_outputs([model / "new.json"], [photo, model]) == ()
    assert photo.read_text() == "photo"


def test_two_outputs_under_one_path_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    names = [tmp_path / "out", tmp_path / "folder" / ".." / "out"]
    for _ in range(2):
        with pytest.raises(InvalidInputError, match="they are one file; choose two names"):
            check_outputs(names)
        names[0].touch()
    assert check_outputs([Path("/dev/null"), Path("/dev/null")]) == ()


def test_what_will_be_replaced_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    assert check_outputs([tmp_path / "old", tmp_path / "new"]) == (tmp_path / "old",)


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


def test_a_name_that_is_no_utf8_survives_in_json() -> None:
    name = os.fsdecode(b"caf\xe9.png")
    text = to_json({"image": name, "café": 1})
    assert json.loads(text.encode()) == {"image": name, "café": 1}
