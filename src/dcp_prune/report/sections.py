"""The parts of a report, each a function from cells to markdown, tables and figures."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Float

from dcp_prune.eval.statistics.bootstrap import RESAMPLES, Interval, Verdict
from dcp_prune.report.layout import TIE, Field, Mark, Number, Table
from dcp_prune.report.predictors import Correlation, Prediction, Predictor
from dcp_prune.report.results import OURS, PLAIN, QUESTION, Cell, Entry, digest, pool
from dcp_prune.report.scores import GapError, Scores
from dcp_prune.report.targets import RIVAL, SMALLEST, run_time_target, targets, text_free, text_margin

if TYPE_CHECKING:
    from dcp_prune.viz.plots import Curve

Value = TypeVar("Value")

SHOWN = 8
"""Distances in the page's tables; the files hold all."""
DRAWN = 3
"""Budgets with a panel of their own in a figure, the smallest ones; the tables have all."""
RIVALS = 5
"""Rivals on the radar, the best ones at the smallest budget."""


@dataclass(frozen=True, eq=False)
class Analysis:
    """A cell with what is computed from it, once for all sections."""

    cell: Cell
    resamples: int = RESAMPLES

    @cached_property
    def scores(self) -> Scores:
        return Scores(self.cell, resamples=self.resamples)

    @cached_property
    def prediction(self) -> Prediction:
        return Prediction(self.scores)

    @property
    def heading(self) -> str:
        name, _, rest = self.cell.name.partition(", ")
        return f"### `{name}`, {rest}"


@dataclass
class Output:
    """Collects what goes beside the page.

    Attributes:
        folder: where the page lies, for links to the records.
        figures: folder of the figures, relative to the page.
        with_tables: whether tables go into files of their own as well.
        formats: of the figures; the page shows the first.
        files: contents by path relative to the page.
    """

    folder: Path
    figures: str = "figures"
    with_tables: bool = True
    formats: tuple[str, ...] = ("png", "svg")
    files: dict[str, bytes] = field(default_factory=dict)

    def table(self, name: str, table: Table) -> str:
        """The table in markdown, which the page shows."""
        if self.with_tables:
            self.files[f"tables/{name}.md"] = f"{table.markdown()}\n".encode()
            self.files[f"tables/{name}.tex"] = table.latex().encode()
        return table.markdown()

    def figure(self, name: str, alt: str, draw: Callable[[], object]) -> str:
        """A link to the figure."""
        from dcp_prune.viz.plots import to_bytes

        figure = draw()
        for kind in self.formats:
            self.files[f"{self.figures}/{name}.{kind}"] = to_bytes(figure, kind)  # type: ignore[arg-type]
        return f"![{alt}]({self.figures}/{name}.{self.formats[0]})"

    def link(self, folder: Path, *, with_parent: bool = False) -> str:
        """To a records folder, relative to the page, with the digest of what it holds."""
        path = Path(os.path.relpath(folder, self.folder)).as_posix()
        text = f"{folder.parent.name}/{folder.name}" if with_parent else folder.name
        return f"[`{text}`]({path}) ({digest(folder)})"


def measured(analyses: Sequence[Analysis], out: Output) -> str:
    """What was asked of whom."""
    table = Table(["model and questions", "questions", "images", "split", "methods", "records"], left=frozenset({3, 5}))
    rows: list[Sequence[Field]] = []
    folders = [folder for analysis in analyses for folder in analysis.cell.folders]
    alike = len({folder.name for folder in folders}) < len(folders)  # the folder above tells them apart

    for cell in (analysis.cell for analysis in analyses):
        seeds = f" {cell.source['first_seed']} to {cell.source['last_seed']}" if "first_seed" in cell.source else ""
        links = ", ".join(out.link(folder, with_parent=alike) for folder in cell.folders)
        split = f"{cell.source.get('split', '')}{seeds}".strip()
        rows.append([cell.name, f"{len(cell.image):,}", f"{cell.images:,}", split, str(len(cell.entries)), links])
    table.add("", rows)
    where = dict.fromkeys(_environment(environment) for a in analyses for environment in a.cell.environments)
    notes = [f"{analysis.cell.name}: {note}" for analysis in analyses for note in analysis.cell.notes]
    return _paragraphs(table.markdown(), *notes, f"<sub>Measured with {'; '.join(where)}.</sub>")


