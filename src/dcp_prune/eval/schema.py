"""JSON that somebody else wrote, checked against a type; what is wrong with it is one sentence."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from dcp_prune.errors import DcpPruneError, InvalidInputError

T = TypeVar("T")

_KINDS = {"dict": "an object", "list": "a list", "str": "a text", "NoneType": "null", "bool": "true or false"}


def parse(kind: TypeAdapter[T], text: str | bytes, where: str, error: type[DcpPruneError] = InvalidInputError) -> T:
    """The value that the JSON holds.

    Args:
        kind: what it has to be; a field's description says in words what belongs there.
        text: JSON.
        where: what the sentence begins with, such as a file and a line.
        error: what is raised if it is something else.
    """
    try:
        return kind.validate_json(text)
    except ValidationError as invalid:
        raise error(f"{where}{_sentence(kind, invalid)}") from None


def _sentence(kind: TypeAdapter[Any], invalid: ValidationError) -> str:
    first = invalid.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "json_invalid":
        return f" is not valid JSON ({first['ctx']['error']})"  # type: ignore[typeddict-item]
    if not path:
        found = type(first["input"]).__name__
        return f" holds {_KINDS.get(found, 'a number')}, not an object with {', '.join(_descriptions(kind))}"
    if first["type"] == "missing":
        wanted = _descriptions(kind).get(path[-1])
        return f" has no {'.'.join(path)}" + (f"; it must be {wanted}" if wanted else "")
    if first["type"] == "value_error":
        return f": {path[0]} {first['ctx']['error']}"  # type: ignore[typeddict-item]
    wanted = _descriptions(kind).get(path[0])
    if wanted is None:
        return f": {'.'.join(path)} {first['msg'].replace('Input should', 'must')}, got {_short(first['input'])}"
    return f": {path[0]} must be {wanted}, got {_short(first['input'])}"


def _descriptions(kind: TypeAdapter[Any]) -> dict[str, str]:
    fields = kind.json_schema().get("properties", {})
    return {name: field["description"] for name, field in fields.items() if "description" in field}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
