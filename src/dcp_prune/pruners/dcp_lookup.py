"""DCP-Prune as a preset that reads the question as the language model's first attention layer does. Ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dcp_prune.pruners.dcp import TATCS, DCPPruner
from dcp_prune.tokens import TextSpace


@dataclass(frozen=True, kw_only=True)
class LookupDCPPruner(DCPPruner):
    """`DCPPruner` with words looked up among visual tokens by the first layer's queries and keys.

    Word embeddings and visual tokens may have little in common, and yet the language model finds what a word names:
    its first layer has learned to. This preset asks that layer instead of the embeddings, trusts every word, and lets
    the question weigh more. It works on language models whose first layer has plain projections; whether it helps is
    measured on the testbed alone.
    """

    text_space: ClassVar[TextSpace] = "lookup"

    tatcs: TATCS = field(
        default_factory=lambda: TATCS(
            centre_temperature=0.15,
            centre_sigma=3.0,
            coverage_weight=0.1,
            confidence_margin=-5.0,
            member_relevance=1.0,
        )
    )
