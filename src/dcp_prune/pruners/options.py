"""What configures a pruner: frozen dataclasses that check each field against its type and print what is not default."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Self, Union, cast, get_args, get_origin, get_type_hints

from dcp_prune.errors import InvalidInputError


class Rule(NamedTuple):
    """What a value has to be, in words that follow "must", and the test of it."""

    says: str
    holds: Callable[[Any], bool]


def is_number(value: object) -> bool:
    """Whether it is a number, NaN excluded; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def is_whole(value: object) -> bool:
    """Whether it is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


Number = Annotated[float, Rule("be a finite number", lambda x: is_number(x) and math.isfinite(x))]
Weight = Annotated[float, Rule("be a number of at least 0", lambda x: is_number(x) and 0 <= x < math.inf)]
Positive = Annotated[float, Rule("be a number above 0", lambda x: is_number(x) and 0 < x < math.inf)]
Share = Annotated[float, Rule("lie in [0, 1]", lambda x: is_number(x) and 0 <= x <= 1)]
Bound = Annotated[float, Rule("be at least 0", lambda x: is_number(x) and x >= 0)]
"""As `Weight`, and inf as well."""
Whole = Annotated[int, Rule("be a whole number", is_whole)]
Count = Annotated[int, Rule("be a whole number of at least 1", lambda x: is_whole(x) and x >= 1)]


@dataclass(frozen=True)
class Checked:
    """A frozen dataclass whose construction refuses what its field types do not allow, and whose repr is short.

    Types that are checked: `Literal`, `bool`, another `Checked`, what this file defines, and unions of those with None
    and tuples. Fields of any other type are up to the class.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):  # or `dataclass` writes one that prints every field
            cls.__repr__ = Checked.__repr__

    def __new__(cls, *args: Any, **options: Any) -> Self:
        own = {each.name for each in fields(cls)}
        if args and all(each.kw_only for each in fields(cls)):
            example = f"{cls.__name__}({fields(cls)[0].name}={args[0]!r})"
            raise InvalidInputError(f"{cls.__name__} takes its options by name, as in {example}")
        for group, kind in groups_of(cls).items():
            if misplaced := [each.name for each in fields(kind) if each.name in options.keys() - own]:
                raise InvalidInputError(
                    f"{misplaced[0]} is an option of {kind.__name__}: write "
                    f"{cls.__name__}({group}={kind.__name__}({misplaced[0]}={options[misplaced[0]]!r}), ...)"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, rules in _rules(type(self)).items():
            value = getattr(self, name)
            if rules and not any(rule.holds(value) for rule in rules):
                says = " or ".join(rule.says for rule in rules)
                raise InvalidInputError(f"{type(self).__name__}: {name} must {says}, got {value!r}")

    def __repr__(self) -> str:
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.repr}
        shown = [f"{each.name}={given[each.name]!r}" for each in fields(self) if given[each.name] != default_of(each)]
        return f"{type(self).__name__}({', '.join(shown)})"


@cache
def groups_of(cls: type[Checked]) -> dict[str, type[Checked]]:
    """The fields of a class that are themselves `Checked`, with their class: the groups that its options fall into."""
    found = {name: [each for each in _alternatives(hint) if _is_checked(each)] for name, hint in _hints(cls).items()}
    return {name: kinds[0] for name, kinds in found.items() if kinds}


def default_of(each: Field[Any]) -> Any:
    """The default of a field, made if need be; `MISSING` without one."""
    return each.default if each.default_factory is MISSING else each.default_factory()


@cache
def _rules(cls: type[Checked]) -> dict[str, tuple[Rule, ...]]:
    """For each field the rules of which one has to hold; none where the class checks it itself."""
    hints = _hints(cls)
    found: dict[str, tuple[Rule, ...]] = {}
    for each in fields(cls):
        rules = [_rule(kind) for kind in _alternatives(hints.get(each.name, Any))]
        found[each.name] = () if None in rules else tuple(cast("list[Rule]", rules))
    return found


def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls, include_extras=True)
    except NameError:  # a class of another package, whose types are only there for type checkers
        return {}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _rule(kind: Any) -> Rule | None:
    if kind is NoneType:
        return Rule("None", lambda value: value is None)
    if kind is bool:
        return Rule("be True or False", lambda value: isinstance(value, bool))
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return Rule(f"be one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)
    if get_origin(kind) is Annotated:
        return next((extra for extra in kind.__metadata__ if isinstance(extra, Rule)), None)
    if get_origin(kind) is tuple and get_args(kind)[1:] == (...,):
        inner = _rule(get_args(kind)[0])
        return inner and Rule(
            "a tuple of such", lambda value: isinstance(value, tuple) and all(map(inner.holds, value))
        )
    if _is_checked(kind):
        return Rule(f"be {kind.__name__}(...)", lambda value: isinstance(value, kind))
    return None


def _is_checked(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Checked)
