"""Output files: refused before any work starts if they cannot be written, and never left half-written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dcp_prune.errors import InvalidInputError


def check_writable(path: str | Path) -> Path:
    """Returns `path` if a file can be created or replaced there; leaves nothing behind.

    Raises:
        InvalidInputError: `path` is a folder, its folder is missing, or either of them cannot be written.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InvalidInputError(f"cannot write {path}: it is a folder; give the name of a file in it")
        if not path.parent.is_dir():
            raise InvalidInputError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
        if path.exists() and not os.access(path, os.W_OK):
            raise InvalidInputError(f"cannot write {path}: the file is read-only; choose another name")
        if not path.exists() or path.is_file():  # a device or a pipe is written to, never replaced
            with tempfile.TemporaryFile(dir=path.parent):
                pass
    except OSError as error:
        raise InvalidInputError(f"cannot write {path}: {error.strerror or error}; choose another place") from None
    return path


def check_outputs(outputs: Sequence[Path], inputs: Iterable[Path] = ()) -> tuple[Path, ...]:
    """Makes sure that outputs can be written without loss of an input or of one another; leaves nothing behind.

    Args:
        outputs: files that are to be created or replaced.
        inputs: files and folders that are read; no file below such a folder may be replaced.

    Returns:
        those outputs that are there already.

    Raises:
        InvalidInputError: one cannot be written, is an input by this name or another, or is named twice.
    """
    inputs = [path.expanduser() for path in inputs]
    files = {_identity(path): path for path in inputs if path.is_file()}
    folders = [path for path in inputs if path.is_dir()]
    seen: dict[Hashable, Path] = {}
    there = []
    for path in outputs:
        check_writable(path)
        if path.exists() and not path.is_file():
            continue  # a device keeps nothing that could be lost
        identity = _identity(path)
        if identity in files:
            raise InvalidInputError(
                f"cannot write {path}: it is {files[identity]}, which is read here; choose another name"
            )
        if identity in seen:
            raise InvalidInputError(f"cannot write {path} and {seen[identity]}: they are one file; choose two names")
        seen[identity] = path
        if path.exists():
            for folder in folders:
                if path.resolve().is_relative_to(folder.resolve()):
                    raise InvalidInputError(
                        f"cannot write {path}: it is a file in {folder}, which is read here; choose another name"
                    )
            there.append(path)
    return tuple(there)


def _identity(path: Path) -> Hashable:
    """The same for all names of a file: links, and what has not been made yet under one name."""
    if not path.exists():
        return path.resolve()
    found = path.stat()
    return (found.st_dev, found.st_ino)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes a file that is either complete or not there: a temporary neighbour first, then a rename."""
    path = Path(path)
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name with no content behind it
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp keeps others out, an ordinary new file does not
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def to_json(value: Any) -> str:
    """Indented, valid JSON: NaN and inf are refused rather than written.

    Bytes in the name of a file that are no UTF-8 are written as JSON's own escapes, which readers give back.
    """
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()
