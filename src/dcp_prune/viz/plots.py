"""Figures of a report: accuracy and kappa against kept tokens, the radar, the noise curve, distance against accuracy.

Everything here is numbers and names. Colours are told apart by people with colour-blindness (Okabe-Ito), and markers
say the same again. Equal numbers give equal bytes with the same matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dcp_prune.errors import DcpPruneError

try:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
except ModuleNotFoundError as missing:
    raise DcpPruneError(
        f"figures need {missing.name}, which is not installed; run: pip install 'dcp-prune[eval]'"
    ) from missing

Format = Literal["png", "svg"]

# Okabe and Ito (2008); vermilion is kept for the method that a figure is about.
_FIRST = "#D55E00"
_HUES = ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#7A5C00")
_MARKERS = ("s", "^", "D", "v", "P", "X")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)))
_GREY, _INK = "#8C8C8C", "#262626"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#595959",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "dcp-prune",
    "savefig.dpi": 144,
}


@dataclass(frozen=True)
class Style:
    """How one method looks in every figure."""

    colour: str
    marker: str
    dash: Any = "-"
    width: float = 1.3
    size: float = 4.5
    order: int = 2


@dataclass(frozen=True)
class Curve:
    """A method's values with their bounds, by position on the x axis; NaN bounds draw no band."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes with curves.

    Attributes:
        title, ylabel: words.
        curves: what is drawn.
        levels: heights that hold at every x, by name; a line, or a remark where that would lie far below the curves.
    """

    title: str
    ylabel: str
    curves: Sequence[Curve]
    levels: Mapping[str, float]


@dataclass(frozen=True)
class Apart:
    """Values that have no place on a figure's axis, each with its own tick to the right.

    Attributes:
        tick: what they are.
        values: value and bounds by method.
    """

    tick: str
    values: Mapping[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Cloud:
    """Points of one panel: a distance against accuracy.

    Attributes:
        title, xlabel: words.
        points: method, budget, x and y of each.
    """

    title: str
    xlabel: str
    points: Sequence[tuple[str, int, float, float]]


def styles(names: Sequence[str], first: str, plain: Sequence[str] = ()) -> dict[str, Style]:
    """A look for every name: the first is strong, the plain ones are grey, the others differ in hue and marker."""
    others = [name for name in sorted(names) if name != first and name not in plain]
    looks = {
        name: Style(
            _HUES[place % len(_HUES)],
            _MARKERS[(place + place // len(_HUES)) % len(_MARKERS)],
            _DASHES[place // len(_HUES) % len(_DASHES)],
        )
        for place, name in enumerate(others)
    }
    for place, name in enumerate(name for name in plain if name in names):
        looks[name] = Style(_GREY, ("x", "+", "1", "2")[place % 4], (0, (3, 1.5)), 1.1, 5.0, 1)
    if first in names:
        looks[first] = Style(_FIRST, "o", "-", 2.6, 6.5, 5)
    return looks


def token_curves(title: str, panels: Sequence[Panel], looks: Mapping[str, Style]) -> Figure:
    """Values against kept tokens, panels side by side, with one legend in the order of the first panel's left end."""
    with _drawing():
        figure = _figure(4.1 * len(panels) + 1.8, _height(len(panels[0].curves)))
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            for curve in panel.curves:
                _curve(axis, curve, looks[curve.name])
            ticks = sorted({x for curve in panel.curves for x in curve.x})
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_locator(FixedLocator(ticks))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            _levels(axis, panel)
            axis.margins(x=0.04)
            axis.set(title=panel.title, xlabel="kept visual tokens", ylabel=panel.ylabel)
        order = sorted(panels[0].curves, key=lambda curve: (-curve.y[int(np.argmin(curve.x))], curve.name))
        _legend(figure, [curve.name for curve in order], looks)
        _title(figure, title)
        return figure


