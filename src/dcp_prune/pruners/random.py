"""Random tokens: a seeded draw, the floor that every method has to clear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dcp_prune.pruners.base import ScorePruner
from dcp_prune.pruners.options import Whole
from dcp_prune.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class RandomPruner(ScorePruner):
    """Keeps k tokens at random, drawn once per seed over the original positions of an image.

    Every image of the same size loses the same positions, so a result depends neither on the batch nor on the dtype or
    device, and a larger budget keeps a superset. For a fair average, run several seeds.

    Attributes:
        seed: of the draw.
    """

    seed: Whole = 0

    def score(self, tokens: VisualTokens) -> Float[Tensor, "b n"]:
        generator = torch.Generator().manual_seed(self.seed)
        draw = torch.rand(tokens.num_original, generator=generator).to(tokens.features.device)
        return draw[tokens.indices]
