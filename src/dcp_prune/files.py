"""Output files: refused before any work starts if they cannot be written, and never left half-written."""

from __future__ import annotations

import json
import os
import tempfile
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
    """Indented, valid JSON: NaN and inf are refused rather than written."""
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
