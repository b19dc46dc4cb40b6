"""Cosines and the small scalings that scores share."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

_WORTH_STRIPS = 512
_ONE_THREAD = 32_768
"""Numbers that torch's operators leave to one thread."""


def widened(values: Tensor) -> Tensor:
    """The same numbers in at least float32: half precision is raised, float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def cosine_similarity(
    left: Float[Tensor, "b n d"], right: Float[Tensor, "b m d"] | None = None
) -> Float[Tensor, "b n m"]:
    """Cosine of every token on the left to every token on the right (default: the same tokens), in `widened` precision.

    A zero vector has cosine 0 to everything, itself included.
    """
    if right is None:
        return gram(functional.normalize(widened(left), dim=-1))
    left, right = widened(left), widened(right)
    return left @ right.mT / vector_lengths(left).unsqueeze(2) / vector_lengths(right).unsqueeze(1)


def vector_lengths(vectors: Float[Tensor, "b n d"]) -> Float[Tensor, "b n"]:
    """Euclidean lengths, kept above 0, so that a zero vector stays one when it is divided by its length."""
    return torch.linalg.vector_norm(vectors, dim=-1).clamp(min=1e-12)


def gram(vectors: Float[Tensor, "b n d"]) -> Float[Tensor, "b n n"]:
    """Inner product of every vector with every one of the same row, in their own precision.

    On one thread of a CPU, where arithmetic is what takes time, strip by strip, and what lies below the diagonal is
    copied from above it: five eighths of the products. Short vectors are not worth the copies.
    """
    b, n, d = vectors.shape
    if vectors.device.type != "cpu" or d < _WORTH_STRIPS or torch.get_num_threads() > 1:
        return vectors @ vectors.mT
    products = vectors.new_empty(b, n, n)
    strip = max(1, -(-n // 4))
    for start in range(0, n, strip):
        stop = start + strip
        products[:, start:stop, start:] = vectors[:, start:stop] @ vectors[:, start:].mT
        products[:, stop:, start:stop] = products[:, start:stop, stop:].mT
    return products


def strips(matrix: Float[Tensor, "b n m"]) -> tuple[Tensor, ...]:
    """The matrix as views of some rows each, to work on one by one in place.

    On a CPU a strip is small enough for one thread: beside another busy process, calling a second thread together costs
    a hundred times the arithmetic. Elsewhere there is one strip.
    """
    if matrix.device.type != "cpu":
        return (matrix,)
    return matrix.split(max(1, _ONE_THREAD // max(1, len(matrix) * matrix.shape[2])), dim=1)


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


def in_patches(positions: Float[Tensor, "b n p"], time_weight: float) -> Float[Tensor, "b n p"]:
    """Positions whose time, the third coordinate that tokens of videos have, counts as so many patches each (ours)."""
    positions = positions.float()
    return torch.cat((positions[..., :2], positions[..., 2:] * time_weight), dim=-1)
