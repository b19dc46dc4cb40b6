"""The published scores: commands that measure them, what they should give, and whether a finished run agrees.

`commands` prints the commands, for a machine with a GPU and a hub; `expected` what they should give, with sources;
`check FOLDER` compares finished runs of lmms-eval, cell by cell; `page` rewrites the tables of docs/reproduce.md.

`check` exits with 0 if every measured cell that was published agrees, with 1 if not, with 2 if it cannot compare.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

PROJECT = Path(__file__).resolve().parents[1]
PAGE = PROJECT / "docs" / "reproduce.md"
OWN_TASKS = "tools/reproduce_tasks"
TOLERANCE = 1.5
"""Points that a score may differ by: the questions are the same, but not the GPU, the dtype and the harness. Ours."""
AVERAGE = "average"
AVERAGE_TOLERANCE = 1.0
"""Likewise of the mean over five benchmarks. Two teams' means of one method differ by about half of it."""

app = App(name="reproduce.py", help=__doc__, help_format="plaintext", result_action="return_value")


@dataclass(frozen=True)
class Benchmark:
    """A column of the published tables, and where lmms-eval reports it.

    Attributes:
        task: its name in lmms-eval.
        metrics: the names of its scores there, which are added up.
        scale: what a score of lmms-eval is multiplied by.
        most: the highest score.
    """

    task: str
    metrics: tuple[str, ...]
    scale: float = 100.0
    most: float = 100.0


BENCHMARKS = {
    "GQA": Benchmark("gqa", ("exact_match",)),
    "MME": Benchmark("mme", ("mme_perception_score", "mme_cognition_score"), scale=1.0, most=2_800.0),
    "POPE": Benchmark("pope", ("pope_f1_score",)),
    "SQA": Benchmark("scienceqa_img", ("exact_match",)),
    "TextVQA": Benchmark("textvqa_val", ("exact_match",)),
}


@dataclass(frozen=True)
class Model:
    """A checkpoint, and how the published numbers ask it."""

    pretrained: str
    budgets: tuple[int, ...]
    pruners: tuple[str, ...]
    dtype: str = "bfloat16"
    llava: bool = False
    """Whether it is asked as LLaVA's own scripts do: with Vicuna's system prompt, and OCR tokens in TextVQA."""


PEERS = ("scope", "mmtok", "divprune", "prunesid", "holov", "flowcut", "visionzip")
MODELS = {
    "llava-1.5-7b": Model(
        "llava-hf/llava-1.5-7b-hf", (64, 32, 16), ("dcp", "dcp_progressive", *PEERS), "float16", llava=True
    ),
    "llava-next-7b": Model(
        "llava-hf/llava-v1.6-vicuna-7b-hf", (80, 40, 20), ("dcp", "dcp_progressive", *PEERS), "float16", llava=True
    ),
    "qwen2.5-vl-7b": Model("Qwen/Qwen2.5-VL-7B-Instruct", (64, 32, 16), ("dcp", "dcp_progressive", "mmtok", "resize")),
    "smolvlm": Model("HuggingFaceTB/SmolVLM-Instruct", (64, 32, 16), ("dcp", "mmtok", "resize")),
}
ModelName = Annotated[str | None, Parameter(help=f"One of {', '.join(MODELS)}; all of them if nothing is said.")]
COUNTS_CLS = ("visionzip", "prunesid")
"""Published budgets of these count [CLS]."""


@dataclass(frozen=True)
class Expected:
    """A published score."""

    model: str
    pruner: str
    num_tokens: int | None
    benchmark: str
    value: float
    source: str
    points: float = TOLERANCE

    @property
    def tolerance(self) -> float:
        """In units of the score."""
        if self.benchmark == AVERAGE:
            return AVERAGE_TOLERANCE
        return self.points / 100 * BENCHMARKS[self.benchmark].most


@dataclass
class Run:
    """Finished runs of one model with one pruner and budget."""

    model: str
    pruner: str
    num_tokens: int | None
    scores: dict[str, float] = field(default_factory=dict)


class UnusableError(Exception):
    """What was given cannot be compared; the message says why."""


