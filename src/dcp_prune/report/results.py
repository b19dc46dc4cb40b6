"""Records of sweeps as arrays: one cell for each model and set of questions, all methods on the very same questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float, Float32, Int

from dcp_prune.errors import RecordsError
from dcp_prune.eval.records import Records, read_records

NONE = "none"
"""Pruner of the unpruned model (all tokens) and of the model without an image (0 tokens)."""
OURS = "dcp"
PLAIN = ("random", "uniform")
"""Selections that look at no token: their kappa is low whatever their answers are worth."""
QUESTION = "question"
"""The text condition under which the pruner reads the question that the model is asked."""


@dataclass(frozen=True)
class Entry:
    """One method at one budget, a row of every array of its cell.

    Attributes:
        label: as it was typed, for example `dcp(text_weight=0)@wrong`.
        pruner: its registered name, or `NONE`.
        num_tokens: the budget, of a range the most; for `NONE` 0 without an image, else the largest number of tokens of
            an image.
        text: what the pruner read of the question.
        is_adaptive: whether a bound gave each question a number of tokens of its own.
    """

    label: str
    pruner: str
    num_tokens: int
    text: str = QUESTION
    is_adaptive: bool = False

    @property
    def is_contender(self) -> bool:
        """Whether this is a pruner as it comes, with the right question: what methods are compared by."""
        return self.pruner != NONE and self.text == QUESTION and not self.has_options

    @property
    def has_options(self) -> bool:
        """Whether fields were set, `name(field=value)`."""
        return "(" in self.label

    @property
    def is_ours(self) -> bool:
        """Whether this is DCP-Prune or a preset of it, and so nobody to be ahead of."""
        return self.pruner == OURS or self.pruner.startswith(f"{OURS}_")


@dataclass(frozen=True, eq=False)
class Cell:
    """All that was measured with one model on one set of questions.

    Attributes:
        name: for headings, `weak, crowded`; unique in a report.
        source: what the manifest says of the questions.
        environments: in which it was measured, one for each folder.
        folders: that it was read from.
        entries: the methods, `m` of them.
        tasks: `t` names, in alphabetical order.
        images: how many there are, `g`.
        image, task: of each question. `q`.
        score: of each answer, 0 to 1. `m q`.
        kept: visual tokens that the language model read. `m q`.
        distances: `kappa`, `eval.NAME` and `run.NAME`; NaN where there is none. `m q` each.
        notes: one sentence for each thing about the records that a reader should know.
    """

    name: str
    source: Mapping[str, Any]
    environments: tuple[Mapping[str, Any], ...]
    folders: tuple[Path, ...]
    entries: tuple[Entry, ...]
    tasks: tuple[str, ...]
    images: int
    image: Int[np.ndarray, " q"]
    task: Int[np.ndarray, " q"]
    score: Float[np.ndarray, "m q"]
    kept: Float32[np.ndarray, "m q"]
    distances: Mapping[str, Float32[np.ndarray, "m q"]]
    notes: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return "-".join("".join(c if c.isalnum() or c in "._" else " " for c in self.name).split())

    @property
    def budgets(self) -> tuple[int, ...]:
        """At which contenders were measured, from the largest down."""
        return tuple(sorted({entry.num_tokens for entry in self.entries if entry.is_contender}, reverse=True))

    @property
    def contenders(self) -> tuple[str, ...]:
        """Their names, in alphabetical order."""
        return tuple(sorted({entry.pruner for entry in self.entries if entry.is_contender}))

    def place(self, label: str, num_tokens: int) -> int | None:
        """Row of a method, None if it was not measured."""
        return self._places.get((label, num_tokens))

    @property
    def full(self) -> int | None:
        """Row of the unpruned model."""
        return next((place for (label, budget), place in self._places.items() if label == NONE and budget), None)

    @property
    def floor(self) -> int | None:
        """Row of the model without an image."""
        return self.place(NONE, 0)

    @property
    def _places(self) -> dict[tuple[str, int], int]:
        return {(entry.label, entry.num_tokens): place for place, entry in enumerate(self.entries)}


def load_cells(folders: Sequence[str | Path]) -> tuple[Cell, ...]:
    """Reads records folders, or folders that hold some; what has the same model and questions becomes one cell.

    Where two folders measured the same method the first one counts.

    Raises:
        RecordsError: a folder that is no records folder, of another version, damaged or empty; methods of one cell that
            answered different questions; or a method with other options in another folder.
    """
    found = [folder for name in folders for folder in find_records(Path(name)) or [Path(name)]]
    groups: dict[str, list[tuple[Path, Records]]] = {}
    for folder in dict.fromkeys(found):
        records = read_records(folder)
        if records.frame.is_empty():
            raise RecordsError(f"{folder} holds no rows yet; finish the sweep, or leave the folder out")
        key = json.dumps([records.manifest["model"], records.manifest["source"]], sort_keys=True)
        groups.setdefault(key, []).append((folder, records))
    names = _names([[records.manifest for _, records in group] for group in groups.values()])
    return tuple(_cell(name, group) for name, group in zip(names, groups.values(), strict=True))


def pool(cells: Sequence[Cell], name: str) -> Cell:
    """The questions of several cells as one: of the methods that all of them have, on the tasks that all of them have.

    Whether they are of one model is for the caller to know.
    """
    entries = tuple(entry for entry in cells[0].entries if all(entry in cell.entries for cell in cells))
    tasks = tuple(task for task in cells[0].tasks if all(task in cell.tasks for cell in cells))
    rows = [[cell.entries.index(entry) for entry in entries] for cell in cells]
    asked = [np.isin(np.array(cell.tasks)[cell.task], tasks) for cell in cells]
    first_image = np.cumsum([0, *(cell.images for cell in cells)])

    def join(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([each[own][:, of] for each, own, of in zip(arrays, rows, asked, strict=True)], axis=1)

    columns = [column for column in cells[0].distances if all(column in cell.distances for cell in cells)]
    images = [cell.image[of] + first for cell, of, first in zip(cells, asked, first_image, strict=False)]
    named = [np.array(cell.tasks)[cell.task[of]] for cell, of in zip(cells, asked, strict=True)]
    return Cell(
        name=name,
        source=cells[0].source,
        environments=tuple(environment for cell in cells for environment in cell.environments),
        folders=tuple(folder for cell in cells for folder in cell.folders),
        entries=entries,
        tasks=tasks,
        images=int(first_image[-1]),
        image=np.concatenate(images),
        task=np.searchsorted(tasks, np.concatenate(named)),
        score=join([cell.score for cell in cells]),
        kept=join([cell.kept for cell in cells]),
        distances={column: join([cell.distances[column] for cell in cells]) for column in columns},
    )


def find_records(folder: Path) -> list[Path]:
    """The folder itself if it holds records, else those in it and in its folders that do, in alphabetical order."""
    if (folder / "manifest.json").is_file():
        return [folder]
    return sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/manifest.json"))


def digest(folder: Path) -> str:
    """Twelve hexadecimal digits that change with any byte of a folder's records."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("*.parquet"), *folder.glob("parts/*.parquet"), folder / "manifest.json"]):
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:12]


