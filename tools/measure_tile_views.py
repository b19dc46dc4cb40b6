"""What the unpruned language model makes of 2880 visual tokens, and of the overview and the tiles by themselves.

    python tools/measure_tile_views.py --limit 140 --json results/tile-views.json

On held-out crowded pictures, with the positions that the model was trained on and with those that `testbed.tiles` sets.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dcp_prune.environment import environment
from dcp_prune.eval.evaluate import evaluate, summarise
from dcp_prune.eval.specs import ALL_TOKENS, Method
from dcp_prune.files import check_writable, write_atomically
from dcp_prune.pruners.base import ScorePruner
from dcp_prune.testbed.load import load
from dcp_prune.testbed.seeds import HELD_OUT
from dcp_prune.testbed.tiles import ROPE_THETA, TILED_GRID, with_tiles
from dcp_prune.testbed.world import GRID
from dcp_prune.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class ViewPruner(ScorePruner):
    """Keeps the overview, or the tiles behind it."""

    overview: bool = True

    def score(self, tokens: VisualTokens) -> Float[Tensor, "b n"]:
        assert tokens.tiles is not None
        return ((tokens.tiles == 0) == self.overview).float()


VIEWS = (
    Method(ALL_TOKENS, 0),
    Method("overview", GRID**2, ViewPruner(num_tokens=GRID**2)),
    Method("tiles", TILED_GRID**2, ViewPruner(num_tokens=TILED_GRID**2, overview=False)),
    Method(ALL_TOKENS, None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=140, help="questions; each picture has 14")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    arguments = parser.parse_args()
    path = check_writable(arguments.json)
    torch.set_num_threads(1)
    results, questions = [], {}
    for checkpoint in ("weak",):  # the model whose world has pictures of twice the side
        model, processor = load(checkpoint)
        text: Any = model.config.text_config
        for rope_theta in (text.rope_parameters["rope_theta"], ROPE_THETA):
            tiled = with_tiles(model, processor, rope_theta=rope_theta)
            measured = summarise(
                evaluate(
                    *tiled,
                    VIEWS,
                    HELD_OUT,
                    arguments.limit,
                    difficulty="crowded",
                    grid=TILED_GRID,
                    checkpoint=checkpoint,
                )
            )
            questions = measured["questions"]
            results += [
                {"checkpoint": checkpoint, "rope_theta": rope_theta, "view": row["pruner"]}
                | {name: row[name] for name in ("num_tokens", "accuracy", "ci95", "n")}
                for row in measured["results"]
                if row["task"] == "all"
            ]
    result = {"results": results, "questions": questions, "environment": environment()}
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