def aims(analyses: Sequence[Analysis], out: Output) -> str:
    """What we set out to show, and whether it holds."""
    found = [target for a in analyses for target in _or_nothing(lambda a=a: targets(a.scores, a.prediction), [])]
    if not found:
        return "*These records are not from the testbed, for which the aims are set.*"
    table = Table(["aim", "wanted", "measured", "verdict", "how"], left=frozenset({3, 4}))
    for name in dict.fromkeys(target.cell for target in found):
        rows: list[Sequence[Field]] = []
        for target in (target for target in found if target.cell == name):
            value: Field = "" if target.measured is None else _plain(target.measured, target.digits)
            least = math.ceil(target.threshold) if target.digits == 0 else target.threshold
            wanted = f"≥ {least:,.{target.digits}f}" if target.threshold else "> 0"
            rows.append([target.aim, wanted, value, target.verdict, target.detail])
        table.add(name, rows)
    return _paragraphs(
        out.table("aims", table),
        "<sub>Points are of relative score. An aim is met or missed where the whole 95 % interval lies on that side of "
        "what is wanted, and a tie where it reaches both.</sub>",
    )


def quality(analyses: Sequence[Analysis], out: Output) -> str:
    """Relative scores at every budget."""
    return _each(analyses, lambda analysis: _quality(analysis, out))


def summary(analyses: Sequence[Analysis], out: Output) -> str:
    """Mean relative scores alone, budgets side by side."""
    return _each(analyses, lambda analysis: _summary(analysis, out))


def absolute(analyses: Sequence[Analysis], out: Output) -> str:
    """Accuracy over all questions, budgets side by side."""
    return _each(analyses, lambda analysis: _absolute(analysis, out))


def leads(analyses: Sequence[Analysis], out: Output) -> str:
    """Paired leads of DCP-Prune over each rival."""
    return _each(analyses, lambda analysis: _leads(analysis, out))


def standing(analyses: Sequence[Analysis], out: Output) -> str:
    """Whom DCP-Prune beats at the paper's smallest budget and whom not, all pictures in one table."""
    header = [
        "model and questions",
        f"`{OURS}` is ahead of",
        "ties with",
        "is behind",
        "stages inside the encoder cost",
    ]
    table = Table(header, left=frozenset({1, 2, 3}))
    rows: list[Sequence[Field]] = []
    for cell, scores in ((analysis.cell, analysis.scores) for analysis in analyses):
        budget = SMALLEST if SMALLEST in cell.budgets else min(cell.budgets, default=0)
        base = cell.place(OURS, budget)
        if base is None or _gap(lambda scores=scores: scores.relative):
            continue
        found = {lead.over: lead.points.verdict() for lead in scores.leads() if lead.entry.num_tokens == budget}
        names = [
            ", ".join(f"`{entry.label}`" for entry, verdict in found.items() if verdict == wanted) or "none"
            for wanted in ("ahead", "tie", "behind")
        ]
        staged = cell.place(f"{OURS}_progressive", budget)
        cost = "" if staged is None else Number(scores.lead(base, staged), signed=True)
        rows.append([f"{cell.name}, {budget} tokens", *names, cost])
    if not rows:
        return f"*Not here: `{OURS}` was not measured beside all tokens.*"
    table.add("", rows)
    return _paragraphs(
        out.table("standing", table),
        "<sub>By relative score, paired: ahead or behind where the whole 95 % interval of the difference lies on that "
        f"side of zero. The last column is what `{OURS}_progressive` loses against `{OURS}`, in points.</sub>",
    )


def ablation(analyses: Sequence[Analysis], out: Output) -> str:
    """What each part of DCP-Prune is worth."""
    return _each(analyses, lambda analysis: _ablation(analysis, out))


