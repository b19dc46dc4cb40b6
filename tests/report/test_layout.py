"""Tables in markdown and LaTeX."""

from __future__ import annotations

import math

from dcp_prune.eval.statistics.bootstrap import Interval
from dcp_prune.report.layout import Number, Table


def test_a_table_reads_the_same_in_both_forms():
    table = Table(["method", "score, %", "verdict"], left=frozenset({2}))
    table.add("", [["`dcp_a`", Number(Interval(97.25, 96.0, 98.0), mark="best"), "ahead"]])
    table.add("16 tokens", [["a & b", Number(Interval(-1.25, -2.0, 0.5), signed=True, mark="tie"), "tie | ±"]])
    assert table.markdown().splitlines() == [
        "| method | score, % | verdict |",
        "| --- | ---: | --- |",
        "| `dcp_a` | **97.2** [96.0, 98.0] | ahead |",
        "| **16 tokens** |  |  |",
        r"| a & b | -1.2† [-2.0, +0.5] | tie \| ± |",
    ]
    assert table.latex().splitlines() == [
        r"\begin{tabular}{lrl}",
        r"\toprule",
        r"method & score, \% & verdict \\",
        r"\midrule",
        r"\texttt{dcp\_a} & \textbf{97.2} {\scriptsize [96.0, 98.0]} & ahead \\",
        r"\midrule",
        r"\multicolumn{3}{l}{\emph{16 tokens}} \\",
        r"a \& b & $-$1.2$^{\dagger}$ {\scriptsize [$-$2.0, +0.5]} & tie | ± \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_what_is_unknown_stays_empty_and_nothing_has_no_sign():
    assert Number(Interval(math.nan)).markdown() == ""
    assert Number(Interval(1.0)).markdown() == "1.0"
    assert Number(Interval(-0.04, -0.2, 0.04), signed=True).markdown() == "0.0 [-0.2, 0.0]"
