"""Which distance between kept and full tokens tells that answers are lost?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from dcp_prune.eval.statistics.bootstrap import Interval, Resampling
from dcp_prune.eval.statistics.ranking import area_under_curve
from dcp_prune.report.results import PLAIN
from dcp_prune.report.scores import GapError, Scores

DRAWS = 1_000
"""Resamples behind an interval of a correlation; there are hundreds of them, so fewer than for scores."""
RIGHT = 0.5
"""An answer with at least this score is a right one."""


@dataclass(frozen=True)
class Correlation:
    """Of a distance with accuracy over points, of which a pruner at a budget is one (or one for each task).

    Attributes:
        spearman, pearson: over all contenders.
        spearman_content, pearson_content: without `random` and `uniform`, whose choice does not depend on content.
        points, points_content: how many there are.
    """

    spearman: Interval
    pearson: Interval
    spearman_content: Interval
    pearson_content: Interval
    points: int
    points_content: int


@dataclass(frozen=True)
class Predictor:
    """How well one distance tells the loss.

    Attributes:
        name: of the column, `kappa`, `eval.NAME` or `run.NAME`.
        overall: over pruners and budgets.
        by_task: over pruners, budgets and tasks.
        breaks: chance that of two questions that the unpruned model answers right, the one that breaks has the larger
            distance, over all answers.
        breaks_within: the same, among answers of one pruner at one budget only.
    """

    name: str
    overall: Correlation
    by_task: Correlation
    breaks: Interval
    breaks_within: Interval

    @property
    def at_run_time(self) -> bool:
        """Whether a pruner can know it: it compares with the tokens at hand, and needs no second encoder pass."""
        return self.name.startswith("run.")


class Prediction:
    """Every distance of a cell against accuracy, over its contenders."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self.rows = [place for place, entry in enumerate(scores.cell.entries) if entry.is_contender]

    @cached_property
    def predictors(self) -> list[Predictor]:
        """The one with the strongest rank correlation over pruners and budgets first.

        Raises:
            GapError: fewer than three points, or no distance that all their questions have.
        """
        found = [self._predictor(name) for name in self.scores.cell.distances]
        known = [predictor for predictor in found if predictor is not None]
        if not known:
            raise GapError("a correlation needs three points, a pruner at a budget each, with a finite distance")
        return sorted(known, key=lambda p: (-_strength(p.overall.spearman), p.name))

    def best(self, *, at_run_time: bool) -> Predictor | None:
        """The strongest one, of those that a pruner can know if that is asked for."""
        return next((p for p in self.predictors if p.at_run_time or not at_run_time), None)

    def named(self, name: str) -> Predictor | None:
        """One of them."""
        return next((p for p in self.predictors if p.name == name), None)

    def points(self, name: str) -> tuple[list[int], Float[np.ndarray, " p"], Float[np.ndarray, " p"]]:
        """Rows, mean distance and accuracy of the points that a distance is judged by."""
        rows = self._complete(name)
        return rows, self.scores.cell.distances[name][rows].mean(axis=1), self.scores.cell.score[rows].mean(axis=1)

    @cached_property
    def staged(self) -> frozenset[int]:
        """Rows of pruners that drop tokens inside the encoder: they never hold the full set that they choose from, so a
        distance at run time compares what they kept with what they kept."""
        distances = self.scores.cell.distances
        pairs = [(distances[name], distances.get(f"eval.{name[4:]}")) for name in distances if name.startswith("run.")]
        return frozenset(
            row
            for row in self.rows
            if any(
                full is not None and not np.array_equal(seen[row], full[row], equal_nan=True) for seen, full in pairs
            )
        )

    def _complete(self, name: str) -> list[int]:
        values = self.scores.cell.distances[name]
        left_out = self.staged if name.startswith("run.") else frozenset()
        return [row for row in self.rows if row not in left_out and not np.isnan(values[row]).any()]

    def _predictor(self, name: str) -> Predictor | None:
        rows = self._complete(name)
        if len(rows) < 3:
            return None
        distance = self._draws.totals(self.scores.sums(self.scores.cell.distances[name][rows]))  # r p t
        with np.errstate(invalid="ignore"):
            overall = distance.sum(axis=-1) / self._counts.sum(axis=-1)[:, None]
            by_task = (distance / self._counts[:, None, :]).reshape(len(distance), -1)
        return Predictor(
            name,
            self._correlation(overall, rows, by_task=False),
            self._correlation(by_task, rows, by_task=True),
            *self._breaks(name, rows),
        )

    def _correlation(self, distance: Float[np.ndarray, "r p"], rows: Sequence[int], *, by_task: bool) -> Correlation:
        content = self._content(tuple(rows), by_task)
        order = np.argsort(distance, axis=1)
        found: list[Interval] = []
        for chosen in (np.ones_like(content), content):
            accuracy, ranks = self._accuracy(tuple(rows), by_task, bool(chosen.all()))
            if chosen.sum() < 3:
                found += [Interval(float("nan"))] * 2
                continue
            x = distance[:, chosen]
            found.append(self._draws.interval(_pearson(_ranks(distance, order, chosen), ranks)))
            found.append(self._draws.interval(_pearson(x, accuracy)))
        return Correlation(found[0], found[1], found[2], found[3], len(content), int(content.sum()))

    def _breaks(self, name: str, rows: Sequence[int]) -> tuple[Interval, Interval]:
        cell = self.scores.cell
        if cell.full is None:
            return Interval(float("nan")), Interval(float("nan"))
        asked = np.flatnonzero(cell.score[cell.full] >= RIGHT)
        if not len(asked):
            return Interval(float("nan")), Interval(float("nan"))
        values = cell.distances[name][rows][:, asked]
        broken = cell.score[rows][:, asked] < RIGHT
        image = np.broadcast_to(cell.image[asked], values.shape)
        everything = np.ones(values.shape, dtype=bool)
        flat = [part.reshape(1, -1) for part in (values, broken, everything, image)]
        return area_under_curve(*flat), area_under_curve(values, broken, everything, image)

    @cached_property
    def _draws(self) -> Resampling:
        return Resampling(self.scores.resampling.counts[: DRAWS + 1])

    @cached_property
    def _counts(self) -> Float[np.ndarray, "r t"]:
        return self._draws.totals(self.scores.sums(np.ones((1, len(self.scores.cell.image)))))[:, 0, :]

    def _content(self, rows: tuple[int, ...], by_task: bool) -> Bool[np.ndarray, " p"]:
        content = np.array([self.scores.cell.entries[row].pruner not in PLAIN for row in rows])
        return np.repeat(content, len(self.scores.cell.tasks)) if by_task else content

    def _accuracy(
        self, rows: tuple[int, ...], by_task: bool, everybody: bool
    ) -> tuple[Float[np.ndarray, "r p"], Float[np.ndarray, "r p"]]:
        """Of each draw and point, and the ranks; the same for every distance, so kept."""
        key = (rows, by_task, everybody)
        if key not in self._kept:
            score = self.scores.by_task[: DRAWS + 1, rows]
            if by_task:
                score = score.reshape(len(score), -1)
            else:
                right = np.where(self._counts[:, None, :] > 0, score, 0.0) * self._counts[:, None, :]
                score = right.sum(axis=-1) / self._counts.sum(axis=-1)[:, None]
            if not everybody:
                score = score[:, self._content(rows, by_task)]
            # What is equal must not be told apart by rounding.
            score = score.round(12)
            self._kept[key] = (score, rankdata(score, axis=1, nan_policy="propagate"))
        return self._kept[key]

    @cached_property
    def _kept(self) -> dict[tuple, tuple[np.ndarray, np.ndarray]]:
        return {}