def adaptive(analyses: Sequence[Analysis], out: Output) -> str:
    """Budgets that a bound picks for each question, against fixed ones of the same mean; where a checkpoint of the
    testbed was asked about several kinds of pictures, about all of them together as well."""
    found = [analysis for analysis in analyses if any(entry.is_adaptive for entry in analysis.cell.entries)]
    if not found:
        return "*Every method had a fixed budget.*"
    by_checkpoint: dict[str, list[Analysis]] = {}
    for analysis in found:
        if analysis.cell.source.get("kind") == "testbed":
            by_checkpoint.setdefault(analysis.cell.source["checkpoint"], []).append(analysis)
    parts: dict[Analysis, list[Analysis]] = {analysis: [] for analysis in found}
    for several in by_checkpoint.values():
        kinds = [analysis.cell.source["difficulty"] for analysis in several]
        if len(set(kinds)) == len(kinds) > 1:
            name = f"{several[0].cell.name.partition(', ')[0]}, {' and '.join(kinds)}"
            parts[Analysis(pool([analysis.cell for analysis in several], name), several[0].resamples)] = several
    shown = sorted(parts, key=lambda analysis: analysis.cell.name)
    return _each(shown, lambda analysis: _adaptive(analysis, parts[analysis], out))


def text(analyses: Sequence[Analysis], out: Output) -> str:
    """DCP-Prune and MMTok with a damaged question."""
    return _each(analyses, lambda analysis: _text(analysis, out))


def prediction(analyses: Sequence[Analysis], out: Output) -> str:
    """What predicts the loss."""
    return _each(analyses, lambda analysis: _prediction(analysis, out))


def token_figures(analyses: Sequence[Analysis], out: Output) -> str:
    """Accuracy and kappa against kept tokens."""
    return _each(analyses, lambda analysis: _token_figure(analysis, out))


def radars(analyses: Sequence[Analysis], out: Output) -> str:
    """Relative score per task."""
    return _each(analyses, lambda analysis: _radar(analysis, out))


def _token_figure(analysis: Analysis, out: Output) -> str:
    from dcp_prune.viz.plots import Panel, token_curves

    cell, scores = analysis.cell, analysis.scores
    if not cell.contenders:
        raise GapError("no pruner was measured as it comes")

    def curves(value: Callable[[int], Interval]) -> list[Curve]:
        found = []
        for name in cell.contenders:
            places = {budget: cell.place(name, budget) for budget in cell.budgets}
            found.append(_curve(name, {b: value(place) for b, place in places.items() if place is not None}))
        return [curve for curve in found if curve.x]

    bounds = (("all tokens", cell.full), ("no image", cell.floor))
    levels = {name: 100 * scores.accuracy(place).value for name, place in bounds if place is not None}
    panels = [Panel("accuracy", "accuracy, %", curves(lambda place: scores.accuracy(place).scaled(100)), levels)]
    if kappas := curves(scores.mean_kappa):
        panels.append(Panel("distribution shift", "kappa, nats", kappas, {}))
    return out.figure(
        f"tokens-{cell.slug}",
        f"Accuracy and kappa against kept tokens, {cell.name}",
        lambda: token_curves(cell.name, panels, _looks(cell)),
    )


def _radar(analysis: Analysis, out: Output) -> str:
    from dcp_prune.viz.plots import radar

    cell, scores = analysis.cell, analysis.scores
    if len(cell.tasks) < 3:
        raise GapError("a radar needs three tasks")
    tasks = [place for place, task in enumerate(cell.tasks) if task not in scores.silent]
    if not cell.contenders:
        raise GapError("no pruner was measured as it comes")
    rivals = [cell.entries[place].pruner for place in scores.ranking(cell.budgets[-1], rivals_only=True)]
    shown = [*[OURS] * (OURS in cell.contenders), *rivals[:RIVALS]]
    panels = {
        f"{budget} tokens": {
            name: (100 * scores.relative_by_task[0, place, tasks]).tolist()
            for name in shown
            if (place := cell.place(name, budget)) is not None
        }
        for budget in cell.budgets[-DRAWN:]
    }
    return out.figure(
        f"radar-{cell.slug}",
        f"Relative score per task, {cell.name}",
        lambda: radar(f"{cell.name}: relative score per task, %", [cell.tasks[t] for t in tasks], panels, _looks(cell)),
    )


