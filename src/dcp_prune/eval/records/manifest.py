"""The manifest of a records folder: what was asked of whom, where, and what may be added to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from dcp_prune.errors import RecordsError
from dcp_prune.eval.schema import parse

VERSION = 2
"""Of the layout: since 2, the names of files with rows say what is in them, see `signed`."""
READABLE = (1, 2)
NAME = "manifest.json"
_DIGITS = 16


class _Entry(BaseModel):
    """A method."""

    model_config = ConfigDict(strict=True)
    method: str
    pruner: str
    num_tokens: int | None = Field(ge=0)
    text: str
    options: dict[str, Any]

    @model_validator(mode="after")
    def _has_a_budget(self) -> _Entry:
        if self.num_tokens is None and self.method != "none":
            raise ValueError(f"of {self.method!r} has no num_tokens, which only the method 'none' may leave open")
        return self


class _Source(BaseModel):
    """Of the questions."""

    model_config = ConfigDict(strict=True)
    kind: str
    difficulty: str = ""
    checkpoint: str = ""

    @model_validator(mode="after")
    def _says_what_reports_ask(self) -> _Source:
        if self.kind == "testbed" and not (self.difficulty and self.checkpoint):
            raise ValueError("has no difficulty or checkpoint")
        return self


class _Environment(BaseModel):
    """Where it was measured."""

    model_config = ConfigDict(strict=True)
    packages: dict[str, str] = {}
    gpus: list[str] = []


class _Manifest(BaseModel):
    """All that programs read of it."""

    model_config = ConfigDict(strict=True)
    version: int
    model: dict[str, Any]
    source: _Source
    methods: list[_Entry]
    distances: list[str]
    environment: _Environment
    resumed_in: list[_Environment] = []


_CHECK = TypeAdapter(_Manifest)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What the manifest of a folder says; None if there is none.

    Raises:
        RecordsError: it cannot be read, is of another version, or holds something else than a manifest does.
    """
    path = folder / NAME
    try:
        data = path.read_text(encoding="utf-8")
        manifest = json.loads(data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RecordsError(
            f"{path} cannot be read ({error}); put it back from a copy, or sweep into a new folder"
        ) from None
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version not in READABLE:
        raise RecordsError(
            f"{path} is of version {version}, and this program reads version {' and '.join(map(str, READABLE))}; "
            "use the dcp-prune that made it, or sweep into a new folder"
        )
    try:
        parse(_CHECK, data, str(path), RecordsError)
    except RecordsError as error:
        raise RecordsError(f"{error}; put it back from a copy, or sweep into a new folder") from None
    return manifest


def joined(path: Path, before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the folder with what is to come.

    Raises:
        RecordsError: the folder's records are of other questions, another model, other distances or other options.
    """
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
    result = {**before, "methods": list(methods.values()), "updated": now["updated"]}
    others = [before["environment"], *before.get("resumed_in", [])]
    if now["environment"] not in others:
        result["resumed_in"] = [*others[1:], now["environment"]]
    return result


def signed(label: str, manifest: Mapping[str, Any], data: bytes) -> str:
    """The name of a file with rows: its label, and a digest of its content and of whose answers it holds.

    So a file that was changed, renamed, or copied from another folder does not fit its name.
    """
    whose = [_moved(manifest["model"]), _moved(manifest["source"]), manifest["distances"], label]
    digest = hashlib.sha256(json.dumps(whose, sort_keys=True).encode())
    digest.update(data)
    return f"{label}-{digest.hexdigest()[:_DIGITS]}.parquet"


def _moved(described: Any) -> Any:
    """A description without the place of its file, whose content counts."""
    return (
        {key: value for key, value in described.items() if key != "path"} if isinstance(described, dict) else described
    )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key} is {before.get(key)!r} there and {now.get(key)!r} here" for key in keys)
