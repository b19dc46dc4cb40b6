"""Resizing (arXiv 2510.07143): the means of k cells of the grid, as if the picture had been made smaller."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from dcp_prune.functional.similarity import gather_tokens, widened
from dcp_prune.pruners.base import Pruner, Selection
from dcp_prune.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class ResizePruner(Pruner):
    """Averages the grid of tokens to k cells of one size. Each cell is a token at the middle of the cell.

    What a smaller picture would give, for encoders that cannot take one: VTC-Bench found that making pictures smaller
    beats many pruners. Cells form r lines of c, as near to squares as k = r * c allows. Where no such product comes
    near, lines differ by one cell, and in height accordingly, so that exactly k cells hold as many tokens each as can
    be (ours).

    Of a video, frames are pooled as if they lay one below the other (ours).
    """

    def prune(self, tokens: VisualTokens, k: int) -> Selection:
        with torch.no_grad():
            cells = grid_cells(tokens, k)
            member = functional.one_hot(cells, k + 1)[..., :k].mT.to(torch.float32)  # b k n
            share = member / member.sum(dim=2, keepdim=True).clamp(min=1.0)
            middle = share @ tokens.positions.float()
            away = (tokens.positions.float() - gather_tokens(middle, cells.clamp(max=k - 1))).square().sum(dim=2)
            centre = away.unsqueeze(1).masked_fill(member == 0, torch.inf).argmin(dim=2)
            kept, order = centre.sort(dim=1)
            slot = functional.pad(order.argsort(dim=1), (0, 1), value=-1)
        features = widened(tokens.features)
        means = (share.gather(1, order.unsqueeze(2).expand_as(share)).to(features.dtype) @ features).to(
            tokens.features.dtype
        )
        return Selection(kept=kept, features=means, assignment=slot.gather(1, cells))


def grid_cells(tokens: VisualTokens, k: int) -> Int[Tensor, "b n"]:
    """The cell of each token, in 0..k-1 line by line; k for padding. No cell is empty, whatever part of the grid is.

    The tokens are dealt out to lines from top to bottom, and those of a line to its cells from left to right, in equal
    numbers: on a grid that r and c divide these are its rectangles.
    """
    b = len(tokens.mask)
    count = tokens.mask.sum(dim=1, keepdim=True)
    lines = number_of_lines(tokens, k).unsqueeze(1)
    line_of_cell = (torch.arange(k, device=lines.device) * lines + lines - 1) // k  # ascending, as even as k allows
    down = _ranks(tokens, [1, 0, *range(2, tokens.positions.shape[2])])
    line = line_of_cell.gather(1, (down * k // count.clamp(min=1)).clamp(max=k - 1))

    first_cell = torch.searchsorted(line_of_cell, line)  # of each token's line
    in_line = torch.zeros(b, k + 1, dtype=torch.long, device=line.device)
    in_line = in_line.scatter_add(1, line.masked_fill(~tokens.mask, k), torch.ones_like(line))
    before = (in_line.cumsum(dim=1) - in_line).gather(1, line)
    across = _ranks(tokens, [0, 1], first=line) - before
    cells = torch.searchsorted(line_of_cell, line, right=True) - first_cell
    cell = first_cell + across * cells // in_line.gather(1, line).clamp(min=1)
    return cell.masked_fill(~tokens.mask, k)


def number_of_lines(tokens: VisualTokens, k: int) -> Int[Tensor, "b"]:
    """How many lines of cells come nearest to squares; a number that divides k may be half off. `b`."""
    positions, inside = tokens.positions.float(), tokens.mask.unsqueeze(-1)
    low = positions.masked_fill(~inside, torch.inf).amin(dim=1)
    size = (positions.masked_fill(~inside, -torch.inf).amax(dim=1) - low + 1.0).clamp(min=1.0)
    height = size[:, 0] * size[:, 2:].prod(dim=1)
    lines = torch.arange(1, k + 1, device=size.device)
    off = (lines / (k * height / size[:, 1]).sqrt().unsqueeze(1)).log().abs() + torch.where(k % lines == 0, 0.0, 0.35)
    return 1 + off.round(decimals=3).argmin(dim=1)  # of two that are equally far off the smaller, on every device


def _ranks(tokens: VisualTokens, axes: list[int], first: Int[Tensor, "b n"] | None = None) -> Int[Tensor, "b n"]:
    """The place of each token when they are ordered by these axes of their positions, the last one first; before those
    by `first`. Padding comes last."""
    keys: list[Float[Tensor, "b n"] | Int[Tensor, "b n"]] = [tokens.positions[..., axis].float() for axis in axes]
    if first is not None:
        keys.append(first)
    order = torch.zeros_like(tokens.indices) + torch.arange(tokens.mask.shape[1], device=tokens.mask.device)
    for key in [*keys, (~tokens.mask).to(torch.uint8)]:
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    return order.argsort(dim=1)