def _strength(interval: Interval) -> float:
    return -1.0 if np.isnan(interval.value) else abs(interval.value)


def _ranks(
    values: Float[np.ndarray, "r p"], order: Int[np.ndarray, "r p"], chosen: Bool[np.ndarray, " p"]
) -> Float[np.ndarray, "r c"]:
    """Ranks among the chosen columns, from the order of all, so that one sorting serves all choices; ties share their
    mean rank; rows with NaN stay NaN."""
    picked = (np.cumsum(chosen) - 1)[order[chosen[order]]].reshape(len(values), -1)
    values = values[:, chosen]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, picked, np.broadcast_to(np.arange(1.0, values.shape[1] + 1), values.shape), axis=1)
    ordered = np.take_along_axis(values, picked, axis=1)
    odd = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1) | np.isnan(ordered[:, -1])
    if odd.any():
        ranks[odd] = rankdata(values[odd], axis=1, nan_policy="propagate")
    return ranks


def _pearson(x: Float[np.ndarray, "r p"], y: Float[np.ndarray, "r p"]) -> Float[np.ndarray, " r"]:
    """NaN where one of them does not vary."""
    constant = (np.ptp(x, axis=1) == 0) | (np.ptp(y, axis=1) == 0)
    x = x - x.mean(axis=1, keepdims=True)
    y = y - y.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (x * y).sum(axis=1) / np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return np.where(constant, np.nan, found)