def _names(groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Short where that is enough; the number of questions, then a number, tell apart what would be called the same."""
    names = [_name(group[0]) for group in groups]
    numbers = [f"{group[0]['source'].get('questions', '?')} questions" for group in groups]
    for details in (numbers, [str(place) for place in range(len(groups))]):
        names = [
            f"{name}, {detail}" if names.count(name) > 1 else name for name, detail in zip(names, details, strict=True)
        ]
    return names


def _name(manifest: Mapping[str, Any]) -> str:
    source, model = manifest["source"], manifest["model"]
    if source.get("kind") == "testbed":
        tiles = ", tiles" if source.get("tiles") else ""
        return f"{Path(str(source.get('checkpoint') or model.get('name'))).name}, {source['difficulty']}{tiles}"
    questions = Path(str(source.get("path", "questions"))).stem
    return f"{Path(str(model.get('name') or model.get('checkpoint') or 'model')).name}, {questions}"


def _cell(name: str, group: Sequence[tuple[Path, Records]]) -> Cell:
    _check_options(group)
    texts = ("method", "pruner", "text", "image", "question", "task")
    frames = [records.frame.with_columns(pl.col(name).cast(pl.String) for name in texts) for _, records in group]
    rows = pl.concat(frames, how="diagonal_relaxed")
    # Images may differ in their number of tokens: the unpruned model is one method all the same.
    unpruned = (pl.col("pruner") == NONE) & (pl.col("num_tokens") > 0)
    most = rows.filter(unpruned)["num_tokens"].max()
    rows = rows.with_columns(num_tokens=pl.when(unpruned).then(pl.lit(most, pl.Int32)).otherwise("num_tokens"))
    rows = rows.unique(subset=["method", "num_tokens", "question"], keep="first", maintain_order=True)

    questions = rows.select("question", "image", "task").unique().sort("image", "question").with_row_index("at")
    if questions["question"].is_duplicated().any():
        twice = questions.filter(pl.col("question").is_duplicated())["question"][0]
        raise RecordsError(
            f"question {twice!r} has several images or tasks in {_paths(group)}; give every question its id"
        )
    methods = rows.select("method", "pruner", "num_tokens", "text").unique(maintain_order=True)
    if methods.select("method", "num_tokens").is_duplicated().any():
        raise RecordsError(
            f"a method of {_paths(group)} has two pruners or text conditions; sweep them into other folders"
        )
    adaptive = {
        (method["method"], method["num_tokens"])
        for _, records in group
        for method in records.manifest["methods"]
        if (method.get("options") or {}).get("max_distance") is not None
    }
    entries = [
        Entry(*row, is_adaptive=(row[0], row[2]) in adaptive)
        for row in methods.select("method", "pruner", "num_tokens", "text").iter_rows()
    ]
    order = sorted(range(len(entries)), key=lambda place: (entries[place].label, -entries[place].num_tokens))
    entries = [entries[place] for place in order]
    _check_complete(rows, len(questions), group)

    numbers = pl.DataFrame(
        [(e.label, e.num_tokens, place) for place, e in enumerate(entries)],
        schema={"method": pl.String, "num_tokens": pl.Int32, "row": pl.Int64},
        orient="row",
    )
    rows = rows.join(numbers, on=["method", "num_tokens"]).join(questions.select("question", "at"), on="question")
    row, at = rows["row"].to_numpy(), rows["at"].to_numpy()
    shape = (len(entries), len(questions))
    distances = [column for column in rows.columns if column == "kappa" or column.startswith(("eval.", "run."))]

    def spread(column: str) -> Float32[np.ndarray, "m q"]:
        values = np.full(shape, np.nan, dtype=np.float32)
        values[row, at] = rows[column].cast(pl.Float32).fill_null(float("nan")).to_numpy()
        values[~np.isfinite(values)] = np.nan
        return values

    score = spread("score").astype(np.float64)
    if np.isnan(score).any():
        worst = entries[int(np.isnan(score).any(axis=1).argmax())]
        raise RecordsError(f"{worst.label} at {worst.num_tokens} tokens has answers without a score in {_paths(group)}")
    budgets = np.array([[entry.num_tokens] for entry in entries], dtype=np.float32)
    kept = spread("kept") if "kept" in rows.columns else np.full(shape, np.nan, dtype=np.float32)
    tasks, task = np.unique(questions["task"].to_numpy(), return_inverse=True)
    images, image = np.unique(questions["image"].to_numpy(), return_inverse=True)
    cell = Cell(
        name=name,
        source=group[0][1].manifest["source"],
        environments=tuple(records.manifest["environment"] for _, records in group),
        folders=tuple(folder for folder, _ in group),
        entries=tuple(entries),
        tasks=tuple(str(name) for name in tasks),
        images=len(images),
        image=image,
        task=task,
        score=score,
        kept=np.where(np.isnan(kept), budgets, kept),  # records that do not say it had fixed budgets only
        distances={column: spread(column) for column in distances},
    )
    return Cell(**{**cell.__dict__, "notes": tuple(_notes(cell))})


def _check_options(group: Sequence[tuple[Path, Records]]) -> None:
    """A label means the same in every folder, or the same name would stand for two methods."""
    seen: dict[tuple[str, int], tuple[Path, Any]] = {}
    for folder, records in group:
        for method in records.manifest["methods"]:
            key = (method["method"], method["num_tokens"])
            before, options = seen.setdefault(key, (folder, method.get("options")))
            if options != method.get("options"):
                raise RecordsError(
                    f"{key[0]} at {key[1]} tokens has other options in {folder} than in {before}; report them one at a "
                    "time, or sweep again"
                )


def _check_complete(rows: pl.DataFrame, questions: int, group: Sequence[tuple[Path, Records]]) -> None:
    counts = rows.group_by("method", "num_tokens").len().filter(pl.col("len") != questions)
    counts = counts.sort("num_tokens", "method", descending=[True, False])
    if counts.is_empty():
        return
    found = [f"{method} at {budget} tokens ({number:,})" for method, budget, number in counts.iter_rows()]
    shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    raise RecordsError(
        f"methods of {_paths(group)} did not answer all of the same {questions:,} questions: {shown}; run the sweep "
        "again, which measures only what is missing, or leave the folder out"
    )


def _notes(cell: Cell) -> Iterable[str]:
    split = cell.source.get("split")
    if split not in (None, "held-out"):
        yield f"These are {split} questions, which parameters may have been chosen on: nothing to report from."
    if cell.images == 1:
        yield "There is one image only, which says nothing about the next: no intervals."
    lacking = sorted(
        {entry.label for place, entry in enumerate(cell.entries) if entry.num_tokens and _lacks_kappa(cell, place)}
    )
    if lacking:
        yield f"Without a finite kappa for every question: {', '.join(f'`{label}`' for label in lacking)}."


def _lacks_kappa(cell: Cell, place: int) -> bool:
    return bool(np.isnan(cell.distances["kappa"][place]).any())


def _paths(group: Sequence[tuple[Path, Records]]) -> str:
    return ", ".join(str(folder) for folder, _ in group)
