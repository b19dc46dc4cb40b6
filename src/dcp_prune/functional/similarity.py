"""Cosines and the small scalings that scores share."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def widened(values: Tensor) -> Tensor:
    """The same numbers in at least float32: half precision is raised, float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def cosine_similarity(
    left: Float[Tensor, "b n d"], right: Float[Tensor, "b m d"] | None = None
) -> Float[Tensor, "b n m"]:
    """Cosine of every token on the left to every token on the right (default: the same tokens), in `widened` precision.

    A zero vector has cosine 0 to everything, itself included.
    """
    unit = functional.normalize(widened(left), dim=-1)
    other = unit if right is None else functional.normalize(widened(right), dim=-1)
    return unit @ other.mT


def scale_to_peak(scores: Float[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n"]:
    """Non-negative scores divided by their largest, so that they lie in [0, 1]; padding and all-zero rows give 0.

    Float32.
    """
    scores = scores.float()
    if mask is not None:
        scores = scores.masked_fill(~mask, 0.0)
    peak = scores.amax(dim=1, keepdim=True)
    return scores / peak.clamp(min=torch.finfo(torch.float32).tiny)


def gather_tokens(features: Float[Tensor, "b n d"], kept: Tensor) -> Float[Tensor, "b k d"]:
    """The tokens at the positions `kept`, `b k`, of each row."""
    return features.gather(1, kept.unsqueeze(-1).expand(*kept.shape, features.shape[-1]))