def radar(
    title: str, tasks: Sequence[str], panels: Mapping[str, Mapping[str, Sequence[float]]], looks: Mapping[str, Style]
) -> Figure:
    """One spoke a task, one panel a budget. The centre is a round number below the lowest value; every ring says its
    value."""
    with _drawing():
        figure = _figure(3.4 * len(panels) + 1.5, 3.6)
        axes = figure.subplots(1, len(panels), squeeze=False, subplot_kw={"projection": "polar"})[0]
        angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
        values = np.concatenate([np.asarray(list(panel.values()), dtype=float).ravel() for panel in panels.values()])
        step, centre, rim = _rings(float(np.nanmin(values)), float(np.nanmax(values)))
        for axis, (heading, methods) in zip(axes, panels.items(), strict=True):
            for name, spokes in methods.items():
                look = looks[name]
                ring = np.append(spokes, spokes[0])
                axis.plot(
                    np.append(angles, angles[0]), ring, color=look.colour, linewidth=look.width, linestyle=look.dash,
                    marker=look.marker, markersize=0.8 * look.size, zorder=look.order, clip_on=False,
                )  # fmt: skip
                if look.order > 4:
                    axis.fill(angles, spokes, color=look.colour, alpha=0.10, zorder=1.5)
            axis.set_theta_offset(np.pi / 2)
            axis.set_theta_direction(-1)
            axis.set_xticks(angles, [task.replace("_", " ") for task in tasks], fontsize=8.5)
            for label, angle in zip(axis.get_xticklabels(), angles, strict=True):
                side = np.sin(angle)
                label.set_horizontalalignment("center" if abs(side) < 0.2 else "left" if side > 0 else "right")
            axis.tick_params(axis="x", pad=1)
            rings = np.arange(centre + step, rim + step / 2, step)
            axis.set_ylim(centre, rim)
            axis.set_yticks(rings, [f"{value:g}" for value in rings], fontsize=7, color="#595959")
            axis.set_rlabel_position(180 / len(tasks))
            axis.grid(color="#D0D0D0")
            axis.spines["polar"].set_visible(False)
            axis.set_title(heading, pad=12)
        _legend(figure, list(dict.fromkeys(name for methods in panels.values() for name in methods)), looks)
        _title(figure, title)
        return figure


def _rings(lowest: float, highest: float) -> tuple[float, float, float]:
    """Step, centre and rim of a radar: round numbers, at most six rings, and room between the centre and the lowest."""
    step = next((step for step in (2.0, 5.0, 10.0, 20.0) if (highest - lowest) / step <= 4.5), 25.0)
    centre = max(0.0, step * np.floor(lowest / step - 0.5))
    return step, centre, step * np.ceil(highest / step - 1e-9)


def noise_curves(
    title: str, panels: Mapping[str, tuple[Sequence[Curve], Sequence[Apart]]], looks: Mapping[str, Style]
) -> Figure:
    """Relative score against the share of noise in the question, and conditions apart; one panel a budget."""
    with _drawing():
        figure = _figure(3.7 * len(panels) + 1.9, 3.7)
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        names: dict[str, None] = {}
        for axis, (heading, (curves, apart)) in zip(axes, panels.items(), strict=True):
            for curve in curves:
                _curve(axis, curve, looks[curve.name])
                names[curve.name] = None
            ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
            labels = ["0", "¼", "½", "¾", "1"]
            for place, group in enumerate(apart):
                x = 1.2 + 0.22 * place
                ticks.append(x)
                labels.append(group.tick)
                count = len(group.values)
                for number, (name, (value, low, high)) in enumerate(group.values.items()):
                    look = looks[name]
                    names[name] = None
                    axis.errorbar(
                        x + 0.05 * (number - (count - 1) / 2), value,
                        [[max(0.0, value - low)], [max(0.0, high - value)]] if low == low else None,
                        color=look.colour, marker=look.marker, markersize=look.size, linewidth=1.4, capsize=2,
                        zorder=look.order,
                    )  # fmt: skip
            if apart:
                axis.axvline(1.09, color="#BFBFBF", linewidth=0.8)
            axis.set_xticks(ticks, labels)
            axis.grid(visible=False, axis="x")
            axis.set(title=heading, xlabel="share of noise in the question")
        axes[0].set_ylabel("relative score, %")
        _legend(figure, list(names), looks)
        _title(figure, title)
        return figure


def clouds(title: str, panels: Sequence[Cloud], looks: Mapping[str, Style]) -> Figure:
    """Distance against accuracy, a point for every method and budget; larger points keep more tokens."""
    with _drawing():
        names = sorted({point[0] for panel in panels for point in panel.points}, key=lambda n: (-looks[n].order, n))
        budgets = sorted({point[1] for panel in panels for point in panel.points})
        figure = _figure(4.1 * len(panels) + 1.8, _height(len(names) + 5))
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        area = dict(zip(budgets, np.linspace(30, 110, len(budgets)) if len(budgets) > 1 else [45.0], strict=True))
        for axis, panel in zip(axes, panels, strict=True):
            for name, budget, x, y in panel.points:
                look = looks[name]
                lines = {"linewidths": 1.3} if look.marker in "x+12" else {"edgecolors": "white", "linewidths": 0.6}
                axis.scatter(
                    [x], [y], s=area[budget], color=look.colour, marker=look.marker, zorder=look.order + 1, **lines
                )
            positive = [x for _, _, x, _ in panel.points if x > 0]
            if len(positive) == len(panel.points) and max(positive) > 20 * min(positive):
                axis.set_xscale("log")
            axis.margins(0.06)
            axis.set(title=panel.title, xlabel=panel.xlabel)
        axes[0].set_ylabel("accuracy, %")
        sizes = [
            Line2D([], [], linestyle="", marker="o", color="#BFBFBF", markersize=area[budget] ** 0.5, label=f"{budget}")
            for budget in sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1]})
        ]
        _legend(figure, names, looks, sizes, joined=False)
        _title(figure, title)
        return figure