def _summary(analysis: Analysis, out: Output) -> str:
    cell, scores = analysis.cell, analysis.scores
    if not cell.contenders:
        raise GapError("no pruner was measured as it comes")
    header = ["relative score, %", *(f"{budget} tokens" for budget in cell.budgets), f"kappa at {cell.budgets[-1]}"]
    table = Table(header)
    ranked = [scores.ranking(budget) for budget in cell.budgets]
    numbers: dict[tuple[str, int], Number] = {}
    for budget, places in zip(cell.budgets, ranked, strict=True):
        draws = 100 * scores.relative[:, places]
        for place, mark, bounds in zip(
            places, _marks(scores, draws), scores.resampling.intervals(draws).T, strict=True
        ):
            numbers[cell.entries[place].pruner, budget] = Number(Interval(*bounds.tolist()), mark=mark)
    order = dict.fromkeys(cell.entries[place].pruner for places in reversed(ranked) for place in places)
    rows: list[Sequence[Field]] = []
    for name in order:
        place = cell.place(name, cell.budgets[-1])
        kappa = Interval(math.nan) if place is None else scores.mean_kappa(place)
        columns = [numbers.get((name, budget), "") for budget in cell.budgets]
        rows.append([f"`{name}`", *columns, Number(kappa, digits=2, bounds=False)])
    table.add("", rows)
    return _paragraphs(
        out.table(f"summary-{cell.slug}", table),
        "<sub>Share of the unpruned model's score, mean over the tasks, with 95 % intervals over images. Bold: first, "
        f"with a lead over the second that excludes zero. {TIE['markdown']}: first, or not surely behind it.</sub>",
    )


def _absolute(analysis: Analysis, out: Output) -> str:
    cell, scores = analysis.cell, analysis.scores
    if not cell.contenders:
        raise GapError("no pruner was measured as it comes")

    def accuracy(place: int | None) -> Interval:
        return Interval(math.nan) if place is None else scores.accuracy(place).scaled(100)

    found = {name: [accuracy(cell.place(name, budget)) for budget in cell.budgets] for name in cell.contenders}
    order = sorted(found, key=lambda name: [-np.nan_to_num(each.value) for each in reversed(found[name])])
    table = Table(["accuracy, %", *(f"{budget} tokens" for budget in cell.budgets)])
    table.add("", [[f"`{name}`", *map(Number, found[name])] for name in order])
    bounds = (("all tokens", cell.full), ("no image", cell.floor))
    known = [f"{name} {Number(accuracy(place)).markdown()}" for name, place in bounds if place is not None]
    return _paragraphs(
        out.table(f"accuracy-{cell.slug}", table),
        "<sub>Share of right answers over all questions with 95 % intervals that know that questions about one image "
        f"belong together.{' The model itself: ' + '; '.join(known) + '.' if known else ''}</sub>",
    )


def _quality(analysis: Analysis, out: Output) -> str:
    cell, scores = analysis.cell, analysis.scores
    if not cell.contenders:
        raise GapError("no pruner was measured as it comes")
    relative = scores.relative  # a gap here leaves nothing to tell
    above = _or_nothing(lambda: scores.above_floor, None)
    header = ["method", *(task.replace("_", " ") for task in cell.tasks), "relative score"]
    table = Table(header + (["above the floor"] if above is not None else []))

    def row(name: str, place: int, marks: Sequence[Mark | None] = ()) -> list[Field]:
        columns = [Number(Interval(100 * value), mark=mark) for value, mark in _pad(scores.by_task[0, place], marks)]
        means = [100 * relative[:, place]] + ([100 * above[:, place]] if above is not None else [])
        intervals = [scores.resampling.interval(draws) for draws in means]
        return [name, *columns, *(replace(_plain(i), mark=m) for i, m in _pad(intervals, marks[len(columns) :]))]

    bounds = [(cell.full, "all tokens"), (cell.floor, "no image")]
    table.add("", [row(name, place) for place, name in bounds if place is not None])
    for budget in cell.budgets:
        places = scores.ranking(budget)
        columns = [scores.by_task[:, places, task] for task in range(len(cell.tasks))]
        marks = [_marks(scores, draws, ties=False) for draws in columns]
        marks.append(_marks(scores, relative[:, places]))
        if above is not None:
            marks.append(_marks(scores, above[:, places]))
        rows = [
            row(f"`{cell.entries[place].label}`", place, [column[at] for column in marks])
            for at, place in enumerate(places)
        ]
        table.add(f"{budget} tokens", rows)
    notes = [
        "Accuracy per task and relative scores in per cent, with 95 % intervals over images. Bold: first, with a lead "
        f"over the second that excludes zero. {TIE['markdown']}: first, or not surely behind the first."
    ]
    if scores.silent:
        notes.append(f"Left out, since the unpruned model answers nothing right: {_list(scores.silent)}.")
    if above is None:
        notes.append(f"No score above the floor: {_gap(lambda: scores.above_floor)}.")
    elif scores.blind:
        notes.append(f"Left out above the floor, since the image does not surely help: {_list(scores.blind)}.")
    return _paragraphs(out.table(f"tasks-{cell.slug}", table), f"<sub>{' '.join(notes)}</sub>")