def expected() -> list[Expected]:
    """Every published score that is known to this project."""
    published = json.loads((PROJECT / "results" / "published.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = []
    for model in ("llava-1.5-7b", "llava-next-7b"):
        for budget, methods in published[model].items():
            if budget == "upper_bound":
                scores = {name: methods[name] for name in BENCHMARKS}
                rows.append({"model": model, "pruner": "none", "num_tokens": None, **scores})
                continue
            for name, values in methods.items():
                scores = dict(zip((*BENCHMARKS, AVERAGE), values, strict=True))
                # The published method has both stages: `dcp_progressive`. `dcp` is its second stage alone.
                for pruner in ("dcp", "dcp_progressive") if name == "dcp" else (name,):
                    rows.append({"model": model, "pruner": pruner, "num_tokens": int(budget), **scores})
    for row in rows:
        row["source"] = "arXiv 2606.16633"
    rows += json.loads((PROJECT / "results" / "reproduce.json").read_text(encoding="utf-8"))["rows"]
    return [
        Expected(
            *(row["model"], row["pruner"], row["num_tokens"], benchmark, row[benchmark], row["source"]),
            points=row.get("tolerance", TOLERANCE),
        )
        for row in rows
        for benchmark in (*BENCHMARKS, AVERAGE)
        if benchmark in row
    ]


@app.command
def commands(*, model: ModelName = None, output: str = "results/lmms", batch_size: int = 16) -> None:
    """Print the commands that measure every cell; run them in the environment of docs/how-to/lmms-eval.md."""
    print("\n".join(_commands(model, output, batch_size)))


@app.command(name="expected")
def show_expected(*, model: ModelName = None) -> None:
    """Print every expected score with its tolerance and source."""
    for name in _chosen(model):
        print(f"{name}\n\n{_table(name)}\n")


@app.command
def check(folder: Path, *, model: ModelName = None) -> int:
    """Compare finished runs of lmms-eval with what was published.

    Parameters
    ----------
    folder
        What the runs were given as --output_path.
    model
        Whose runs they are, where the name of the checkpoint does not tell.
    """
    runs = read_runs(folder, model)
    lines, agrees = compare(runs)
    print("\n".join(lines))
    return 0 if agrees else 1


@app.command
def page(*, check: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Rewrite the generated parts of docs/reproduce.md."""
    text = PAGE.read_text(encoding="utf-8")
    new = text
    for name in MODELS:
        parts = {
            f"commands {name}": "```bash\n" + "\n".join(_commands(name, "results/lmms", 16)) + "\n```",
            f"expected {name}": _table(name),
        }
        for mark, content in parts.items():
            pattern = rf"(<!-- {mark}:begin -->\n).*?(<!-- {mark}:end -->)"
            new, count = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", new, flags=re.DOTALL)
            if count != 1:
                raise UnusableError(f"{PAGE} needs the marks of {mark!r} once")
    if check:
        if new != text:
            print("docs/reproduce.md is out of date; run `make report`", file=sys.stderr)
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


def read_runs(folder: Path, model: str | None = None) -> list[Run]:
    """The runs whose result files lie in a folder.

    Raises:
        UnusableError: there are none, or one was cut short by `--limit`.
    """
    runs: dict[tuple[str, str, int | None], Run] = {}
    for path in sorted(folder.rglob("*_results.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        config = result["config"]
        if config.get("limit"):
            raise UnusableError(
                f"{path} was measured with --limit {config['limit']}; published scores are of all questions"
            )
        given = _arguments(config["model_args"])
        key = (_model_of(given["pretrained"], model, path), *_method(given, path))
        run = runs.setdefault(key, Run(*key))
        for name, benchmark in BENCHMARKS.items():
            # LLaVA's TextVQA is asked with OCR tokens, which lmms-eval's own task leaves out.
            task = "textvqa_val_ocr" if name == "TextVQA" and MODELS[key[0]].llava else benchmark.task
            if task in result["results"]:
                scores = [_score(result["results"][task], metric, path) for metric in benchmark.metrics]
                run.scores[name] = benchmark.scale * sum(scores)
    if not runs:
        raise UnusableError(
            f"there is no *_results.json of lmms-eval in {folder}; name what was given as --output_path"
        )
    full = {run.model: run.scores for run in runs.values() if run.pruner == "none"}
    for run in runs.values():
        whole = full.get(run.model, {})
        if run.pruner != "none" and set(BENCHMARKS) <= run.scores.keys() & whole.keys():
            shares = [run.scores[name] / whole[name] for name in BENCHMARKS]
            run.scores[AVERAGE] = 100 * sum(shares) / len(shares)
    return list(runs.values())


def compare(runs: Sequence[Run]) -> tuple[list[str], bool]:
    """A table of all measured cells, and whether those with a published score agree with it."""
    known: dict[tuple[str, str, int | None, str], list[Expected]] = {}
    for each in expected():
        known.setdefault((each.model, each.pruner, each.num_tokens, each.benchmark), []).append(each)
    lines = [
        "| model | pruner | tokens | benchmark | measured | expected | difference | tolerance | agrees | source |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    verdicts = []
    for run in runs:
        for name, score in run.scores.items():
            start = f"| {run.model} | `{run.pruner}` | {run.num_tokens or 'all'} | {name} | {_digits(name, score)} |"
            found = known.get((run.model, run.pruner, run.num_tokens, name), [])
            if not found:
                lines.append(f"{start} | | | | nothing published |")
            for each in found:
                agrees = abs(score - each.value) <= each.tolerance
                verdicts.append(agrees)
                lines.append(
                    f"{start} {_digits(name, each.value)} | {score - each.value:+.1f} | {each.tolerance:.1f} | "
                    f"{'yes' if agrees else '**no**'} | {each.source} |"
                )
    lines += ["", f"{sum(verdicts)} of {len(verdicts)} cells with a published score agree with it."]
    return lines, all(verdicts)


def _commands(model: str | None, output: str, batch_size: int) -> Iterator[str]:
    for name in _chosen(model):
        spec = MODELS[name]
        tasks = [
            each.task + ("_ocr" if spec.llava and column == "TextVQA" else "") for column, each in BENCHMARKS.items()
        ]
        base = f"pretrained={spec.pretrained},dtype={spec.dtype}"
        if spec.llava:
            base += f",system_prompt={OWN_TASKS}/vicuna_v1.txt"
        options = f"--batch_size {batch_size} --output_path {output}/{name}"
        if spec.llava:
            options += f" --include_path {OWN_TASKS}"
        start = f'lmms-eval --model dcp_llava_hf --model_args "{base},$1"'
        yield f"run() {{\n  {start} \\\n    --tasks {','.join(tasks)} {options}\n}}"
        yield "run pruner=none"
        for counts_cls, more in ((False, ""), (True, ",cls_in_budget=true")):
            if pruners := [each for each in spec.pruners if (each in COUNTS_CLS) == counts_cls]:
                budgets = " ".join(str(budget - counts_cls) for budget in spec.budgets)
                yield f"for pruner in {' '.join(pruners)}; do"
                yield f"  for k in {budgets}; do run pruner=$pruner,num_tokens=$k{more}; done"
                yield "done"


def _table(name: str) -> str:
    cells = [each for each in expected() if each.model == name]
    columns = [*BENCHMARKS, AVERAGE]
    lines = [
        f"| pruner | tokens | {' | '.join(columns)} | source |",
        f"| --- | ---: | {'---: | ' * len(columns)}--- |",
    ]
    for pruner, tokens, source in dict.fromkeys((each.pruner, each.num_tokens, each.source) for each in cells):
        row = {
            each.benchmark: each
            for each in cells
            if (each.pruner, each.num_tokens, each.source) == (pruner, tokens, source)
        }
        shown = [
            f"{_digits(column, row[column].value)} ± {row[column].tolerance:.1f}" if column in row else ""
            for column in columns
        ]
        lines.append(f"| `{pruner}` | {tokens or 'all'} | {' | '.join(shown)} | {source} |")
    return "\n".join(lines)


def _chosen(model: str | None) -> tuple[str, ...]:
    if model is not None and model not in MODELS:
        raise UnusableError(f"no model is named {model!r}; there are {', '.join(MODELS)}")
    return tuple(MODELS) if model is None else (model,)


def _arguments(text: str | dict[str, Any]) -> dict[str, str]:
    if isinstance(text, dict):
        return {name: str(value) for name, value in text.items()}
    return dict(part.split("=", 1) for part in text.split(",") if "=" in part)


def _model_of(pretrained: str, model: str | None, path: Path) -> str:
    if model is not None:
        return _chosen(model)[0]
    folder = Path(pretrained).name.lower()
    for name, spec in MODELS.items():
        if Path(spec.pretrained).name.lower() == folder:
            return name
    raise UnusableError(f"{path} is of {pretrained}, which is none of {', '.join(MODELS)}; say which one with --model")


def _method(given: dict[str, str], path: Path) -> tuple[str, int | None]:
    pruner = given.get("pruner", "dcp")
    if pruner == "none":
        return pruner, None
    if "num_tokens" not in given:
        raise UnusableError(f"{path} has no num_tokens in its model_args; published budgets are numbers of tokens")
    ignored = {"pretrained", "pruner", "num_tokens", "cls_in_budget", "system_prompt", "revision", "dtype", "device"}
    if changed := given.keys() - ignored - {"attn_implementation", "batch_size", "max_batch_size"}:
        options = ",".join(f"{name}={given[name]}" for name in sorted(changed))
        return f"{pruner}({options})", int(given["num_tokens"])
    return pruner, int(given["num_tokens"]) + (given.get("cls_in_budget", "false").lower() == "true")


def _score(scores: dict[str, Any], metric: str, path: Path) -> float:
    for name in (f"{metric},none", metric):
        if isinstance(scores.get(name), int | float):
            return float(scores[name])
    raise UnusableError(f"{path} has no score {metric!r} among {', '.join(scores)}; take lmms-eval 0.7.3 or later")


def _digits(benchmark: str, value: float) -> str:
    return f"{value:,.0f}" if benchmark == "MME" else f"{value:.1f}"


if __name__ == "__main__":
    try:
        sys.exit(app())
    except (UnusableError, CycloptsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