def to_bytes(figure: Figure, kind: Format) -> bytes:
    """The file's content; no date and no version in it."""
    stream = io.BytesIO()
    with _drawing():
        figure.savefig(
            stream, format=kind, metadata={"Software": None} if kind == "png" else {"Date": None, "Creator": None}
        )
    return stream.getvalue()


@contextmanager
def _drawing() -> Iterator[None]:
    """The same look whatever a user's own settings are."""
    settings: dict[Any, Any] = {**mpl.rcParamsDefault, **_STYLE, "backend": "agg"}
    with mpl.rc_context(settings):
        yield


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _height(entries: int) -> float:
    """Inches of a figure whose legend has so many entries."""
    return max(3.9, 0.6 + 0.192 * entries)


def _title(figure: Figure, title: str) -> None:
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")


def _curve(axis: Any, curve: Curve, look: Style) -> None:
    order = np.argsort(curve.x)
    x, y, low, high = (np.asarray(part, dtype=float)[order] for part in (curve.x, curve.y, curve.low, curve.high))
    axis.plot(
        x, y, color=look.colour, marker=look.marker, linestyle=look.dash, linewidth=look.width, markersize=look.size,
        markeredgewidth=1.3 if look.marker in "x+12" else 0, zorder=look.order,
    )  # fmt: skip
    axis.fill_between(
        x, low, high, color=look.colour, alpha=0.2 if look.order > 4 else 0.1, linewidth=0, zorder=look.order - 0.5
    )


def _levels(axis: Any, panel: Panel) -> None:
    lowest = min(min(curve.y) for curve in panel.curves)
    highest = max(max(curve.y) for curve in panel.curves)
    for name, height in panel.levels.items():
        if height < lowest - 0.25 * max(highest - lowest, 1e-9):
            axis.annotate(
                f"{name}: {height:.1f}", (0.99, 0.015), xycoords="axes fraction", fontsize=8, ha="right", va="bottom"
            )
            continue
        axis.axhline(height, color=_INK, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        axis.annotate(
            f"{name}: {height:.1f}", (0.99, height), xycoords=("axes fraction", "data"), fontsize=8,
            xytext=(0, 4), textcoords="offset points", ha="right", va="bottom",
        )  # fmt: skip


def _legend(
    figure: Figure,
    names: Sequence[str],
    looks: Mapping[str, Style],
    sizes: Sequence[Line2D] = (),
    *,
    joined: bool = True,
) -> None:
    """Right of the panels, so that it covers nothing."""
    handles = [
        Line2D(
            [], [], color=looks[name].colour, marker=looks[name].marker or None,
            linestyle=looks[name].dash if joined else "", linewidth=looks[name].width, markersize=looks[name].size,
            markeredgewidth=1.3 if looks[name].marker in tuple("x+12") else 0, label=name,
        )
        for name in names
    ]  # fmt: skip
    legend = figure.legend(handles=handles, loc="outside right upper", handlelength=2.6 if joined else 1.2)
    if sizes:
        figure.legend(handles=list(sizes), loc="outside right lower", title="kept tokens", labelspacing=0.7)
    for text, name in zip(legend.get_texts(), names, strict=True):
        if looks[name].order > 4:
            text.set_fontweight("bold")


def time_bars(title: str, names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> Figure:
    """Times one below the other, each put together from its parts, in milliseconds.

    Args:
        title: of the figure.
        names: of the bars.
        parts: by what they are, one number for each bar.
    """
    with _drawing():
        figure = _figure(7.2, 1.2 + 0.32 * len(names))
        axis = figure.subplots()
        start = np.zeros(len(names))
        for (part, values), colour in zip(parts.items(), (_HUES[0], _FIRST, _HUES[4], *_HUES[1:]), strict=False):
            axis.barh(range(len(names)), values, left=start, label=part, color=colour, height=0.7)
            start = start + np.asarray(values, dtype=float)
        axis.set_yticks(range(len(names)), labels=list(names))
        axis.invert_yaxis()
        axis.set_xlabel("milliseconds to the first token")
        axis.grid(visible=False, axis="y")
        figure.legend(loc="outside right upper")
        _title(figure, title)
        return figure
