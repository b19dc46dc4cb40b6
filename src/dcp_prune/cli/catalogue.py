"""The command `list`: the pruners and the models that there are."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dcp_prune.cli.common import Json, app, check_outputs, report_result


@app.command(name="list")
def list_(*, json: Json = None) -> None:
    """Show the pruners and the models that there are."""
    from dcp_prune.registry import get_pruner, list_pruners
    from dcp_prune.tokens import Signal

    check_outputs(json)
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

    models = [
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
        for title, rows in (("Pruners", pruners), ("Models", models)):
            table = Table(title, "", box=None, pad_edge=False)
            for row in rows:
                reads = f" [reads {', '.join(row['reads'])}]" if row.get("reads") else ""
                table.add_row(f"  {row['name']}", " ".join(f"{row['summary']}".split()) + reads.replace("[", "\\["))
            console.print(table)
            console.print()

    report_result({"pruners": pruners, "models": models}, json, show)
