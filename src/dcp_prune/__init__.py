"""Visual-token pruning for vision-language models: DCP-Prune, its measure of distribution shift, and its peers.

Public names are resolved when first used, so that `import dcp_prune` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcp_prune.budget import Budget
    from dcp_prune.errors import (
        DcpPruneError,
        InvalidInputError,
        MissingSignalError,
        UnknownPrunerError,
        UnsupportedModelError,
        UnsupportedVersionError,
    )
    from dcp_prune.functional.distribution import kappa
    from dcp_prune.integrations.transformers import get_handle, prune, prune_inputs
    from dcp_prune.pruners.base import EncoderStage, Pruner, ScorePruner, Selection, SelectionPruner
    from dcp_prune.pruners.cls_attention import ClsAttentionPruner
    from dcp_prune.pruners.dcp import ACGR, TATCS, DCPPruner, Trigger
    from dcp_prune.pruners.dcp_lookup import LookupDCPPruner
    from dcp_prune.pruners.dcp_progressive import ProgressiveDCPPruner
    from dcp_prune.pruners.random import RandomPruner
    from dcp_prune.pruners.uniform import UniformPruner
    from dcp_prune.registry import get_pruner, list_pruners, make_pruner, register_pruner
    from dcp_prune.tokens import EncoderReduction, EncoderTokens, PrunedTokens, Signal, VisualTokens

__version__ = "0.1.0"

_HOMES = {
    "budget": ("Budget",),
    "errors": (
        "DcpPruneError",
        "InvalidInputError",
        "MissingSignalError",
        "UnknownPrunerError",
        "UnsupportedModelError",
        "UnsupportedVersionError",
    ),
    "functional.distribution": ("kappa",),
    "integrations.transformers": ("get_handle", "prune", "prune_inputs"),
    "pruners.base": ("EncoderStage", "Pruner", "ScorePruner", "Selection", "SelectionPruner"),
    "pruners.cls_attention": ("ClsAttentionPruner",),
    "pruners.dcp": ("ACGR", "TATCS", "DCPPruner", "Trigger"),
    "pruners.dcp_lookup": ("LookupDCPPruner",),
    "pruners.dcp_progressive": ("ProgressiveDCPPruner",),
    "pruners.random": ("RandomPruner",),
    "pruners.uniform": ("UniformPruner",),
    "registry": ("get_pruner", "list_pruners", "make_pruner", "register_pruner"),
    "tokens": ("EncoderReduction", "EncoderTokens", "PrunedTokens", "Signal", "VisualTokens"),
}
_HOME_OF = {name: f"dcp_prune.{module}" for module, names in _HOMES.items() for name in names}

__all__ = [
    "ACGR",
    "TATCS",
    "Budget",
    "ClsAttentionPruner",
    "DCPPruner",
    "DcpPruneError",
    "EncoderReduction",
    "EncoderStage",
    "EncoderTokens",
    "InvalidInputError",
    "LookupDCPPruner",
    "MissingSignalError",
    "ProgressiveDCPPruner",
    "PrunedTokens",
    "Pruner",
    "RandomPruner",
    "ScorePruner",
    "Selection",
    "SelectionPruner",
    "Signal",
    "Trigger",
    "UniformPruner",
    "UnknownPrunerError",
    "UnsupportedModelError",
    "UnsupportedVersionError",
    "VisualTokens",
    "get_handle",
    "get_pruner",
    "kappa",
    "list_pruners",
    "make_pruner",
    "prune",
    "prune_inputs",
    "register_pruner",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'dcp_prune' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
