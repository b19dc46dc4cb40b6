"""Which greedy loops run as one kernel: those on a GPU, up to the size at which one program an image is slower."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

LARGEST_COVERAGE = 1024
"""Tokens whose matrix one program reads for every pick in less time than the launches of a step take."""
_LARGEST_FARTHEST = 16_384
"""Tokens of a row that one program holds."""
_HAS_TRITON = find_spec("triton") is not None


def coverage_is_fused(similarity: Tensor) -> bool:
    """Whether `kernels.coverage_picks` is the faster way for a matrix `b n n`."""
    return _can_be(similarity) and similarity.shape[1] == similarity.shape[2] <= LARGEST_COVERAGE


def farthest_is_fused(similarity: Tensor) -> bool:
    """Whether `kernels.farthest_picks` is the faster way for a matrix `b n n`."""
    return _can_be(similarity) and similarity.shape[2] <= _LARGEST_FARTHEST


def _can_be(matrix: Tensor) -> bool:
    return matrix.is_cuda and matrix.dtype == torch.float32 and _HAS_TRITON and not torch.compiler.is_compiling()