def _leads(analysis: Analysis, out: Output) -> str:
    cell = analysis.cell
    found = {(lead.over.label, lead.entry.num_tokens): lead.points for lead in analysis.scores.leads()}
    budgets = [budget for budget in cell.budgets if any(key[1] == budget for key in found)]
    header = [f"lead of `{OURS}` over"]
    for budget in budgets:
        header += [f"{budget} tokens", ""]
    order = dict.fromkeys(label for budget in reversed(budgets) for label, at in found if at == budget)
    table = Table(header, left=frozenset(range(2, len(header), 2)))
    table.add("", [[f"`{label}`", *_with_verdicts(found.get((label, b)) for b in budgets)] for label in order])
    return _paragraphs(
        out.table(f"leads-{cell.slug}", table),
        "<sub>Points of relative score, paired, with 95 % intervals over images, not adjusted for the number of "
        "rivals. Ahead or behind where the interval excludes zero.</sub>",
    )


def _ablation(analysis: Analysis, out: Output) -> str:
    cell, scores = analysis.cell, analysis.scores
    found = {(lead.entry, lead.entry.num_tokens): lead.points for lead in scores.variants()}
    budgets = sorted({budget for _, budget in found}, reverse=True)
    header = ["variant"]
    for budget in budgets:
        header += [f"{budget} tokens", ""]
    table = Table(header, left=frozenset(range(2, len(header), 2)))
    base: list[Field] = [f"`{OURS}`: relative score"]
    for budget in budgets:
        place = cell.place(OURS, budget)
        interval = Interval(math.nan) if place is None else scores.resampling.interval(100 * scores.relative[:, place])
        base += [Number(interval), ""]
    table.add("", [base])
    points = {(entry.label, budget): value for (entry, budget), value in found.items()}
    kinds: dict[str, list[Entry]] = {}
    for entry, _ in sorted(
        found, key=lambda item: (item[0].text.partition("=")[0], _share(item[0].text), item[0].label)
    ):
        kinds.setdefault("difference of a variant" if entry.text == QUESTION else "what it reads of the question", [])
        kinds["difference of a variant" if entry.text == QUESTION else "what it reads of the question"].append(entry)
    for title in sorted(kinds):
        labels = dict.fromkeys(entry.label for entry in kinds[title])
        table.add(title, [[f"`{label}`", *_with_verdicts(points.get((label, b)) for b in budgets)] for label in labels])
    return _paragraphs(
        out.table(f"ablation-{cell.slug}", table),
        f"<sub>Difference to `{OURS}` as it comes in points of relative score, paired, with 95 % intervals over "
        "images. The language model always reads the right question; `@` says what the pruner read.</sub>",
    )


def _adaptive(analysis: Analysis, parts: Sequence[Analysis], out: Output) -> str:
    cell, scores = analysis.cell, analysis.scores
    places = [place for place, entry in enumerate(cell.entries) if entry.is_adaptive]
    if not places:
        raise GapError("no adaptive method was measured on all of these questions")
    places.sort(key=lambda place: scores.mean_kept[0, place])
    header = ["method", "tokens, mean", "5 % to 95 %", "relative score", "fixed, same mean", "difference", ""]
    table = Table(header, left=frozenset({6}))
    rows: list[Sequence[Field]] = []
    for place in places:
        entry = cell.entries[place]
        rows.append([f"`{entry.label}`", *_beside_fixed(scores, place)])
        for part in parts:
            own = part.cell.place(entry.label, entry.num_tokens)
            assert own is not None
            of_all = float(scores.mean_kept[0, place])
            rows.append([f"of it {part.cell.source['difficulty']}", *_beside_fixed(part.scores, own, of_all)])
    table.add("", rows)
    of_parts = " In the rows `of it`, the fixed budgets have the mean over all of these pictures." if parts else ""
    return _paragraphs(
        out.table(f"adaptive-{cell.slug}", table),
        "<sub>Relative scores in per cent, differences in points and paired, with 95 % intervals over images. Fixed, "
        "same mean: the same pruner with the whole number of tokens below that mean for some questions and the one "
        "above it for the others, so many that the mean is the same, in every draw of images; empty where these two "
        f"were not measured.{of_parts}</sub>",
    )


