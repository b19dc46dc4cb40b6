"""Compares settings of DCP-Prune on tuning seeds, side by side, and writes what chose the defaults.

    python tools/search_dcp.py --limit 1400 --num-tokens 16 --json results/dcp-search.json

Every variant changes the named fields of the defaults and answers the very same questions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dcp_prune.eval.environment import environment
from dcp_prune.eval.stats import paired_difference
from dcp_prune.eval.testbed import ALL_TOKENS, Method, evaluate
from dcp_prune.registry import make_pruner
from dcp_prune.testbed.load import CHECKPOINTS, load
from dcp_prune.testbed.seeds import TUNING
from dcp_prune.testbed.world import TASKS

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "two stages": {"schedule": ((0.5, 0.5), (0.75, 0.25))},
    "one stage, mid": {"schedule": ((0.5, 0.5),)},
    "one stage, deep": {"schedule": ((0.75, 0.5),)},
    "one stage, deep, gentle": {"schedule": ((0.75, 0.75),)},
    "stage, anchors by coverage": {"schedule": ((0.75, 0.5),), "anchors": "coverage"},
    "stage, anchors by saliency": {"schedule": ((0.75, 0.5),), "anchors": "saliency"},
    "stage, recovery 0.3": {"schedule": ((0.75, 0.5),), "recovery": 0.3},
    "stage, recovery 1": {"schedule": ((0.75, 0.5),), "recovery": 1.0},
    "never re-select": {"threshold": float("inf")},
    "facility location": {"centres": "facility_location"},
    "no text": {"text_weight": 0.0, "text_affinity": 0.0, "member_relevance": 0.0},
    "ungated": {"gate": "none"},
    "text 0.5": {"text_weight": 0.5},
    "text 3": {"text_weight": 3.0},
    "saliency 0.3": {"saliency_weight": 0.3},
    "saliency 1": {"saliency_weight": 1.0},
    "coverage 0.3": {"coverage_weight": 0.3},
    "power 1": {"relevance_power": 1.0},
    "power 6": {"relevance_power": 6.0},
    "smoothing 0.05": {"relevance_smoothing": 0.05},
    "confidence earlier": {"confidence_margin": -2.5},
    "confidence later": {"confidence_margin": 0.0},
    "confidence shorter": {"confidence_span": 2.0},
    "confidence robust": {"confidence_robust": True},
    "no cluster re-selection": {"reselect_members": False},
    "affinity 0": {"text_affinity": 0.0},
    "affinity 0.5": {"text_affinity": 0.5},
    "encoder space": {"space": "encoder"},
    "member relevance 0": {"member_relevance": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", choices=CHECKPOINTS, help="default: both")
    parser.add_argument("--difficulty", default="crowded", choices=("standard", "crowded"))
    parser.add_argument("--num-tokens", type=int, default=16)
    parser.add_argument("--limit", type=int, default=1400, help="tuning questions")
    parser.add_argument("--skip", type=int, default=0, help="tuning scenes to leave out at the beginning")
    parser.add_argument("--variant", action="append", help="only these (default: all)")
    parser.add_argument("--extra", type=json.loads, default={}, help="further variants, as JSON: name -> fields")
    parser.add_argument("--base", type=json.loads, default={}, help="fields that every variant starts from, as JSON")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    variants = VARIANTS | args.extra
    if args.variant:
        variants = {name: variants[name] for name in ("default", *args.variant)}
    rows = []
    for checkpoint in args.checkpoint or CHECKPOINTS:
        model, processor = load(checkpoint)
        methods = [Method(ALL_TOKENS, None)] + [
            Method(name, args.num_tokens, make_pruner("dcp", num_tokens=args.num_tokens, **{**args.base, **fields}))
            for name, fields in variants.items()
        ]
        done = evaluate(model, processor, methods, TUNING[args.skip :], args.limit, difficulty=args.difficulty)
        by_name = {answers.method.name: answers for answers in done.answers}
        table = Table(title=f"{checkpoint}, {args.difficulty}, {args.num_tokens} tokens, {len(done.task)} questions")
        for column in ("variant", "accuracy", "against default", "95 %", "kappa", *(task[:5] for task in TASKS)):
            table.add_column(column)
        for name, answers in by_name.items():
            gain = paired_difference(answers.correct, by_name["default"].correct, done.image)
            shift = None if answers.kappa is None else float(answers.kappa.mean())
            row = {
                "checkpoint": checkpoint,
                "difficulty": args.difficulty,
                "num_tokens": answers.num_tokens,
                "variant": name,
                "fields": {**args.base, **variants.get(name, {})},
                "accuracy": float(answers.correct.mean()),
                "against_default": gain.mean,
                "ci95": [gain.low, gain.high],
                "kappa": shift,
                "tasks": {task: float(answers.correct[done.task == task].mean()) for task in TASKS},
                "n": len(done.task),
            }
            rows.append(row)
            table.add_row(
                name,
                f"{row['accuracy']:.3f}",
                f"{gain.mean:+.3f}",
                f"{gain.low:+.3f} {gain.high:+.3f}",
                "" if shift is None else f"{shift:.2f}",
                *(f"{100 * share:.0f}" for share in row["tasks"].values()),
            )
        Console(width=140).print(table)
    if args.json:
        args.json.write_text(json.dumps({"results": rows, "environment": environment()}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
