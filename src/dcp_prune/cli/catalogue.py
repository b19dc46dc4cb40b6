"""The command `list`: the pruners and the models that there are."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from dcp_prune.cli.common import Json, app, check_outputs, report_result

if TYPE_CHECKING:
    from dcp_prune.models import ModelAdapter


@app.command(name="list")
def list_(
    *,
    models: Annotated[bool, Parameter(negative=())] = False,
    pruners: Annotated[bool, Parameter(negative=())] = False,
    json: Json = None,
) -> None:
    """Show all pruners and all models.

    Parameters
    ----------
    models
        Show what each model class supports.
    pruners
        Show only the pruners, with their papers.
    """
    check_outputs(json)
    if models:
        matrix = _supported_models()
        report_result({"models": matrix}, json, lambda console: _show_matrix(console, matrix))
        return
    rows = _pruners()
    if pruners:
        report_result({"pruners": rows}, json, lambda console: _show_lists(console, {"Pruners": rows}))
        return
    from dcp_prune.models import supported_architectures

    known = [
        {
            "name": "testbed-natural",
            "summary": "comes with this program; a pretrained encoder looks at photographs with things on them",
        },
        {
            "name": "testbed-weak",
            "summary": "comes with this program; its words and patches hardly look alike, as in real models",
        },
        *(
            {"name": name, "summary": "any model of this class, by folder or hub name"}
            for name in supported_architectures()
        ),
    ]
    lists = {"Pruners": rows, "Models": known}
    report_result({title.lower(): each for title, each in lists.items()}, json, lambda out: _show_lists(out, lists))


def _pruners() -> list[dict[str, Any]]:
    """One row per pruner. The first line of its file says what it keeps and names the paper."""
    from dcp_prune.registry import get_pruner, list_pruners
    from dcp_prune.tokens import Signal

    rows = []
    for name in list_pruners():
        cls = get_pruner(name)
        signals = cls.requires | cls.optional
        head = (sys.modules[cls.__module__].__doc__ or "").strip().partition("\n")[0]
        found = re.fullmatch(r"[^:(]*(?:\((?P<paper>[^)]+)\)[^:]*)?: (?P<keeps>.+)\.", head)
        rows.append(
            {
                "name": name,
                "summary": found["keeps"] if found else (cls.__doc__ or "").strip().partition("\n")[0],
                "reads": [signal.value for signal in Signal if signal in signals],
                "source": f"src/{cls.__module__.replace('.', '/')}.py",
                "paper": found["paper"] if found else None,
            }
        )
    return rows


def _show_lists(console: Console, lists: dict[str, list[dict[str, Any]]]) -> None:
    for title, rows in lists.items():
        table = Table(title, "", box=None, pad_edge=False)
        for row in rows:
            extra = [f"reads {', '.join(row['reads'])}"] if row.get("reads") else []
            extra += [row["paper"]] if len(lists) == 1 and row.get("paper") else []
            text = " ".join([row["summary"], *(f"[{each}]" for each in extra)])
            table.add_row(f"  {row['name']}", text.replace("[", "\\["))
        console.print(table)
        console.print()


def _refused_pruners(adapter: type[ModelAdapter]) -> dict[str, str]:
    """Those that an adapter cannot serve, with the reason."""
    from dcp_prune.registry import get_pruner, list_pruners, make_pruner
    from dcp_prune.tokens import Signal

    refused = {
        pruner: "; ".join(adapter.absent.get(signal, signal.value) for signal in sorted(missing))
        for pruner in list_pruners()
        if (missing := get_pruner(pruner).requires - adapter.signals - {Signal.TEXT})
    }
    if not adapter.prunes_in_encoder:
        why = f"no tokens can be dropped inside its encoder{adapter.why_not_in_encoder}"
        in_encoder = [name for name in list_pruners() if make_pruner(name, num_tokens=16).encoder_stages(576, 24)]
        refused |= {name: why for name in in_encoder if name not in refused}
    return refused


def _supported_models() -> list[dict[str, Any]]:
    """One row per model class."""
    from dcp_prune.models import adapter_class, supported_architectures
    from dcp_prune.tokens import Signal

    rows = []
    for name in supported_architectures():
        adapter = adapter_class(name)
        video = adapter.video_class()
        refused = _refused_pruners(adapter)
        if video is not None:
            refused |= {f"{pruner} (videos)": why for pruner, why in _refused_pruners(video).items() - refused.items()}
        inside = [kind.prunes_in_encoder for kind in (adapter, video) if kind]
        rows.append(
            {
                "name": name,
                "images": True,
                "videos": video is not None,
                "tiles": adapter.cuts_tiles,
                "in_encoder": "yes" if all(inside) else "images" if any(inside) else "no",
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
        marks = [
            {True: "yes", False: "-", "no": "-"}.get(row[flag], row[flag]) for flag in ("videos", "tiles", "in_encoder")
        ]
        table.add_row(
            row["name"], *marks, row["saliency"].replace("[", "\\["), ", ".join(row["refused_pruners"]) or "-"
        )
    console.width = max(console.width, 160)  # a name that is cut would be none
    console.print(table)
    console.print()
    reasons = {f"{pruner}: {why}" for row in rows for pruner, why in row["refused_pruners"].items()}
    for reason in sorted(reasons):
        console.print("  " + reason.replace("[", "\\["), soft_wrap=True)