def _beside_fixed(scores: Scores, place: int, mean: float | None = None) -> Sequence[Field]:
    """Tokens and relative score of an adaptive method, and what fixed budgets of its mean, or of this one, make."""
    low, high = np.quantile(scores.cell.kept[place], (0.05, 0.95))
    own, fixed = 100 * scores.relative[:, place], _or_nothing(lambda: 100 * scores.at_same_mean(place, mean), None)
    tokens, score = (Number(scores.resampling.interval(draws)) for draws in (scores.mean_kept[:, place], own))
    compared: list[Field] = ["", "", ""]
    if fixed is not None:
        difference = scores.resampling.interval(own - fixed)
        compared = [Number(scores.resampling.interval(fixed)), *_with_verdicts([difference])]
    return [tokens, f"{low:.0f} to {high:.0f}", score, *compared]


def _text(analysis: Analysis, out: Output) -> str:
    from dcp_prune.viz.plots import Apart, noise_curves

    cell, scores = analysis.cell, analysis.scores
    damaged = [entry for entry in cell.entries if entry.pruner in (OURS, RIVAL) and entry.text != QUESTION]
    if not damaged:
        raise GapError("nothing was measured with another text than the question")
    names = [name for name in (OURS, RIVAL) if any(entry.pruner == name for entry in damaged)]
    shares = [0.0, *(share for share in scores.noises if share > 0)]
    conditions = {share: f"noise={share:g}" if share else QUESTION for share in shares}

    def relative(name: str, condition: str, budget: int) -> Interval:
        free = (name, condition) == (OURS, "none")
        place = text_free(scores, budget) if free else scores.with_text(name, condition, budget)
        nothing = Interval(math.nan)
        return nothing if place is None else scores.resampling.interval(100 * scores.relative[:, place])

    header = ["the pruner reads", *(f"`{name}`" for name in names), f"`{OURS}` over the better", "", ""]
    table = Table(header, left=frozenset({len(header) - 2, len(header) - 1}))
    panels = {}
    for budget in sorted({entry.num_tokens for entry in damaged}, reverse=True):
        rows: list[Sequence[Field]] = []
        for condition in (*conditions.values(), "wrong", "none"):
            values = [relative(name, condition, budget) for name in names]
            if all(math.isnan(interval.value) for interval in values):
                continue
            compared: list[Field] = ["", "", ""]
            if condition != "none":
                found = _or_nothing(lambda c=condition, b=budget: text_margin(scores, c, b), None)
                compared = compared if found is None else [*_with_verdicts([found[0]]), found[1]]
            rows.append([_CONDITIONS.get(condition, condition.replace("=", " ")), *map(Number, values), *compared])
        table.add(f"{budget} tokens", rows)
        curves = [_curve(name, {s: relative(name, conditions[s], budget) for s in shares}) for name in names]
        apart = []
        for tick, condition in (("wrong\nquestion", "wrong"), ("no\ntext", "none")):
            points = {name: relative(name, condition, budget) for name in names}
            known = {name: (i.value, i.low, i.high) for name, i in points.items() if not math.isnan(i.value)}
            apart += [Apart(tick, known)] * bool(known)
        panels[f"{budget} tokens"] = ([curve for curve in curves if curve.x], apart)
    figure = out.figure(
        f"noise-{cell.slug}",
        f"Relative score against the share of noise in the question, {cell.name}",
        lambda: noise_curves(cell.name, dict([*panels.items()][-DRAWN:]), _looks(cell, names)),
    )
    return _paragraphs(
        figure,
        out.table(f"text-{cell.slug}", table),
        "<sub>Relative scores in per cent with 95 % intervals over images; the margin, in points and paired, is over "
        f"the better of text-free `{OURS}` and `{RIVAL}` under the same condition. The language model always "
        "reads the right question.</sub>",
    )


