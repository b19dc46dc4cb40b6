"""Random tokens: a seeded draw, the floor that every method has to clear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dcp_prune.pruners.base import ScorePruner
from dcp_prune.pruners.options import Whole
from dcp_prune.tokens import VisualTokens

_DIRECTIONS = 8
_BITS = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class RandomPruner(ScorePruner):
    """Keeps k random tokens, drawn anew for each image; the same image and seed give the same draw.

    Images are told apart by the positions at which their features reach farthest in a few fixed directions (ours).
    Neither the batch nor rounding changes these. A larger budget keeps a superset.

    Attributes:
        seed: seed of the draws.
    """

    seed: Whole = 0

    def score(self, tokens: VisualTokens) -> Float[Tensor, "b n"]:
        features = tokens.features.float()
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(features.shape[-1], _DIRECTIONS, generator=generator).to(features.device)
        reach = (features @ directions).masked_fill(~tokens.mask.unsqueeze(-1), float("-inf"))
        landmarks = tokens.indices.gather(1, reach.argmax(dim=1))
        key = torch.full_like(landmarks[:, 0], self.seed & _BITS)
        for place in landmarks.unbind(dim=1):
            key = _scrambled(key ^ place)
        drawn = _scrambled(key.unsqueeze(1) ^ _scrambled(tokens.indices + 1))
        return (drawn.double() / 2**32).float()


def _scrambled(number: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """32 bits that look like chance, one to one: the last step of MurmurHash3 (Appleby, public domain). It runs where
    the numbers are, so that no host waits for an image's key."""
    number = number & _BITS
    number = ((number ^ (number >> 16)) * 0x85EBCA6B) & _BITS
    number = ((number ^ (number >> 13)) * 0xC2B2AE35) & _BITS
    return number ^ (number >> 16)
