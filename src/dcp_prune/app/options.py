"""The options of a pruner as its dataclass declares them, for a form. Nothing here knows gradio."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dcp_prune.errors import InvalidInputError
from dcp_prune.pruners.base import Pruner
from dcp_prune.pruners.options import Checked, default_of, groups_of
from dcp_prune.registry import get_pruner


@dataclass(frozen=True)
class Option:
    """One field of a pruner, or of a group of its options.

    Attributes:
        name: as `make_pruner` takes it.
        default: what the dataclass says.
        choices: the words that it takes; empty where it takes something else.
        help: from the docstring; empty where there is none.
    """

    name: str
    default: Any
    choices: tuple[str, ...]
    help: str


def options_of(name: str) -> list[Option]:
    """All options of a pruner, those of its groups included, without the budget.

    Raises:
        UnknownPrunerError: no such name.
    """
    cls = get_pruner(name)
    shared = {each.name for each in fields(Pruner)}
    groups = groups_of(cls)
    own = [each for each in _own(cls) if each.name not in {*shared, *groups}]
    defaults = {each.name: each.default for each in _own(cls)}
    for group, kind in groups.items():
        switch = f"A change switches {group} on. " if defaults[group] is None else ""
        own += [replace(each, help=switch + each.help) for each in _own(kind)]
    return own


def value_of(option: Option, typed: Any) -> Any:
    """What a form's field means: words, True and False as they are, any other text as a Python literal.

    Raises:
        InvalidInputError: the text is no literal.
    """
    if option.choices or isinstance(option.default, bool) or not isinstance(typed, str):
        return typed
    if typed.strip() == "inf":
        return float("inf")
    try:
        return ast.literal_eval(typed.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise InvalidInputError(
            f"{option.name} cannot be read: {typed[:40]!r}; type a number, None, or a list such as (1, 2)"
        ) from None


def _own(cls: type[Checked]) -> list[Option]:
    from docstring_parser import parse

    text = {each.arg_name: each.description for each in parse(cls.__doc__ or "").params}
    hints = get_type_hints(cls)
    return [
        Option(
            each.name,
            default_of(each),
            get_args(hints[each.name]) if get_origin(hints[each.name]) is Literal else (),
            " ".join((text.get(each.name) or "").split()),
        )
        for each in fields(cls)
        if each.init
    ]
