"""Records of a sweep: a folder of parquet parts that only grows, and a manifest that says what was asked.

    manifest.json      what was asked of whom, and where it ran
    parts/*.parquet    the rows of one block of questions and some methods; written atomically, never changed
    records.parquet    all rows in one file, where the folder was compacted

One row per method, budget and question; see `SCHEMA`. Distances beside kappa are further columns `eval.NAME` and
`run.NAME`. A column `kept` says how many visual tokens the language model read; older records lack it, and had no
method whose questions differ in that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import polars as pl
from filelock import FileLock, Timeout

from dcp_prune.errors import RecordsError
from dcp_prune.eval.records.rows import KEY, SCHEMA, to_part
from dcp_prune.files import to_json, write_atomically

VERSION = 1
"""Of the layout; a folder of another version is refused."""


@dataclass(frozen=True)
class Records:
    """What was measured.

    Attributes:
        frame: one row per method, budget and question; `SCHEMA` and the distances that were asked for.
        manifest: what was asked.
    """

    frame: pl.DataFrame
    manifest: dict[str, Any]

    def cells(self) -> tuple[tuple[str, int], ...]:
        """(method, num_tokens) of everything that was measured, in the order of the manifest."""
        found = {(row[0], row[1]) for row in self.frame.select("method", "num_tokens").unique().iter_rows()}
        order = {(entry["method"], entry["num_tokens"]): place for place, entry in enumerate(self.manifest["methods"])}
        return tuple(sorted(found, key=lambda cell: (order.get(cell, len(order)), -cell[1], cell[0])))


def read_records(folder: str | Path) -> Records:
    """All rows of a sweep's folder, finished or not.

    Raises:
        RecordsError: no records there, another version, or a file that is cut short.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if manifest is None:
        raise RecordsError(f"{folder} holds no records, since manifest.json is missing; give the folder of a sweep")
    return Records(_read_rows(folder), manifest)


class RecordsFolder:
    """A sweep's folder that is being written, by one process at a time; made by `RecordsFolder.open`.

    Attributes:
        path: the folder.
        manifest: what it says so far.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    @contextmanager
    def open(cls, path: str | Path, manifest: dict[str, Any]) -> Iterator[RecordsFolder]:
        """Takes the folder, makes it if it is new, and refuses to mix measurements that do not belong together.

        Args:
            path: the folder.
            manifest: what is to be measured: `model`, `source`, `methods`, `distances`, `environment`, `started`,
                `updated`. Methods are added to those that are there.

        Raises:
            RecordsError: another sweep is writing there, another version, or the folder's records are of other
                questions, another model, other distances or other options of the same method.
        """
        path = Path(path)
        with _no_half_rows(path):
            (path / "parts").mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RecordsError(f"another sweep is writing to {path}; wait for it, or choose another folder") from None
        try:
            for left in path.glob("**/.*.part"):  # of a sweep that was killed while it wrote
                left.unlink()
            folder = cls(path, _joined(path, _read_manifest(path), manifest))
            folder.write_manifest()
            yield folder
        finally:
            lock.release()

    def write_manifest(self) -> None:
        """Brings the manifest on disk up to date.

        Raises:
            RecordsError: it cannot be written.
        """
        with _no_half_rows(self.path):
            write_atomically(self.path / "manifest.json", to_json(self.manifest).encode())

    def rows(self) -> pl.DataFrame:
        """All rows that are there.

        Raises:
            RecordsError: a file is cut short.
        """
        return _read_rows(self.path)

    def add(self, block: int, part: bytes) -> None:
        """Writes one part, as `to_part` made it: afterwards it is there and complete, or nothing has changed.

        Raises:
            RecordsError: the disk is full, or the folder cannot be written.
        """
        with _no_half_rows(self.path):
            name = self.path / "parts" / f"{block:06d}-{uuid4().hex[:12]}.parquet"
            write_atomically(name, part)
            _sync_folder(name.parent)

    def compact(self) -> None:
        """Puts all parts into one file.

        Killed in between it leaves rows twice, which readers count once and the next call clears away.

        Raises:
            RecordsError: the disk is full, or a file is cut short.
        """
        parts = sorted((self.path / "parts").glob("*.parquet"))
        if not parts:
            return
        data = to_part(self.rows())
        with _no_half_rows(self.path):
            write_atomically(self.path / "records.parquet", data)
            _sync_folder(self.path)
            for part in parts:
                part.unlink()


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RecordsError(
            f"{path} cannot be read ({error}); put it back from a copy, or sweep into a new folder"
        ) from (None)
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise RecordsError(
            f"{path} is of version {version}, and this program reads version {VERSION}; "
            "use the dcp-prune that made it, or sweep into a new folder"
        )
    missing = [key for key in ("model", "source", "methods", "distances", "environment") if key not in manifest]
    if missing:
        raise RecordsError(f"{path} does not say {', '.join(missing)}; put it back from a copy, or sweep anew")
    return manifest


def _read_rows(folder: Path) -> pl.DataFrame:
    files = sorted((folder / "parts").glob("*.parquet"))
    compacted = folder / "records.parquet"
    if compacted.is_file():
        files.insert(0, compacted)
    frames = [_read_file(path) for path in files]
    if not frames:
        return pl.DataFrame(schema=dict(SCHEMA))
    rows = pl.concat(frames, how="diagonal_relaxed")
    return rows.unique(subset=list(KEY), keep="first", maintain_order=True) if compacted.is_file() else rows


def _read_file(path: Path) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(path.read_bytes())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RecordsError(
            f"{path} cannot be read, it may be cut short ({' '.join(str(error).split())[:120]}); delete it and run the "
            "sweep again, which measures only its rows anew"
        ) from None
    missing = [name for name in SCHEMA if name not in frame.columns]
    if missing:
        raise RecordsError(f"{path} has no column {', '.join(missing)}, so it holds no records; take it out of there")
    return frame


def _joined(path: Path, before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the folder with what is to come."""
    if before is None:
        return {"version": VERSION, **now}
    for key, what in (("source", "other questions"), ("model", "another model"), ("distances", "other distances")):
        if _moved(before[key]) != _moved(now[key]):
            raise RecordsError(
                f"{path} holds answers to {what}: {_difference(before[key], now[key])}; choose another folder"
                if key != "distances"
                else f"{path} was measured with the distances {before[key]}, not {now[key]}; choose another folder"
            )
    methods = {(entry["method"], entry["num_tokens"]): entry for entry in before["methods"]}
    for entry in now["methods"]:
        known = methods.setdefault((entry["method"], entry["num_tokens"]), entry)
        if known != entry:
            raise RecordsError(
                f"{path} holds {entry['method']!r} with other options: "
                f"{_difference(known['options'], entry['options'])}; choose another folder, or write the options out "
                "in the spec"
            )
    joined = {**before, "methods": list(methods.values()), "updated": now["updated"]}
    others = [before["environment"], *before.get("resumed_in", [])]
    if now["environment"] not in others:
        joined["resumed_in"] = [*others[1:], now["environment"]]
    return joined


def _moved(described: Any) -> Any:
    """A description without the place of its file, whose content counts."""
    return (
        {key: value for key, value in described.items() if key != "path"} if isinstance(described, dict) else described
    )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key} is {before.get(key)!r} there and {now.get(key)!r} here" for key in keys)


@contextmanager
def _no_half_rows(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordsError(
            f"records cannot be written to {folder}: {error.strerror or error}; what was finished is safe, so make "
            "room and run the same command again"
        ) from error


def _sync_folder(folder: Path) -> None:
    """A new name survives a power cut only once its folder is on disk too; systems without that are left alone."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
