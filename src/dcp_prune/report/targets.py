"""What this project set out to show on the testbed, and what the records say about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dcp_prune.eval.statistics.bootstrap import Interval
from dcp_prune.report.predictors import Prediction
from dcp_prune.report.results import OURS, Cell
from dcp_prune.report.scores import GapError, Scores

RIVAL = "mmtok"
"""The other method that reads the question."""
SMALLEST = 16
MARGIN = 2.7
"""Points of relative score by which the paper's DCP-Prune leads SCOPE at 16 tokens."""
KEPT = {"standard": 95.0, "crowded": 92.1}
"""Relative score at 16 tokens; 92.1 is the paper's."""
NEAR = 1.0
"""Points that count as nearly as good."""
STRENGTH = 0.9
RUN_TIME_AIM = "a distance known at run time orders all pruners and budgets by accuracy: |Spearman|"
QUESTIONS = 4_000


@dataclass(frozen=True)
class Target:
    """One aim.

    Attributes:
        cell: where.
        aim: in words.
        threshold: that the measured value is to exceed.
        measured: None where the records do not say.
        digits: that the value is shown with.
        detail: what was compared, or why nothing was measured.
    """

    cell: str
    aim: str
    threshold: float
    measured: Interval | None
    detail: str
    digits: int = 1

    @property
    def verdict(self) -> str:
        """`met` or `missed` if the whole interval lies on that side, else `tie` with the side of the value."""
        if self.measured is None or math.isnan(self.measured.value):
            return "not measured"
        if self.measured.value == self.threshold:
            return "tie"
        above = self.measured.value > self.threshold
        match self.measured.verdict(self.threshold):
            case "ahead":
                return "met"
            case "behind":
                return "missed"
            case "tie":
                return f"tie, value {'reaches it' if above else 'falls short'}"
            case "unknown":
                return f"{'met' if above else 'missed'}, interval unknown"


def targets(scores: Scores, prediction: Prediction) -> list[Target]:
    """All that concern this cell; none if it is no testbed cell."""
    difficulty = scores.cell.source.get("difficulty")
    if difficulty not in KEPT:
        return []
    return [
        Target(scores.cell.name, aim, threshold, *_measure(measure), digits)
        for aim, threshold, measure, digits in _aims(scores, prediction, str(difficulty))
    ]


def run_time_target(scores: Scores, prediction: Prediction) -> Target | None:
    """The aim about distances alone, for records that were swept for them."""
    return next((target for target in targets(scores, prediction) if target.aim == RUN_TIME_AIM), None)


def _aims(
    scores: Scores, prediction: Prediction, difficulty: str
) -> Iterator[tuple[str, float, Callable[[], tuple[Interval, str]], int]]:
    yield f"at least {QUESTIONS:,} held-out questions", QUESTIONS - 0.5, lambda: _questions(scores.cell), 0
    if difficulty == "crowded":
        for budget in (64, 32, SMALLEST):
            yield f"`{OURS}` first at {budget} tokens: lead over the best rival", 0.0, _lead(scores, budget), 1
        yield (
            f"... and at {SMALLEST} by at least {MARGIN} points, the paper's margin",
            MARGIN,
            _lead(scores, SMALLEST),
            1,
        )
    yield f"relative score of `{OURS}` at {SMALLEST} tokens", KEPT[difficulty], lambda: _relative(scores), 1
    for budget in scores.cell.budgets:
        if scores.with_text(OURS, "wrong", budget) is None and not any(_noisy(scores, budget)):
            continue
        better = f"within one point of the better of text-free `{OURS}` and `{RIVAL}` at {budget} tokens"
        yield f"any noise in the question: {better}", -NEAR, lambda budget=budget: _worst_noise(scores, budget), 1
        yield f"another image's question: {better}", -NEAR, lambda budget=budget: _text(scores, "wrong", budget), 1
    yield (
        f"stages inside the encoder (`{OURS}_progressive`) cost at most one point at {SMALLEST} tokens",
        -NEAR,
        lambda: _stages(scores),
        1,
    )
    if any(name.startswith("run.") for name in scores.cell.distances):
        yield RUN_TIME_AIM, STRENGTH, lambda: _spearman(prediction), 2


