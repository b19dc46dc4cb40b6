"""Pruners by name: built in, registered at run time, or from the entry point of another package."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dcp_prune.errors import DcpPruneError, InvalidInputError, UnknownPrunerError

if TYPE_CHECKING:
    from dcp_prune.pruners.base import Pruner

ENTRY_POINT_GROUP = "dcp_prune.pruners"
"""Group in which another package lists its pruners: name -> "module:Class"."""

_SHARED = {"base", "batching", "options"}
"""Files beside the methods; any other file of `pruners/` is a method, named as it is registered."""
_REGISTERED: dict[str, str | type[Pruner]] = {}
"""What `register_pruner` was told: name -> class, or where it is."""


def register_pruner(name: str, target: str | type[Pruner]) -> None:
    """Registers a pruner under a name, for this process.

    Args:
        name: lower case, as in the paper.
        target: the class, or "module:Class", which is imported when the pruner is first used.

    Raises:
        InvalidInputError: the name is taken by another target, or the target is not a "module:Class".
    """
    if isinstance(target, str) and not all(target.partition(":")):
        raise InvalidInputError(f'the target of pruner {name!r} must be a class or "module:Class", got {target!r}')
    if name in _built_in() or _REGISTERED.setdefault(name, target) != target:
        raise InvalidInputError(f"a pruner named {name!r} is already registered; choose another name")


def list_pruners() -> tuple[str, ...]:
    """The names of all pruners, sorted; none of them is imported."""
    return tuple(sorted({*_built_in(), *_REGISTERED, *entry_points(group=ENTRY_POINT_GROUP).names}))


def get_pruner(name: str) -> type[Pruner]:
    """The class of a pruner, imported now. Built-in and registered names go before those of entry points.

    Raises:
        UnknownPrunerError: no such name; suggests near ones.
        DcpPruneError: the name is known but its target cannot be imported.
    """
    if name in _built_in():
        return _method_in(import_module(f"dcp_prune.pruners.{name}"))
    target = _REGISTERED.get(name)
    if target is None:
        found = entry_points(group=ENTRY_POINT_GROUP, name=name)
        if not found:
            raise UnknownPrunerError(_unknown(name))
        target = next(iter(found)).value
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DcpPruneError(
            f"pruner {name!r} is registered as {target!r}, which cannot be imported: {error}"
        ) from error


def make_pruner(name: str, **options: Any) -> Pruner:
    """A pruner by name with its options, for example `make_pruner("dcp", num_tokens=16, text_weight=0.5)`.

    If fields of a pruner are groups of options (`DCPPruner.acgr`, `.trigger`, `.tatcs`), give an option of a group by
    its own name, as in specs and configuration files. You may also give a whole group, as an object or as a mapping.
    Options of a group that is None by default start from the defaults of its class: `make_pruner("dcp", ...,
    recovery=5.0)` has the stages of `ACGR()`.

    Raises:
        UnknownPrunerError: no such name.
        InvalidInputError: an option that the pruner does not have, a value that it refuses, or a whole group together
            with one of its options.
    """
    from dcp_prune.pruners.options import default_of, groups_of

    cls = get_pruner(name)
    own = {each.name: each for each in fields(cls) if each.init}
    groups = groups_of(cls)
    group_of = {each.name: group for group, kind in groups.items() for each in fields(kind)}
    known = [option for field in own for option in (field, *(each for each in group_of if group_of[each] == field))]
    given: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for option, value in options.items():
        if option in groups and isinstance(value, Mapping):
            inner.setdefault(option, {}).update(value)
        elif option in own:
            given[option] = value
        elif option in group_of:
            inner.setdefault(group_of[option], {})[option] = value
        else:
            raise InvalidInputError(_no_option(name, option, known))
    for group, values in inner.items():
        if group in given:
            raise InvalidInputError(
                f"{name}: {group} is given whole and {', '.join(values)} beside it; give one of them"
            )
        in_group = [each for each in group_of if group_of[each] == group]
        for option in values:
            if option not in in_group:
                raise InvalidInputError(_no_option(name, option, in_group))
        start = default_of(own[group])
        given[group] = replace(start, **values) if isinstance(start, groups[group]) else groups[group](**values)
    return cls(**given)


@cache
def _built_in() -> frozenset[str]:
    found = find_spec("dcp_prune.pruners")
    assert found is not None
    return frozenset(each.name for each in iter_modules(found.submodule_search_locations)) - _SHARED


def _method_in(module: ModuleType) -> type[Pruner]:
    """The one pruner that a file of `pruners/` defines."""
    from dcp_prune.pruners.base import Pruner

    (found,) = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Pruner) and each.__module__ == module.__name__
    ]
    return found


def _no_option(name: str, option: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(option, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
    return f"pruner {name!r} has no option {option!r}; {hint}"


def _unknown(name: str) -> str:
    names = list_pruners()
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
    return f"no pruner is named {name!r}; {hint}"
