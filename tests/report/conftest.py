"""Records with known answers, in the layout that sweeps write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

SOURCE = {
    "kind": "testbed",
    "checkpoint": "weak",
    "difficulty": "crowded",
    "first_seed": 1_000_000_000,
    "last_seed": 1_000_000_039,
    "questions": 560,
    "images": 40,
    "split": "held-out",
}
ENVIRONMENT = {
    "packages": {"dcp-prune": "0.1.0", "torch": "2.13.0", "transformers": "5.19.0"},
    "cpu": "CPU",
    "threads": 1,
    "gpus": [],
}
TASKS = ("counting", "existence", "reading")


class Sweep:
    """Writes a records folder method by method."""

    def __init__(self, folder: Path, images: int = 40, per_image: int = 6, **source: Any) -> None:
        self.folder = folder
        self.image = np.repeat(np.arange(images), per_image)
        self.task = np.tile(np.arange(per_image) % len(TASKS), images)
        self.source = {**SOURCE, **source}
        self.methods: list[dict[str, Any]] = []
        self.parts: list[pl.DataFrame] = []

    def add(
        self,
        label: str,
        num_tokens: int,
        score: Sequence[float] | np.ndarray,
        kappa: float | np.ndarray | None = None,
        options: Mapping[str, Any] | None = None,
        kept: np.ndarray | None = None,
        **distances: np.ndarray,
    ) -> Sweep:
        pruner = label.partition("@")[0].partition("(")[0]
        text = label.partition("@")[2] or "question"
        n = len(score)
        given = {name.replace("_", ".", 1): values for name, values in distances.items()}
        self.parts.append(
            pl.DataFrame(
                {
                    "method": [label] * n, "pruner": [pruner] * n, "num_tokens": [num_tokens] * n, "text": [text] * n,
                    "image": [f"i{number}" for number in self.image[:n]],
                    "question": [f"q{number}" for number in range(n)],
                    "task": [TASKS[number] for number in self.task[:n]], "truth": ["yes"] * n, "answer": ["no"] * n,
                    "score": np.asarray(score, dtype=np.float32),
                    "kappa": [None] * n if kappa is None else np.broadcast_to(np.float32(kappa), n),
                    **({} if kept is None else {"kept": np.asarray(kept, dtype=np.int32)}),
                    **{name: np.asarray(values, dtype=np.float32) for name, values in given.items()},
                },
                schema_overrides={"num_tokens": pl.Int32, "score": pl.Float32, "kappa": pl.Float32},
            )
        )  # fmt: skip
        self.methods.append(
            {"method": label, "pruner": pruner, "num_tokens": num_tokens, "text": text, "options": dict(options or {})}
        )
        return self

    def write(self, **manifest: Any) -> Path:
        (self.folder / "parts").mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(self.parts):
            texts = ("method", "pruner", "text", "image", "question", "task", "truth", "answer")
            part.with_columns(pl.col(name).cast(pl.Categorical) for name in texts).write_parquet(
                self.folder / "parts" / f"{number:06d}-0.parquet"
            )
        said = {
            "version": 1, "model": {"checkpoint": self.source.get("checkpoint", "model"), "sha256": "0"},
            "source": self.source, "methods": self.methods, "distances": [], "environment": ENVIRONMENT,
            "started": "", "updated": "",
        }  # fmt: skip
        (self.folder / "manifest.json").write_text(json.dumps({**said, **manifest}))
        return self.folder


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., Sweep]:
    return lambda name="sweep", **settings: Sweep(tmp_path / name, **settings)


@pytest.fixture
def graded(sweep: Callable[..., Sweep]) -> Callable[..., Sweep]:
    return lambda name="sweep", budgets=(64, 32, 16), **settings: make_graded(sweep(name, **settings), budgets)


@pytest.fixture(scope="session")
def graded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_graded(Sweep(tmp_path_factory.mktemp("records") / "sweep")).write()


def make_graded(sweep: Sweep, budgets: Sequence[int] = (64, 32, 16)) -> Sweep:
    """DCP-Prune before MMTok before others, with variants, text conditions and a distance that knows the loss."""
    rng = np.random.default_rng(0)
    n = len(sweep.image)
    luck = 0.8 * rng.random(n) + 0.2 * rng.random(sweep.image.max() + 1)[sweep.image]
    shares = {"dcp": 0.93, "mmtok": 0.88, "scope": 0.8, "holov": 0.65, "visionzip": 0.6, "uniform": 0.5, "random": 0.45}
    shifts = {"dcp": 0.1, "mmtok": 0.2, "scope": 0.25, "holov": 0.5, "visionzip": 0.6, "uniform": 0.03, "random": 0.05}
    sweep.add("none", 576, luck < 0.97, 0.0).add("none", 0, luck < 0.3)
    for budget in budgets:
        gain = 0.01 * np.log2(budget / 16)
        for name, share in shares.items():
            right = luck < share + gain
            loss = (1 - share - gain) * (0.9 + 0.2 * rng.random(n)) + 0.1 * ~right
            kappa = shifts[name] * 16 / budget * (0.9 + 0.2 * rng.random(n))
            sweep.add(name, budget, right, kappa, run_coverage_both=loss, eval_mmd=rng.random(n))
        sweep.add("dcp(threshold=inf)", budget, luck < 0.8 + gain, 0.2)
        sweep.add("dcp@none", budget, luck < 0.85 + gain, 0.2).add("dcp@wrong", budget, luck < 0.85 + gain, 0.2)
        sweep.add("mmtok@wrong", budget, luck < 0.7 + gain, 0.2)
        for share in (0.5, 1):
            sweep.add(f"dcp@noise={share:g}", budget, luck < 0.93 - 0.08 * share + gain, 0.2)
            sweep.add(f"mmtok@noise={share:g}", budget, luck < 0.88 - 0.2 * share + gain, 0.2)
    return sweep
