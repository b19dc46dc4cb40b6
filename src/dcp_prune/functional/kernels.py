"""Greedy loops as single Triton kernels: one launch for all picks of a batch, one program an image.

Imported only where Triton is there and a GPU holds the tensors. Same picks as the loops of torch operators beside which
they stand, but where two tokens are equal to the last digits.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor

_COLUMNS = 16
"""Candidates whose gains a program adds up at once; with all their rows they have to fit into its registers."""


@triton.jit
def _coverage(similarity, need, merit, open_, picks, n, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: N803
    image = tl.program_id(0).to(tl.int64)
    similarity += image * n * n
    need += image * n
    merit += image * n
    open_ += image * n
    rows = tl.arange(0, ROWS)
    real = rows < n
    demand = tl.load(need + rows, mask=real, other=0.0)
    cover = tl.zeros((ROWS,), tl.float32)
    for step in range(k):
        best, pick = float("-inf"), 0
        for start in range(0, n, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            there = columns < n
            tile = tl.load(
                similarity + rows[:, None] * n + columns[None, :], mask=real[:, None] & there[None, :], other=0.0
            )
            left = tl.maximum(tile - cover[:, None], 0.0)
            gain = tl.sum(left * demand[:, None], axis=0) * tl.load(merit + columns, mask=there, other=0.0)
            gain += tl.load(open_ + columns, mask=there, other=float("-inf"))
            highest = tl.max(gain, axis=0)
            place = tl.argmax(gain, axis=0)
            pick = tl.where(highest > best, start + place, pick)
            best = tl.maximum(highest, best)
        tl.store(picks + image * k + step, pick)
        tl.store(open_ + pick, float("-inf"))
        tl.debug_barrier()
        cover = tl.maximum(cover, tl.load(similarity + rows * n + pick, mask=real, other=0.0))


@triton.jit
def _farthest(similarity, weights, nearest, picks, n, k, WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: N803
    image = tl.program_id(0).to(tl.int64)
    similarity += image * n * n
    picks += image * k
    columns = tl.arange(0, COLUMNS)
    real = columns < n
    near = tl.load(nearest + image * n + columns, mask=real, other=float("inf"))
    heavy = tl.load(weights + image * n + columns, mask=real, other=0.0)
    pick = tl.load(picks)
    for step in range(1, k):
        near = tl.maximum(near, tl.load(similarity + pick * n + columns, mask=real, other=float("inf")))
        near = tl.where(columns == pick, float("inf"), near)
        if WEIGHTED:
            pick = tl.argmax(tl.where(real, (1.0 - near) * heavy, float("-inf")), axis=0).to(tl.int64)
        else:
            pick = tl.argmin(near, axis=0).to(tl.int64)
        tl.store(picks + step, pick)


def coverage_picks(
    similarity: Float[Tensor, "b n n"],
    need: Float[Tensor, "b n"],
    merit: Float[Tensor, "b n"] | None,
    open_: Float[Tensor, "b n"],
    k: int,
) -> Int[Tensor, "b k"]:
    """The picks of `clustering.max_coverage` for one set of points.

    Args:
        similarity: of rows to candidates. `b n n`.
        need: of each row. `b n`.
        merit: of each candidate; None for 1. `b n`.
        open_: 0 for candidates, -inf for what cannot be picked; is written to. `b n`.
        k: tokens to pick.
    """
    b, n, _ = similarity.shape
    picks = torch.empty(b, k, dtype=torch.long, device=similarity.device)
    worth = torch.ones_like(need) if merit is None else merit.contiguous()
    _coverage[(b,)](  # type: ignore[index]
        similarity.contiguous(), need.contiguous(), worth, open_, picks, n, k,
        ROWS=triton.next_power_of_2(n), COLUMNS=_COLUMNS, num_warps=16,
    )  # fmt: skip
    return picks


def farthest_picks(
    similarity: Float[Tensor, "b n n"],
    weights: Float[Tensor, "b n"] | None,
    nearest: Float[Tensor, "b n"],
    first: Int[Tensor, "b 1"],
    k: int,
) -> Int[Tensor, "b k"]:
    """The picks of `selection.farthest_point`, whose first one is given.

    Args:
        similarity: symmetric. `b n n`.
        weights: None for none. `b n`.
        nearest: similarity to what was picked before: -inf for candidates, inf for padding. `b n`.
        first: picks to begin with. `b 1`.
        k: tokens to pick.
    """
    b, n, _ = similarity.shape
    picks = first.expand(b, k).contiguous()
    heavy = nearest if weights is None else weights.contiguous()
    _farthest[(b,)](  # type: ignore[index]
        similarity.contiguous(), heavy, nearest.contiguous(), picks, n, k,
        WEIGHTED=weights is not None, COLUMNS=triton.next_power_of_2(n), num_warps=8,
    )  # fmt: skip
    return picks
