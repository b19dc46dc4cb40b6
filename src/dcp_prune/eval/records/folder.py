"""Records of a sweep: a folder of parquet parts that only grows, and a manifest that says what was asked.

    manifest.json        what was asked of whom, and where it ran
    parts/*.parquet      the rows of one block of questions and some methods; written atomically, never changed
    records-*.parquet    all rows in one file, where the folder was compacted

The name of each file with rows ends with a digest of its content and of whose answers it holds; what does not fit its
name is refused. Folders of version 1 have no such names, and are read as they are.

One row per method, budget and question; see `SCHEMA`. Distances beside kappa are further columns `eval.NAME` and
`run.NAME`. A column `kept` says how many visual tokens the language model read; older records lack it, and had no
method whose questions differ in that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from filelock import FileLock, Timeout

from dcp_prune.errors import RecordsError
from dcp_prune.eval.records.manifest import NAME, VERSION, joined, read_manifest, signed
from dcp_prune.eval.records.rows import KEY, SCHEMA, to_part
from dcp_prune.files import to_json, write_atomically


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
    manifest = read_manifest(folder)
    if manifest is None:
        raise RecordsError(f"{folder} holds no records, since manifest.json is missing; give the folder of a sweep")
    return Records(_read_rows(folder, manifest), manifest)


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
            RecordsError: another sweep is writing there, another version, rows without a manifest, or the folder's
                records are of other questions, another model, other distances or other options of the same method.
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
            before = read_manifest(path)
            if before is None and any(_row_files(path)):
                raise RecordsError(
                    f"{path} holds rows, but {NAME}, which says whose answers they are, is missing; put it back from a "
                    "copy, or choose another folder"
                )
            folder = cls(path, joined(path, before, manifest))
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
            write_atomically(self.path / NAME, to_json(self.manifest).encode())

    def rows(self) -> pl.DataFrame:
        """All rows that are there.

        Raises:
            RecordsError: a file is cut short.
        """
        return _read_rows(self.path, self.manifest)

    def add(self, block: int, part: bytes) -> None:
        """Writes one part, as `to_part` made it: afterwards it is there and complete, or nothing has changed.

        Raises:
            RecordsError: the disk is full, or the folder cannot be written.
        """
        with _no_half_rows(self.path):
            name = self.path / "parts" / signed(f"{block:06d}", self.manifest, part)
            write_atomically(name, part)
            _sync_folder(name.parent)

    def compact(self) -> None:
        """Puts all parts into one file.

        Killed in between it leaves rows twice, which readers count once and the next call clears away.

        Raises:
            RecordsError: the disk is full, or a file is cut short.
        """
        compacted, parts = _row_files(self.path)
        if not parts:
            return
        data = to_part(self.rows())
        with _no_half_rows(self.path):
            whole = self.path / signed("records", self.manifest, data)
            write_atomically(whole, data)
            _sync_folder(self.path)
            for path in (*compacted, *parts):
                if path != whole:
                    path.unlink()
        if self.manifest["version"] != VERSION:
            self.manifest["version"] = VERSION  # all that is left now has a name that says what is in it
            self.write_manifest()


def _row_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files that a folder was compacted to, and its parts."""
    return sorted(folder.glob("records*.parquet")), sorted((folder / "parts").glob("*.parquet"))


def _read_rows(folder: Path, manifest: Mapping[str, Any]) -> pl.DataFrame:
    compacted, parts = _row_files(folder)
    frames = [_read_file(path, manifest) for path in (*compacted, *parts)]
    if not frames:
        return pl.DataFrame(schema=dict(SCHEMA))
    rows = pl.concat(frames, how="diagonal_relaxed")
    return rows.unique(subset=list(KEY), keep="first", maintain_order=True) if compacted else rows


def _read_file(path: Path, manifest: Mapping[str, Any]) -> pl.DataFrame:
    remedy = "delete it and run the sweep again, which measures only its rows anew"
    try:
        data = path.read_bytes()
        if manifest["version"] > 1 and path.name != signed(path.stem.rpartition("-")[0], manifest, data):
            raise RecordsError(
                f"{path} is not what was written there, but cut short, changed, or of other records; {remedy}"
            )
        frame = pl.read_parquet(data)
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise RecordsError(
            f"{path} cannot be read, it may be cut short ({' '.join(str(error).split())[:120]}); {remedy}"
        ) from None
    missing = [name for name in SCHEMA if name not in frame.columns]
    if missing:
        raise RecordsError(f"{path} has no column {', '.join(missing)}, so it holds no records; take it out of there")
    for name, kind in SCHEMA.items():
        found = frame.schema[name]
        if not (found in (kind, pl.String) if kind == pl.Categorical else found.is_numeric() or found == pl.Null):
            raise RecordsError(
                f"{path} holds {found} in the column {name}, so it holds no records; take it out of there"
            )
    empty = [name for name in SCHEMA if name != "kappa" and frame[name].null_count()]
    if empty:
        raise RecordsError(f"{path} has rows without {', '.join(empty)}; {remedy}")
    return frame


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
