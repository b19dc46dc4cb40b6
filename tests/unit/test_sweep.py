"""A sweep loses nothing and does nothing twice, however it ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from counting import METHODS, CountingQuestions

from dcp_prune.errors import DcpPruneError, InvalidInputError, RecordsError
from dcp_prune.eval.records import SCHEMA, read_records
from dcp_prune.eval.records import folder as folder_module
from dcp_prune.eval.records.manifest import signed
from dcp_prune.eval.specs import plan
from dcp_prune.eval.sweep import sweep

SCRIPT = Path(__file__).parent / "counting.py"


def _answers(folder: Path) -> list[tuple[str, int, str]]:
    frame = read_records(folder).frame.select("method", "num_tokens", "question").cast({"question": pl.String})
    return sorted((str(row[0]), row[1], row[2]) for row in frame.iter_rows())


def _expected(blocks: int) -> list[tuple[str, int, str]]:
    return sorted(
        (method.name, 576 if method.num_tokens is None else method.num_tokens, f"q{number}")
        for method in METHODS
        for number in range(3 * blocks)
    )


def test_every_method_answers_every_question_once(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    done = sweep(CountingQuestions(), METHODS, tmp_path / "r", progress=lambda done, total: told.append((done, total)))
    assert _answers(tmp_path / "r") == _expected(5)
    assert (done.answers, done.new) == (90, 90)
    assert told == [(18 * block, 90) for block in range(6)]
    frame = read_records(tmp_path / "r").frame
    assert frame.columns == list(SCHEMA)
    assert frame["kappa"].drop_nulls().unique().to_list() == pytest.approx([0.1235])  # four significant digits


def test_processes_change_nothing(tmp_path: Path) -> None:
    sweep(CountingQuestions(), METHODS, tmp_path / "r", processes=2)
    assert _answers(tmp_path / "r") == _expected(5)


def test_a_second_sweep_adds_only_what_is_missing(tmp_path: Path) -> None:
    sweep(CountingQuestions(), METHODS[:2], tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    assert sweep(CountingQuestions(), METHODS, tmp_path).new == 4 * 15
    assert all(path.read_bytes() == content for path, content in before.items())
    assert sweep(CountingQuestions(), METHODS, tmp_path).new == 0
    assert _answers(tmp_path) == _expected(5)
    assert {cell[:2] for cell in read_records(tmp_path).cells()} == {row[:2] for row in _expected(5)}


@pytest.mark.parametrize(
    ("fails", "complaint", "processes"),
    [
        ("error", "q6 to q8 failed with ValueError: something odd", 1),
        ("refusal", "^not like this$", 1),
        ("error", "q6 to q8 failed with ValueError: something odd", 2),
    ],
)
def test_what_was_finished_before_an_error_stays(tmp_path: Path, fails: str, complaint: str, processes: int) -> None:
    with pytest.raises(DcpPruneError, match=complaint):
        sweep(CountingQuestions(fails=fails), METHODS, tmp_path, processes=processes)
    assert set(_answers(tmp_path)) <= set(_expected(5))
    sweep(CountingQuestions(), METHODS, tmp_path)
    assert _answers(tmp_path) == _expected(5)


def test_a_worker_that_dies_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DcpPruneError, match="a worker process of the sweep died"):
        sweep(CountingQuestions(fails="death"), METHODS, tmp_path, processes=2)
    sweep(CountingQuestions(), METHODS, tmp_path)
    assert _answers(tmp_path) == _expected(5)


def test_a_full_disk_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = folder_module.write_atomically, []

    def full_after_three(path: Path, data: bytes) -> None:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        real(path, data)

    monkeypatch.setattr(folder_module, "write_atomically", full_after_three)
    with pytest.raises(RecordsError, match=r"No space left on device.*what was finished is safe"):
        sweep(CountingQuestions(), METHODS, tmp_path)
    monkeypatch.undo()
    kept = _answers(tmp_path)
    assert len(kept) == 2 * 18  # the manifest and two parts
    sweep(CountingQuestions(), METHODS, tmp_path)
    assert _answers(tmp_path) == _expected(5)


def _killed(folder: Path, processes: int, after: float) -> int:
    """Kills a sweep and all its workers so many seconds after its first part; its exit status."""
    command = [sys.executable, str(SCRIPT), str(folder), str(processes)]
    child = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    there = len(list((folder / "parts").glob("*.parquet")))
    while child.poll() is None and len(list((folder / "parts").glob("*.parquet"))) == there:
        time.sleep(0.005)
    time.sleep(after)
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    assert _killed(tmp_path, 1, after=0.1) == -signal.SIGKILL
    kept = _answers(tmp_path)
    assert 0 < len(kept) < len(_expected(40))
    assert len(set(kept)) == len(kept)
    done = sweep(CountingQuestions(40), METHODS, tmp_path)
    assert done.new == len(_expected(40)) - len(kept)
    assert _answers(tmp_path) == _expected(40)


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_ends_complete(tmp_path: Path) -> None:
    attempts = 0
    while _killed(tmp_path, 2, after=0.03 * attempts) != 0:
        attempts += 1
        kept = _answers(tmp_path)
        assert len(set(kept)) == len(kept)
        assert attempts < 60
    assert attempts >= 3
    assert _answers(tmp_path) == _expected(40)


@pytest.mark.slow
def test_workers_leave_when_their_parent_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "2"]
    child = subprocess.Popen(command, start_new_session=True)
    while not list((tmp_path / "parts").glob("*.parquet")):
        time.sleep(0.01)
    child.kill()
    child.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("workers outlive the sweep")


def test_two_sweeps_never_write_to_one_folder(tmp_path: Path) -> None:
    def second(done: int, total: int) -> None:
        with pytest.raises(RecordsError, match="another sweep is writing"):
            sweep(CountingQuestions(), METHODS, tmp_path)

    sweep(CountingQuestions(), METHODS[:1], tmp_path, progress=second)


def test_compacting_keeps_every_row_and_goes_on_afterwards(tmp_path: Path) -> None:
    sweep(CountingQuestions(), METHODS[:2], tmp_path, compact=True)
    for _ in range(2):
        assert len(list(tmp_path.glob("*.parquet"))) == len(list(tmp_path.glob("records-*.parquet"))) == 1
        assert not list((tmp_path / "parts").iterdir())
        sweep(CountingQuestions(), METHODS, tmp_path)
        assert _answers(tmp_path) == _expected(5)
        sweep(CountingQuestions(), METHODS, tmp_path, compact=True)
        assert _answers(tmp_path) == _expected(5)


def test_compacted_records_need_no_folder_of_parts(tmp_path: Path) -> None:
    sweep(CountingQuestions(), METHODS, tmp_path, compact=True)
    (tmp_path / "parts").rmdir()  # as in a fresh clone: git keeps no empty folder
    assert _answers(tmp_path) == _expected(5)
    assert sweep(CountingQuestions(), METHODS, tmp_path, compact=True).new == 0
    assert _answers(tmp_path) == _expected(5)


def test_compacting_that_is_killed_between_its_two_steps_counts_no_row_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: (_ for _ in ()).throw(OSError(5, "killed")))
    with pytest.raises(RecordsError):
        sweep(CountingQuestions(), METHODS, tmp_path, compact=True)
    monkeypatch.undo()
    assert _answers(tmp_path) == _expected(5)
    assert sweep(CountingQuestions(), METHODS, tmp_path, compact=True).new == 0
    assert not list((tmp_path / "parts").iterdir())


@pytest.mark.parametrize(
    ("source", "specs", "complaint"),
    [
        (CountingQuestions(6), ["random"], "questions is 15 there and 18 here"),
        (CountingQuestions(name="other"), ["random"], "other questions"),
    ],
)
def test_other_questions_are_not_mixed_in(
    tmp_path: Path, source: CountingQuestions, specs: list[str], complaint: str
) -> None:
    sweep(CountingQuestions(), METHODS, tmp_path)
    with pytest.raises(RecordsError, match=complaint):
        sweep(source, plan(specs, [8]), tmp_path)


def test_one_label_never_stands_for_two_settings(tmp_path: Path) -> None:
    sweep(CountingQuestions(), plan(["random"], [8]), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["methods"][0]["options"]["seed"] = 7  # as if the default had changed in between
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RecordsError, match=r"'random' with other options: seed is 7 there and 0 here"):
        sweep(CountingQuestions(), plan(["random"], [8]), tmp_path)


def test_other_distances_are_not_mixed_in(tmp_path: Path) -> None:
    sweep(CountingQuestions(), METHODS[:1], tmp_path)
    with pytest.raises(RecordsError, match=r"distances \[\], not \['mmd'\]"):
        sweep(CountingQuestions(), METHODS[:1], tmp_path, distances=["mmd"])
    with pytest.raises(InvalidInputError, match="did you mean coverage_relevance"):
        sweep(CountingQuestions(), METHODS[:1], tmp_path, distances=["coverage_relevanc"])


def test_records_of_another_version_are_refused(tmp_path: Path) -> None:
    sweep(CountingQuestions(), METHODS[:1], tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 3'))
    for use in (lambda: read_records(tmp_path), lambda: sweep(CountingQuestions(), METHODS[:1], tmp_path)):
        with pytest.raises(RecordsError, match="of version 3, and this program reads version 1 and 2"):
            use()


def test_a_folder_of_version_1_is_read_goes_on_and_is_compacted_to_version_2(tmp_path: Path) -> None:
    sweep(CountingQuestions(), METHODS[:2], tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    for number, part in enumerate((tmp_path / "parts").iterdir()):
        part.rename(part.with_name(f"{number:06d}-0123456789ab.parquet"))
    assert sweep(CountingQuestions(), METHODS, tmp_path).new == 4 * 15
    assert read_records(tmp_path).manifest["version"] == 1
    sweep(CountingQuestions(), METHODS, tmp_path, compact=True)
    assert read_records(tmp_path).manifest["version"] == 2
    assert _answers(tmp_path) == _expected(5)


def _cut(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-100])


def _flip_a_bit(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 4
    part.write_bytes(data)


def _copy_another(part: Path) -> None:
    first = min(part.parent.iterdir())
    part.write_bytes(first.read_bytes())


def _rename(part: Path) -> None:
    part.rename(part.with_name(f"000009-{part.name.partition('-')[2]}"))


@pytest.mark.parametrize("spoil", [_cut, _flip_a_bit, _copy_another, _rename])
def test_a_part_that_is_not_what_was_written_is_named_with_the_way_out(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    sweep(CountingQuestions(), METHODS, tmp_path)
    spoil(sorted((tmp_path / "parts").iterdir())[1])
    for use in (lambda: read_records(tmp_path), lambda: sweep(CountingQuestions(), METHODS, tmp_path)):
        with pytest.raises(RecordsError, match=r"is not what was written there.*delete it") as caught:
            use()
    Path(str(caught.value).partition(" is not")[0]).unlink()
    assert sweep(CountingQuestions(), METHODS, tmp_path).new == 18
    assert _answers(tmp_path) == _expected(5)


def test_every_bit_of_a_part_and_of_compacted_records_counts(tmp_path: Path) -> None:
    sweep(CountingQuestions(1), METHODS[:1], tmp_path / "parts-only")
    sweep(CountingQuestions(1), METHODS[:1], tmp_path / "compacted", compact=True)
    for path in (*(tmp_path / "parts-only" / "parts").iterdir(), *(tmp_path / "compacted").glob("*.parquet")):
        whole = path.read_bytes()
        for place in range(0, len(whole), 37):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(RecordsError, match="is not what was written there"):
                read_records(tmp_path / path.relative_to(tmp_path).parts[0])
        path.write_bytes(whole)


def test_a_part_of_another_model_is_refused(tmp_path: Path) -> None:
    class OtherModel(CountingQuestions):
        def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
            return {"name": "somebody", "sha256": None}, super().describe()[1]

    sweep(CountingQuestions(), METHODS, tmp_path / "mine")
    sweep(OtherModel(), METHODS, tmp_path / "other")
    stranger = min((tmp_path / "other" / "parts").iterdir())
    (tmp_path / "mine" / "parts" / stranger.name).write_bytes(stranger.read_bytes())
    with pytest.raises(RecordsError, match=f"{stranger.name} is not what was written there.* of other records"):
        read_records(tmp_path / "mine")


@pytest.mark.parametrize("compact", [False, True])
def test_rows_whose_manifest_is_lost_are_nobodys(tmp_path: Path, compact: bool) -> None:
    sweep(CountingQuestions(), METHODS, tmp_path, compact=compact)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(RecordsError, match=r"holds rows, but manifest.json, .* is missing"):
        sweep(CountingQuestions(), METHODS, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"methods": 5}, "methods must be a valid array, got 5"),
        ({"methods": [5]}, "methods.0 must be an object"),
        ({"methods": [{"method": "random"}]}, "has no methods.0.pruner"),
        ({"methods": [{"method": "x", "pruner": "x", "num_tokens": None, "text": "", "options": {}}]}, "no num_tokens"),
        (
            {"methods": [{"method": "x", "pruner": "x", "num_tokens": "8", "text": "", "options": {}}]},
            "num_tokens must",
        ),
        ({"methods": [{"method": "x", "pruner": "x", "num_tokens": 8, "text": "", "options": None}]}, "options must"),
        ({"model": "weak"}, "model must be"),
        ({"source": []}, "source must be"),
        ({"source": {}}, "has no source.kind"),
        ({"source": {"kind": "testbed"}}, "source has no difficulty or checkpoint"),
        ({"distances": None}, "distances must be"),
        ({"environment": "here"}, "environment must be"),
        ({"environment": {"packages": []}}, "environment.packages must be"),
        ({"version": "2"}, "is of version 2"),
        ({"version": None}, "is of version None"),
    ],
)
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    sweep(CountingQuestions(), METHODS[:1], tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for use in (lambda: read_records(tmp_path), lambda: sweep(CountingQuestions(), METHODS[:1], tmp_path)):
        with pytest.raises(RecordsError, match=complaint) as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (pl.lit(None, pl.Int32).alias("num_tokens"), "has rows without num_tokens"),
        (pl.lit("8").alias("num_tokens"), "holds String in the column num_tokens"),
        (pl.lit(3).alias("question"), "holds Int32 in the column question"),
        (pl.lit(None, pl.Float32).alias("score"), "has rows without score"),
    ],
)
def test_rows_of_another_form_are_refused(tmp_path: Path, change: pl.Expr, complaint: str) -> None:
    sweep(CountingQuestions(), METHODS[:1], tmp_path, compact=True)
    (path,) = tmp_path.glob("*.parquet")
    rows = pl.read_parquet(path)
    path.unlink()
    rows.with_columns(change).write_parquet(tmp_path / "made.parquet")
    data = (tmp_path / "made.parquet").read_bytes()
    (tmp_path / "made.parquet").unlink()
    (tmp_path / signed("records", read_records(tmp_path).manifest, data)).write_bytes(data)
    for use in (lambda: read_records(tmp_path), lambda: sweep(CountingQuestions(), METHODS[:1], tmp_path)):
        with pytest.raises(RecordsError, match=complaint):
            use()


def test_records_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    sweep(CountingQuestions(), METHODS[:1], tmp_path)
    path = tmp_path / "manifest.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    said["environment"]["cpu"] = "é"
    path.write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")
    read = "import sys; from dcp_prune.eval.records import read_records; " + (
        "print(ascii(read_records(sys.argv[1]).manifest['environment']['cpu']))"
    )
    found = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", read, str(tmp_path)],
        env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == r"'\xe9'"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}'])
def test_a_broken_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(RecordsError, match=r"manifest.json"):
        read_records(tmp_path)


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="holds no records"):
        read_records(tmp_path)


def test_the_manifest_tells_where_a_resumed_sweep_went_on(tmp_path: Path) -> None:
    sweep(CountingQuestions(), METHODS[:1], tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["environment"]["commit"] = "another"
    path.write_text(json.dumps(manifest))
    sweep(CountingQuestions(), METHODS, tmp_path)
    sweep(CountingQuestions(), METHODS, tmp_path)
    manifest = read_records(tmp_path).manifest
    assert manifest["environment"]["commit"] == "another"
    assert len(manifest["resumed_in"]) == 1
    assert manifest["resumed_in"][0]["threads"] == 1
