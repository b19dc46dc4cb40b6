"""DCP-Prune (arXiv 2606.16633) as a preset: `dcp` behind stages that make the encoder faster."""

from __future__ import annotations

from dataclasses import dataclass, field

from dcp_prune.pruners.dcp import ACGR, DCPPruner


@dataclass(frozen=True, kw_only=True)
class ProgressiveDCPPruner(DCPPruner):
    """DCP-Prune with stages inside the encoder: half of the tokens leave at half of its depth, half of the others at
    three quarters.

    The encoder gets faster, and what its later layers would have worked out from the dropped tokens is lost: on the
    testbed that is most of counting. All else is as in `DCPPruner`.
    """

    acgr: ACGR | None = field(default_factory=ACGR)