def _prediction(analysis: Analysis, out: Output) -> str:
    cell, found = analysis.cell, analysis.prediction.predictors
    shown = found[:SHOWN] + [predictor for predictor in found[SHOWN:] if predictor.name == "kappa"]
    all_of = _predictor_table(found)
    out.table(f"prediction-{cell.slug}", all_of)
    table = all_of if len(shown) == len(found) else _predictor_table(shown)
    best = analysis.prediction.best(at_run_time=True) or found[0]
    if best.name == "kappa":
        best = next((predictor for predictor in found if predictor.name != "kappa"), best)
    figure = _prediction_figure(analysis, [best.name] + ["kappa"] * (best.name != "kappa"), out)
    most = max((p.overall for p in found), key=lambda correlation: correlation.points)
    points, content = most.points, most.points_content
    rest = f" The best {SHOWN} of {len(found)} and kappa are shown." if len(shown) < len(found) else ""
    staged = {cell.entries[row].pruner: None for row in analysis.prediction.staged}
    aim = run_time_target(analysis.scores, analysis.prediction)
    verdict = ""
    if aim is not None and aim.measured is not None:
        value = Number(aim.measured, digits=aim.digits).markdown()
        verdict = (
            f"Aim: {aim.aim} of at least {aim.threshold:.1f}. Measured: {value}, {aim.detail}. Verdict: {aim.verdict}."
        )
    blind = (
        f"; without {_code(sorted(staged))}, which never holds the full set since it drops tokens inside the encoder"
    )
    return _paragraphs(
        figure,
        verdict,
        table.markdown(),
        f"<sub>Correlation of the mean distance with accuracy over {points} points, a pruner at a budget each, or over "
        f"each task of them; in brackets 95 % intervals over images. Without plain: {content} points, {_code(PLAIN)} "
        "left out, whose choice does not depend on content. AUC: chance that, of two questions that the unpruned model "
        "answers right, the one that breaks has the larger distance; within: among answers of one pruner at one "
        f"budget. `run.`: known to the pruner when it chooses{blind if staged else ''}; `eval.` and `kappa`: against "
        f"an unpruned encoder pass.{rest}</sub>",
    )


def _predictor_table(found: Sequence[Predictor]) -> Table:
    plain = "without plain"
    header = ["distance", "Spearman", plain, "Pearson", plain, "Spearman, tasks", plain, "Pearson, tasks", plain]
    table = Table([*header, "AUC", "AUC within"])

    def four(correlation: Correlation) -> Iterable[Interval]:
        yield from (correlation.spearman, correlation.spearman_content)
        yield from (correlation.pearson, correlation.pearson_content)

    rows: list[Sequence[Field]] = []
    for p in found:
        numbers = [*four(p.overall), *four(p.by_task), p.breaks, p.breaks_within]
        rows.append([f"`{p.name}`", *(Number(interval, digits=2) for interval in numbers)])
    table.add("", rows)
    return table


def _prediction_figure(analysis: Analysis, names: Sequence[str], out: Output) -> str:
    from dcp_prune.viz.plots import Cloud, clouds

    cell, panels = analysis.cell, []
    for name in names:
        predictor = analysis.prediction.named(name)
        if predictor is None:
            continue
        rows, distances, accuracies = analysis.prediction.points(name)
        points = [
            (cell.entries[row].pruner, cell.entries[row].num_tokens, float(x), 100 * float(y))
            for row, x, y in zip(rows, distances, accuracies, strict=True)
        ]
        rho = predictor.overall
        title = f"{name}: Spearman {rho.spearman.value:.2f}"
        if rho.points_content not in (rho.points, 0) and not math.isnan(rho.spearman_content.value):
            title += f"\n(without random, uniform {rho.spearman_content.value:.2f})"
        panels.append(Cloud(title, f"mean {name}", points))
    return out.figure(
        f"prediction-{cell.slug}",
        f"Distance against accuracy, {cell.name}",
        lambda: clouds(cell.name, panels, _looks(cell)),
    )


