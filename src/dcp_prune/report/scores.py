"""Relative scores, leads and differences of a cell, each with an interval from the same draws of images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from dcp_prune.eval.statistics.bootstrap import RESAMPLES, Interval, Resampling
from dcp_prune.eval.statistics.intervals import accuracy
from dcp_prune.report.results import OURS, Cell, Entry


class GapError(Exception):
    """A part of the report cannot be made from these records; the message, which is printed there, says why."""


@dataclass(frozen=True)
class Lead:
    """How far one method is ahead of another at one budget, in points of relative score."""

    entry: Entry
    over: Entry
    points: Interval


class Scores:
    """What the answers of a cell are worth.

    A relative score is the share of the unpruned model's score, per task, then the mean over the tasks; above the
    floor it is (score - floor) / (full - floor), where the floor is the score without an image. Every statistic is
    computed in every draw of images, row 0 being the observed sample; ratios are formed within a draw.

    Attributes:
        cell: whose answers.
        resampling: the draws.
        by_task: mean score of each draw, method and task, in [0, 1]; NaN where a draw has no question of the task.
            `r m t`.
    """

    def __init__(self, cell: Cell, *, resamples: int = RESAMPLES) -> None:
        self.cell = cell
        self.resampling = Resampling.of(cell.images, resamples=resamples)
        with np.errstate(invalid="ignore"):
            self.by_task = self.resampling.totals(self.sums(cell.score)) / self._counts[:, None, :]

    def sums(self, values: Float[np.ndarray, "m q"]) -> Float[np.ndarray, "g m t"]:
        """Sum over the questions of each image and task."""
        shape = (self.cell.images, len(self.cell.tasks))
        bins = self.cell.image * shape[1] + self.cell.task
        rows = [np.bincount(bins, weights=row, minlength=shape[0] * shape[1]).reshape(shape) for row in values]
        return np.stack(rows, axis=1)

    @cached_property
    def _counts(self) -> Float[np.ndarray, "r t"]:
        return self.resampling.totals(self.sums(np.ones((1, len(self.cell.image)))))[:, 0, :]

    @cached_property
    def silent(self) -> tuple[str, ...]:
        """Tasks of which the unpruned model answers nothing right: they have no relative score and are left out."""
        return tuple(np.array(self.cell.tasks)[self._full[0] == 0].tolist())

    @cached_property
    def blind(self) -> tuple[str, ...]:
        """Tasks on which the image does not surely help: full minus floor does not exclude zero. They have no score
        above the floor and are left out there."""
        low = self.resampling.intervals(self._full - self._floor)[1]
        return tuple(np.array(self.cell.tasks)[~(low > 0)].tolist())

    @cached_property
    def relative_by_task(self) -> Float[np.ndarray, "r m t"]:
        """Share of the unpruned score; NaN for `silent` tasks."""
        full = np.where(np.isin(self.cell.tasks, self.silent), np.nan, self._full)
        with np.errstate(invalid="ignore", divide="ignore"):
            return _finite(self.by_task / full[:, None, :])

    @cached_property
    def relative(self) -> Float[np.ndarray, "r m"]:
        """Mean over the tasks."""
        if len(self.silent) == len(self.cell.tasks):
            raise GapError("the unpruned model answers nothing right, so there is nothing to be relative to")
        return _mean_over_tasks(self.relative_by_task)

    @cached_property
    def above_floor(self) -> Float[np.ndarray, "r m"]:
        """(score - floor) / (full - floor), mean over the tasks."""
        if len(self.blind) == len(self.cell.tasks):
            raise GapError("on no task does the image surely help, so there is nothing above the floor")
        floor = self._floor[:, None, :]
        span = np.where(np.isin(self.cell.tasks, self.blind), np.nan, self._full - self._floor)
        with np.errstate(invalid="ignore", divide="ignore"):
            return _mean_over_tasks(_finite((self.by_task - floor) / span[:, None, :]))

    def accuracy(self, place: int) -> Interval:
        """Share of right answers over all questions; Wilson, clustered by image."""
        if self.cell.images == 1:
            return Interval(float(self.cell.score[place].mean()))
        estimate = accuracy(self.cell.score[place], self.cell.image)
        return Interval(estimate.mean, estimate.low, estimate.high)

    def mean_kappa(self, place: int) -> Interval:
        """Mean over all questions; NaN if some have none."""
        return self._mean_kappas[place]

    @cached_property
    def _mean_kappas(self) -> list[Interval]:
        totals = self.resampling.totals(self.sums(self.cell.distances["kappa"])).sum(axis=-1)
        means = self.resampling.intervals(totals / self._counts.sum(axis=-1, keepdims=True))
        return [Interval(*(float(part) for part in column)) for column in means.T]

    def lead(self, first: int, second: int) -> Interval:
        """Difference of two methods' relative scores in points, paired."""
        return self.resampling.interval(100 * (self.relative[:, first] - self.relative[:, second]))

    def ranking(self, num_tokens: int, *, rivals_only: bool = False) -> list[int]:
        """Rows of the contenders at a budget, the highest relative score first."""
        rows = [
            place
            for place, entry in enumerate(self.cell.entries)
            if entry.is_contender and entry.num_tokens == num_tokens and not (rivals_only and entry.is_ours)
        ]
        return sorted(rows, key=lambda place: (-self.relative[0, place], self.cell.entries[place].label))

    def leads(self) -> list[Lead]:
        """Of DCP-Prune over each other contender at each budget, the best rival first.

        Raises:
            GapError: DCP-Prune, or anybody else, did not take part.
        """
        found = [
            Lead(self.cell.entries[ours], self.cell.entries[rival], self.lead(ours, rival))
            for budget in self.cell.budgets
            for ours in (self.cell.place(OURS, budget),)
            if ours is not None
            for rival in self.ranking(budget)
            if rival != ours
        ]
        if not found:
            raise GapError(f"`{OURS}` and another pruner were not measured at one budget")
        return found

    def best_lead(self, num_tokens: int) -> Lead:
        """Of DCP-Prune over the best rival, its own presets not counted.

        Raises:
            GapError: one of them was not measured.
        """
        ours, rivals = self.cell.place(OURS, num_tokens), self.ranking(num_tokens, rivals_only=True)
        if ours is None or not rivals:
            raise GapError(f"`{OURS}` and a rival at {num_tokens} tokens were not measured")
        return Lead(self.cell.entries[ours], self.cell.entries[rivals[0]], self.lead(ours, rivals[0]))

    def variants(self, pruner: str = OURS) -> list[Lead]:
        """Paired differences of every variant, preset and text condition of a pruner to the pruner as it comes.

        Raises:
            GapError: there is no variant, or nothing to compare it with.
        """
        found = [
            Lead(entry, self.cell.entries[base], self.lead(place, base))
            for place, entry in enumerate(self.cell.entries)
            for base in (self.cell.place(pruner, entry.num_tokens),)
            if base not in (None, place)
            and not entry.is_adaptive
            and (entry.pruner == pruner or entry.pruner.startswith(f"{pruner}_"))
        ]
        if not found:
            raise GapError(f"no variant of `{pruner}` was measured beside `{pruner}`")
        return found

    @cached_property
    def mean_kept(self) -> Float[np.ndarray, "r m"]:
        """Visual tokens that the language model read, mean over the questions of each draw."""
        totals = self.resampling.totals(self.sums(self.cell.kept)).sum(axis=-1)
        return totals / self._counts.sum(axis=-1, keepdims=True)

    def at_same_mean(self, place: int, mean: float | None = None) -> Float[np.ndarray, " r"]:
        """Relative score of the same pruner with fixed budgets and the mean number of tokens of an adaptive method.

        Some questions get the whole number below that mean, the others the one above it. Draws have means of their own,
        and where these lie beyond the measured budgets the line through the outermost two goes on.

        Args:
            place: row of the adaptive method.
            mean: another mean than its own, the same in every draw.

        Raises:
            GapError: one of the two whole numbers was not measured.
        """
        entry, wanted = self.cell.entries[place], self.mean_kept[:, place]
        if mean is not None:
            wanted = np.full_like(wanted, mean)
        places = {e.num_tokens: at for at, e in enumerate(self.cell.entries) if e.label == entry.pruner}
        budgets = np.array(sorted(places))
        around = {math.floor(wanted[0]), math.ceil(wanted[0])}
        if missing := sorted(around - set(budgets.tolist())):
            raise GapError(
                f"`{entry.pruner}` was not measured at {' and '.join(map(str, missing))} tokens, beside "
                f"`{entry.label}` with {wanted[0]:.1f} in the mean"
            )
        fixed = self.relative[:, [places[budget] for budget in budgets]]
        if len(budgets) == 1:
            return fixed[:, 0]
        above = np.searchsorted(budgets, wanted).clip(1, len(budgets) - 1)
        share = (wanted - budgets[above - 1]) / (budgets[above] - budgets[above - 1])
        draws = np.arange(len(wanted))
        return (1 - share) * fixed[draws, above - 1] + share * fixed[draws, above]

    def with_text(self, pruner: str, text: str, num_tokens: int) -> int | None:
        """Row of a pruner as it comes but for what it reads of the question."""
        return next(
            (
                place
                for place, entry in enumerate(self.cell.entries)
                if (entry.pruner, entry.text, entry.num_tokens) == (pruner, text, num_tokens) and not entry.has_options
            ),
            None,
        )

    @cached_property
    def noises(self) -> tuple[float, ...]:
        """Shares of noise in the question that were measured with some pruner as it comes, ascending."""
        found = {entry.text for entry in self.cell.entries if entry.text.startswith("noise=") and not entry.has_options}
        return tuple(sorted(float(text.partition("=")[2]) for text in found))

    @cached_property
    def _full(self) -> Float[np.ndarray, "r t"]:
        if self.cell.full is None:
            raise GapError("the unpruned model was not measured; sweep `--pruner none` into the same folder")
        return self.by_task[:, self.cell.full, :]

    @cached_property
    def _floor(self) -> Float[np.ndarray, "r t"]:
        if self.cell.floor is None:
            raise GapError("the floor was not measured; sweep `--num-tokens 0` into the same folder")
        return self.by_task[:, self.cell.floor, :]


def _mean_over_tasks(values: Float[np.ndarray, "r m t"]) -> Float[np.ndarray, "r m"]:
    """Tasks without a value are left out; NaN if none has one."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=-1) / np.where(known.any(axis=-1), known.sum(axis=-1), np.nan)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)
