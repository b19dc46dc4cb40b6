"""The command `list`: the pruners and the models that there are."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from dcp_prune.cli.common import Json, app, check_outputs, report_result


@app.command(name="list")
def list_(*, models: Annotated[bool, Parameter(negative=())] = False, json: Json = None) -> None:
    """Show the pruners and the models that there are.

    Parameters
    ----------
    models
        Show what each model class supports, from the flags of its adapter.
    """
    check_outputs(json)
    if models:
        matrix = _supported_models()
        report_result({"models": matrix}, json, lambda console: _show_matrix(console, matrix))
        return
    from dcp_prune.registry import get_pruner, list_pruners
    from dcp_prune.tokens import Signal

    pruners = []
    for name in list_pruners():
        cls = get_pruner(name)
        signals = cls.requires | cls.optional
        pruners.append(
            {
                "name": name,
                "summary": (cls.__doc__ or "").strip().split("\n\n")[0].replace("\n", " "),
                "reads": [signal.value for signal in Signal if signal in signals],
            }
        )
    from dcp_prune.models import supported_architectures

    known = [
        {
            "name": "testbed-weak",
            "summary": "comes with this program; words and patches hardly look alike, as in real models",
        },
        {"name": "testbed-aligned", "summary": "comes with this program; the words were built into the patches"},
        *(
            {"name": name, "summary": "any model of this class, by folder or hub name"}
            for name in supported_architectures()
        ),
    ]

    def show(console: Console) -> None:
        for title, rows in (("Pruners", pruners), ("Models", known)):
            table = Table(title, "", box=None, pad_edge=False)
            for row in rows:
                reads = f" [reads {', '.join(row['reads'])}]" if row.get("reads") else ""
                table.add_row(f"  {row['name']}", " ".join(f"{row['summary']}".split()) + reads.replace("[", "\\["))
            console.print(table)
            console.print()

    report_result({"pruners": pruners, "models": known}, json, show)


def _supported_models() -> list[dict[str, Any]]:
    """One row per model class."""
    from dcp_prune.models import ModelAdapter, adapter_class, supported_architectures
    from dcp_prune.registry import get_pruner, list_pruners, make_pruner
    from dcp_prune.tokens import Signal

    in_encoder = {name for name in list_pruners() if make_pruner(name, num_tokens=16).encoder_stages(576, 24)}
    rows = []
    for name in supported_architectures():
        adapter = adapter_class(name)
        given = adapter.signals | {Signal.TEXT}
        refused = {
            pruner: "; ".join(adapter.absent.get(signal, signal.value) for signal in sorted(missing))
            for pruner in list_pruners()
            if (missing := get_pruner(pruner).requires - given)
        }
        if not adapter.prunes_in_encoder:
            refused |= dict.fromkeys(
                sorted(in_encoder - set(refused)),
                f"no tokens can be dropped inside its encoder{adapter.why_not_in_encoder}",
            )
        rows.append(
            {
                "name": name,
                "images": True,
                "videos": adapter.video is not ModelAdapter.video,
                "tiles": adapter.cuts_tiles,
                "in_encoder": adapter.prunes_in_encoder,
                "saliency": adapter.saliency,
                "signals": [signal.value for signal in Signal if signal in adapter.signals],
                "refused_pruners": dict(sorted(refused.items())),
            }
        )
    return rows


def _show_matrix(console: Console, rows: list[dict[str, Any]]) -> None:
    columns = ("Model class", "videos", "tiles", "in the encoder", "saliency from", "refused pruners")
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        marks = ["yes" if row[flag] else "-" for flag in ("videos", "tiles", "in_encoder")]
        table.add_row(
            row["name"], *marks, row["saliency"].replace("[", "\\["), ", ".join(row["refused_pruners"]) or "-"
        )
    console.print(table)
    console.print()
    reasons = {f"{pruner}: {why}" for row in rows for pruner, why in row["refused_pruners"].items()}
    for reason in sorted(reasons):
        console.print("  " + reason.replace("[", "\\["), soft_wrap=True)
