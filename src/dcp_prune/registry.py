"""Pruners by name: built in, registered at run time, or brought by another package's entry point."""

from __future__ import annotations

import difflib
from dataclasses import fields
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from dcp_prune.errors import DcpPruneError, InvalidInputError, UnknownPrunerError

if TYPE_CHECKING:
    from dcp_prune.pruners.base import Pruner

ENTRY_POINT_GROUP = "dcp_prune.pruners"
"""Group in which another package lists its pruners: name -> "module:Class"."""

_TARGETS: dict[str, str | type[Pruner]] = {
    "dcp": "dcp_prune.pruners.dcp:DCPPruner",
    "dcp_progressive": "dcp_prune.pruners.dcp:ProgressiveDCPPruner",
    "random": "dcp_prune.pruners.random:RandomPruner",
    "uniform": "dcp_prune.pruners.uniform:UniformPruner",
    "cls_attention": "dcp_prune.pruners.cls_attention:ClsAttentionPruner",
    "scope": "dcp_prune.pruners.scope:SCOPEPruner",
    "divprune": "dcp_prune.pruners.divprune:DivPrunePruner",
    "mmtok": "dcp_prune.pruners.mmtok:MMTokPruner",
    "visionzip": "dcp_prune.pruners.visionzip:VisionZipPruner",
    "holov": "dcp_prune.pruners.holov:HoloVPruner",
    "flowcut": "dcp_prune.pruners.flowcut:FlowCutPruner",
    "prunesid": "dcp_prune.pruners.prunesid:PruneSIDPruner",
    "vispruner": "dcp_prune.pruners.vispruner:VisPruner",
    "otprune": "dcp_prune.pruners.otprune:OTPrunePruner",
    "cdpruner": "dcp_prune.pruners.cdpruner:CDPruner",
}


def register_pruner(name: str, target: str | type[Pruner]) -> None:
    """Makes a pruner known under a name, for this process.

    Args:
        name: lower case, as in the paper.
        target: the class, or "module:Class", which is imported when someone asks for it.

    Raises:
        InvalidInputError: the name is taken by another target, or the target is no "module:Class".
    """
    if isinstance(target, str) and not all(target.partition(":")):
        raise InvalidInputError(f'the target of pruner {name!r} must be a class or "module:Class", got {target!r}')
    if _TARGETS.setdefault(name, target) != target:
        raise InvalidInputError(f"a pruner named {name!r} is already registered; choose another name")


def list_pruners() -> tuple[str, ...]:
    """The names of all pruners, sorted; none of them is imported."""
    return tuple(sorted({*_TARGETS, *entry_points(group=ENTRY_POINT_GROUP).names}))


def get_pruner(name: str) -> type[Pruner]:
    """The class of a pruner, imported now. A built-in or registered name goes before an entry point's.

    Raises:
        UnknownPrunerError: no such name; suggests near ones.
        DcpPruneError: the name is known but its target cannot be imported.
    """
    target = _TARGETS.get(name)
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
    """A pruner by name with its options, for example `make_pruner("dcp", num_tokens=16)`.

    Raises:
        UnknownPrunerError: no such name.
        InvalidInputError: an option that the pruner does not have, or a value that it refuses.
    """
    cls = get_pruner(name)
    known = [field.name for field in fields(cls) if field.init]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise InvalidInputError(f"pruner {name!r} has no option {option!r}; {hint}")
    return cls(**options)


def _unknown(name: str) -> str:
    names = list_pruners()
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
    return f"no pruner is named {name!r}; {hint}"
