"""Uniform tokens: a regular grid, the floor for methods that look at the image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcp_prune.pruners.base import SelectionPruner
from dcp_prune.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class UniformPruner(SelectionPruner):
    """Keeps k tokens spread evenly over the grid of the image, whatever they show.

    About sqrt(k) evenly spaced lines share the k points. Each point takes the nearest free token, so exactly k are
    kept, even if k is not a product or part of the grid is padding.

    The frames of a video share the k points as evenly as k allows, in an order that spreads those of every frame over
    the grid and those of all frames over all of it (ours).
    """

    def select(self, tokens: VisualTokens, k: int) -> Int[Tensor, "b k"]:
        positions, inside = tokens.positions[..., :2].float(), tokens.mask.unsqueeze(-1)
        low = positions.masked_fill(~inside, torch.inf).amin(dim=1)
        size = positions.masked_fill(~inside, -torch.inf).amax(dim=1) - low + 1.0
        targets = low.unsqueeze(1) - 0.5 + even_lattice(k, size[:, 0] / size[:, 1]) * size.unsqueeze(1)
        if tokens.positions.shape[-1] > 2:
            frames = frame_numbers(tokens.positions[..., 2], tokens.mask)
            # Two frames lie farther apart than any two places of one: a frame's points first take its own tokens.
            across = size.sum(dim=1)[:, None, None]
            positions = torch.cat((positions, frames.unsqueeze(-1) * across), dim=-1)
            wanted = share_out(k, frames.amax(dim=1) + 1)
            targets = torch.cat((targets, wanted.unsqueeze(-1) * across), dim=-1)
        distance = (targets.unsqueeze(2) - positions.unsqueeze(1)).square().sum(dim=-1)  # b k n
        distance = distance.masked_fill(~tokens.mask.unsqueeze(1), torch.inf)
        picks: list[Tensor] = []
        taken = torch.zeros_like(distance[:, 0])
        for point in range(k):
            pick = (distance[:, point] + taken).argmin(dim=1, keepdim=True)
            picks.append(pick)
            taken = taken.scatter(1, pick, torch.inf)
        return torch.cat(picks, dim=1)


def even_lattice(k: int, aspect: Float[Tensor, "b"]) -> Float[Tensor, "b k 2"]:
    """The k points (row, col) of a lattice in the unit square, on even lines that share them as evenly as k allows.

    Args:
        k: number of points.
        aspect: height over width of each image, to which the number of lines is fitted. `b`.
    """
    point = torch.arange(k, device=aspect.device)
    lines = (k * aspect).sqrt().round().long().clamp(1, k).unsqueeze(1)
    line = ((point + 1) * lines - 1) // k
    first, following = line * k // lines, (line + 1) * k // lines
    return torch.stack(((line + 0.5) / lines, (point - first + 0.5) / (following - first)), dim=-1)


def frame_numbers(time: Float[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Which of the frames of its video each token is in, counted from 0; 0 for padding."""
    ordered, order = time.masked_fill(~mask, torch.inf).sort(dim=1)
    later = ordered[:, 1:] > ordered[:, :-1]
    rank = torch.zeros_like(order)
    rank[:, 1:] = later.cumsum(dim=1)
    return torch.empty_like(order).scatter(1, order, rank).masked_fill(~mask, 0)


def share_out(k: int, frames: Int[Tensor, "b"]) -> Int[Tensor, "b k"]:
    """A frame for each of k points of a lattice, as many for every frame as k allows.

    Neighbours among the points are dealt out about 0.62 of the frames apart, so that the points of a frame lie apart.
    """
    stride = next(step for step in range(round(0.618 * k), 2 * k + 1) if math.gcd(step, k) == 1)
    turn = torch.arange(k, device=frames.device) * stride % k
    return (2 * turn + 1) * frames.unsqueeze(1) // (2 * k)
