"""FasterVLM's rule (arXiv 2412.01818): what [CLS] attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from dcp_prune.pruners.base import ScorePruner, missing_signals
from dcp_prune.tokens import Signal, VisualTokens


@dataclass(frozen=True, kw_only=True)
class ClsAttentionPruner(ScorePruner):
    """Keeps the k tokens that the encoder's [CLS] attends to most at the feature layer, averaged over heads."""

    requires: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION})

    def score(self, tokens: VisualTokens) -> Float[Tensor, "b n"]:
        if tokens.encoder is None or tokens.encoder.cls_attention is None:
            raise missing_signals(type(self).__name__, Signal.CLS_ATTENTION)
        return tokens.encoder.cls_attention