def _measure(measure: Callable[[], tuple[Interval, str]]) -> tuple[Interval | None, str]:
    try:
        return measure()
    except GapError as gap:
        return None, str(gap)


def _questions(cell: Cell) -> tuple[Interval, str]:
    split = str(cell.source.get("split", "unknown"))
    number = float(len(cell.image) if split == "held-out" else 0)
    return Interval(number, number, number), f"{cell.images:,} {split} images"


def _lead(scores: Scores, budget: int) -> Callable[[], tuple[Interval, str]]:
    def measure() -> tuple[Interval, str]:
        lead = scores.best_lead(budget)
        return lead.points, f"over `{lead.over.label}`"

    return measure


def _relative(scores: Scores) -> tuple[Interval, str]:
    place = scores.cell.place(OURS, SMALLEST)
    if place is None:
        raise GapError(f"`{OURS}` at {SMALLEST} tokens was not measured")
    return scores.resampling.interval(100 * scores.relative[:, place]), "per cent of the unpruned score"


def text_free(scores: Scores, budget: int) -> int | None:
    """Row of DCP-Prune without the question."""
    return next(
        (
            place
            for label in (f"{OURS}@none", f"{OURS}(text_weight=0)", f"{OURS}(text_weight=0.0)")
            for place in (scores.cell.place(label, budget),)
            if place is not None
        ),
        None,
    )


def text_margin(scores: Scores, text: str, budget: int) -> tuple[Interval, str]:
    """How far DCP-Prune under a text condition is from the better of its text-free version and of MMTok under the same
    condition, in points of relative score; and which that is.

    Raises:
        GapError: one of the three was not measured.
    """
    ours, without = scores.with_text(OURS, text, budget), text_free(scores, budget)
    rival = scores.with_text(RIVAL, text, budget)
    if ours is None or without is None or rival is None:
        raise GapError(f"needs `{OURS}@{text}`, `{OURS}@none` and `{RIVAL}@{text}` at {budget} tokens")
    better = max((without, rival), key=lambda place: scores.relative[0, place])
    return scores.lead(ours, better), f"against `{scores.cell.entries[better].label}`"


def _text(scores: Scores, text: str, budget: int) -> tuple[Interval, str]:
    return text_margin(scores, text, budget)


def _noisy(scores: Scores, budget: int) -> list[str]:
    texts = [f"noise={share:g}" for share in scores.noises]
    return [text for text in texts if scores.with_text(OURS, text, budget) is not None]


def _worst_noise(scores: Scores, budget: int) -> tuple[Interval, str]:
    found = [(text, *text_margin(scores, text, budget)) for text in _noisy(scores, budget)]
    if not found:
        raise GapError(f"`{OURS}@noise=SHARE` was not measured at {budget} tokens")
    text, margin, against = min(found, key=lambda item: item[1].value)
    return margin, f"worst of {len(found)} shares, `{text}`, {against}"


def _stages(scores: Scores) -> tuple[Interval, str]:
    staged, base = scores.cell.place(f"{OURS}_progressive", SMALLEST), scores.cell.place(OURS, SMALLEST)
    if staged is None or base is None:
        raise GapError(f"needs `{OURS}_progressive` and `{OURS}` at {SMALLEST} tokens")
    return scores.lead(staged, base), f"`{OURS}_progressive` over `{OURS}`"


def _spearman(prediction: Prediction) -> tuple[Interval, str]:
    best = prediction.best(at_run_time=True)
    if best is None:
        raise GapError("no distance at run time is finite for three points")
    found = best.overall.spearman
    strength = found if found.value >= 0 else Interval(-found.value, -found.high, -found.low)
    among = sum(predictor.at_run_time for predictor in prediction.predictors)
    staged = {prediction.scores.cell.entries[row].pruner for row in prediction.staged}
    without = f"; without {', '.join(f'`{name}`' for name in sorted(staged))}, dropping tokens inside the encoder"
    return strength, f"`{best.name}`, the best of {among}, chosen on these questions{without if staged else ''}"
