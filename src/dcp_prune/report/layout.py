"""One table, two forms: markdown for reading, LaTeX (booktabs) for papers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dcp_prune.eval.statistics.bootstrap import Interval

Mark = Literal["best", "tie"]

TIE = {"markdown": "†", "latex": r"$^{\dagger}$"}
_CODE = re.compile(r"`([^`]*)`")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "†": r"$^{\dagger}$",
}  # fmt: skip


@dataclass(frozen=True)
class Number:
    """A number with its interval, if it has one.

    Attributes:
        interval: what is shown; a NaN leaves the place empty.
        digits: behind the point.
        signed: writes the plus.
        mark: `best` is printed bold, `tie` gets a dagger.
        bounds: whether the interval is written out.
    """

    interval: Interval
    digits: int = 1
    signed: bool = False
    mark: Mark | None = None
    bounds: bool = True

    def markdown(self) -> str:
        value = self._format(self.interval.value)
        value = f"**{value}**" if self.mark == "best" else value + (TIE["markdown"] if self.mark == "tie" else "")
        return f"{value} {self._range()}".strip()

    def latex(self) -> str:
        value = _minus(self._format(self.interval.value))
        value = rf"\textbf{{{value}}}" if self.mark == "best" else value + (TIE["latex"] if self.mark == "tie" else "")
        between = _minus(self._range())
        return rf"{value} {{\scriptsize {between}}}" if between else value

    def _range(self) -> str:
        low, high = self.interval.low, self.interval.high
        if not self.bounds or math.isnan(low) or math.isnan(high):
            return ""
        return f"[{self._format(low)}, {self._format(high)}]"

    def _format(self, value: float) -> str:
        if math.isnan(value):
            return ""
        text = f"{value:{'+' if self.signed else ''}.{self.digits}f}"
        # What rounds to nothing has no sign.
        return text.lstrip("+-") if float(text) == 0 else text


Field = str | Number


@dataclass
class Table:
    """Rows in titled groups below one header; the first column reads from the left, the others from the right.

    Attributes:
        header: one title a column; backquotes mean code.
        groups: title (empty for none) and rows of each.
        left: further columns that read from the left.
    """

    header: Sequence[str]
    groups: list[tuple[str, list[Sequence[Field]]]] = field(default_factory=list)
    left: frozenset[int] = frozenset()

    def add(self, title: str, rows: Iterable[Sequence[Field]]) -> None:
        self.groups.append((title, list(rows)))

    def markdown(self) -> str:
        rule = ["---" if place in self.left or place == 0 else "---:" for place in range(len(self.header))]
        lines = [list(self.header), rule]
        for title, rows in self.groups:
            if title:
                lines.append([f"**{title}**", *[""] * (len(self.header) - 1)])
            lines += [[_markdown(value) for value in row] for row in rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def latex(self) -> str:
        """A `tabular` environment; needs the package booktabs."""
        columns = "".join("l" if place in self.left or place == 0 else "r" for place in range(len(self.header)))
        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _row(_escape(title) for title in self.header)]
        for title, rows in self.groups:
            lines.append(r"\midrule")
            if title:
                lines.append(rf"\multicolumn{{{len(self.header)}}}{{l}}{{\emph{{{_escape(title)}}}}} \\")
            lines += [
                _row(value.latex() if isinstance(value, Number) else _escape(value) for value in row) for row in rows
            ]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _markdown(value: Field) -> str:
    return value.markdown() if isinstance(value, Number) else value.replace("|", r"\|")


def _row(values: Iterable[str]) -> str:
    return " & ".join(values) + r" \\"


def _minus(text: str) -> str:
    return text.replace("-", "$-$")


def _escape(text: str) -> str:
    parts = _CODE.split(text)  # every second part stood between backquotes
    plain = ["".join(_LATEX.get(letter, letter) for letter in part) for part in parts]
    return "".join(rf"\texttt{{{part}}}" if place % 2 else part for place, part in enumerate(plain))