SECTIONS: dict[str, tuple[str, Callable[[Sequence[Analysis], Output], str]]] = {
    "measured": ("What was measured", measured),
    "aims": ("What we set out to show", aims),
    "summary": ("Relative scores", summary),
    "accuracy": ("Accuracy", absolute),
    "tokens": ("Accuracy and kappa against kept tokens", token_figures),
    "tasks": ("Scores per task", quality),
    "radar": ("Relative scores per task", radars),
    "standing": (f"Whom {OURS} beats", standing),
    "leads": (f"Leads of {OURS}", leads),
    "ablation": (f"What the parts of {OURS} are worth", ablation),
    "adaptive": ("Adaptive budgets", adaptive),
    "text": ("Noise in the question", text),
    "prediction": ("What predicts the loss", prediction),
}
"""By kind: title and maker. A document names a kind where it wants that part."""

_CONDITIONS = {QUESTION: "the question", "wrong": "another image's question", "none": "nothing"}


def _each(analyses: Sequence[Analysis], make: Callable[[Analysis], str]) -> str:
    """One part a cell; a gap is said where its part would be."""
    parts = []
    for analysis in analyses:
        try:
            body = make(analysis)
        except GapError as gap:
            body = f"*Not here: {gap}.*"
        parts += [analysis.heading, body] if len(analyses) > 1 or len(analysis.cell.name) else [body]
    return _paragraphs(*parts)


def _curve(name: str, points: Mapping[float, Interval]) -> Curve:
    """Through all points that have a value."""
    from dcp_prune.viz.plots import Curve

    known = {x: interval for x, interval in points.items() if not math.isnan(interval.value)}
    parts = [[getattr(interval, part) for interval in known.values()] for part in ("value", "low", "high")]
    return Curve(name, list(known), *parts)


def _marks(scores: Scores, draws: Float[np.ndarray, "r n"], *, ties: bool = True) -> list[Mark | None]:
    """`best` for a value that is surely above all others; `tie` for those that are not surely below the first."""
    marks: list[Mark | None] = [None] * draws.shape[1]
    if draws.shape[1] < 2 or np.isnan(draws[0]).all():
        return marks
    first = int(np.nanargmax(draws[0]))
    low = scores.resampling.intervals(draws[:, [first]] - draws)[1]
    close = [place for place in range(draws.shape[1]) if place != first and low[place] <= 0]
    if np.isnan(np.delete(low, first)).any():
        return marks
    if not close:
        marks[first] = "best"
    elif ties:
        for place in (first, *close):
            marks[place] = "tie"
    return marks


def _with_verdicts(intervals: Iterable[Interval | None]) -> list[Field]:
    fields: list[Field] = []
    for interval in intervals:
        if interval is None or math.isnan(interval.value):
            fields += ["", ""]
        else:
            fields += [Number(interval, signed=True), _WORDS[interval.verdict()]]
    return fields


_WORDS: dict[Verdict, str] = {"ahead": "ahead", "tie": "tie", "behind": "behind", "unknown": "unknown"}


def _plain(interval: Interval, digits: int = 1) -> Number:
    """What has no spread by its nature is shown without an interval."""
    return Number(interval, digits=digits, bounds=interval.low != interval.high)


def _looks(cell: Cell, names: Sequence[str] = ()) -> Mapping[str, Any]:
    from dcp_prune.viz.plots import styles

    return styles(sorted({*cell.contenders, *names}), OURS, PLAIN)


def _environment(environment: Mapping[str, Any]) -> str:
    packages = environment.get("packages", {})
    versions = [f"{name} {packages[name]}" for name in ("dcp-prune", "torch", "transformers") if packages.get(name)]
    devices = " + ".join([*environment.get("gpus", []), str(environment.get("cpu", ""))])
    return ", ".join([*versions, devices])


def _share(condition: str) -> float:
    return float(condition.partition("=")[2] or 0)


def _or_nothing(make: Callable[[], Value], nothing: Value) -> Value:
    try:
        return make()
    except GapError:
        return nothing


def _gap(make: Callable[[], object]) -> str:
    try:
        make()
    except GapError as gap:
        return str(gap)
    return ""


def _pad(values: Iterable[Value], marks: Sequence[Mark | None]) -> Iterable[tuple[Value, Mark | None]]:
    return ((value, marks[place] if place < len(marks) else None) for place, value in enumerate(values))


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _code(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
