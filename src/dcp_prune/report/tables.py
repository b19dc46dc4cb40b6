"""Markdown tables from result files, for the marks of a document that `pages` draws."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dcp_prune.errors import InvalidInputError

Result = Mapping[str, Any]
"""A result file: `results`, a list of rows, and the `environment` that they were measured in."""

NONE = "none"
"""Pruner of the rows that were not pruned."""


def cost(result: Result) -> str:
    """What one image costs up to the first new token, each pruner against no pruning: medians of interleaved runs."""
    header = ["pruner", "visual tokens", "time to first token", "speed-up", "of it selection", "KV cache", "prefill"]
    body = [
        [
            _name(row),
            str(row["num_tokens"]),
            f"{row['ttft_ms']:,.0f} ms",
            f"{1 / row['ttft_ratio']:.2f} x",
            "" if row["selection_share"] is None else f"{row['selection_share']:.1%}".replace("%", " %"),
            f"{row['kv_cache_bytes'] / 2**20:.2f} MiB",
            f"{row['prefill_flops'] / 1e9:,.0f} GFLOP",
        ]
        for row in result["results"]
    ]
    return _markdown(header, body)


def published(result: Result) -> str:
    """Mean share of the unpruned score as the paper reports it, in per cent, for LLaVA-1.5-7B: not measured here."""
    model = result["llava-1.5-7b"]
    budgets = sorted((key for key in model if key.isdigit()), key=int, reverse=True)
    smallest = model[budgets[-1]]
    names = sorted(smallest, key=lambda name: smallest[name][-1], reverse=True)
    body = [[name, *(f"{model[budget][name][-1]:.1f}" for budget in budgets)] for name in names]
    return _markdown(["method", *(f"{budget} tokens" for budget in budgets)], body)


def selection(result: Result) -> str:
    """What choosing tokens costs by itself: CPU ms (wall ms) of each pruner, its authors' code, and which is faster."""
    times, theirs = _times(result["results"]), _times((result.get("authors") or {"results": []})["results"])
    settings = list(dict.fromkeys(setting for _, setting in times))
    header = ["pruner"]
    for images, tokens, kept in settings:
        header += [f"{images} x {tokens}, {kept} each: ours", "authors'", "verdict"]
    body = []
    for name in sorted({name for name, _ in times}):
        cells = [f"`{name}`"]
        for setting in settings:
            ours, other = times.get((name, setting)), theirs.get((name, setting))
            cells += [_clocks(ours), _clocks(other), "" if ours is None or other is None else _verdict(ours, other)]
        body.append(cells)
    return _markdown(header, body)


def operators(result: Result) -> str:
    """How many operators choosing the tokens of one image dispatches."""
    header = ["pruner", "tokens", "kept", "dispatched", "launches", "launches, loops fused"]
    names = ("tokens", "num_tokens", "dispatched", "launches", "fused")
    body = [[f"`{row['pruner']}`", *(f"{row[name]:,}" for name in names)] for row in result["results"]]
    return _markdown(header, body)


def growth(result: Result) -> str:
    """How time and memory of choosing tokens grow: exponents, and the largest size against the smallest."""
    header = ["pruner", "what grows", "time exponent", "time, largest to smallest", "memory exponent", "at the largest"]
    body = [
        [
            f"`{row['pruner']}`",
            f"{row['along']}: {', '.join(f'{size:,}' for size in row['sizes'])}",
            f"{row['time_exponent']:.2f}",
            f"{row['time_ratios'][-1]:,.1f} x",
            "" if row["memory_exponent"] is None else f"{row['memory_exponent']:.2f}",
            f"{row['peak_bytes'][-1] / 2**20:,.0f} MiB" if row["peak_bytes"][-1] else "",
        ]
        for row in result["results"]
    ]
    return _markdown(header, body, texts=2)


def models(result: Result) -> str:
    """What each model class supports."""
    header = ["model class", "images", "videos", "tiles", "inside the encoder", "saliency from", "refused pruners"]
    flags = ("images", "videos", "tiles", "in_encoder")
    body = [
        [
            f"`{row['name'].replace('ForConditionalGeneration', '')}`",
            *({True: "yes", False: "no"}.get(row[flag], row[flag]) for flag in flags),
            row["saliency"],
            ", ".join(f"`{name}`" for name in row["refused_pruners"]),
        ]
        for row in result["models"]
    ]
    return _markdown(header, body)


def pruners(result: Result) -> str:
    """What each pruner keeps, and where to read on: `dcp` first, then what was published, the floors last."""

    def links(row: Result) -> str:
        page = "dcp" if row["name"].startswith("dcp") else row["name"]
        where, _, number = (row["paper"] or "").partition(" ")
        paper = f"[paper](https://arxiv.org/abs/{number})" if where == "arXiv" else row["paper"] or ""
        return f"[how](docs/methods/{page}.md) [source]({row['source']}) {paper}".strip()

    def place(row: Result) -> tuple[bool, bool, str]:
        return row["paper"] is None, not row["name"].startswith("dcp"), row["name"]

    rows = [[f"`{row['name']}`", row["summary"], links(row)] for row in sorted(result["pruners"], key=place)]
    return _markdown(["name", "what it keeps", ""], rows, texts=3)


def vllm(result: Result) -> str:
    """Stock vLLM, the plug-in with nothing pruned, and pruned: medians of interleaved runs, and their ratios to
    stock vLLM, taken within a round, with 95 % intervals."""
    loads = list(dict.fromkeys(load for row in result["results"] for load in row["throughput"]))
    header = ["model", "server", "visual tokens", "time to first token", "whole request"]
    header += [f"requests/s, {load} at a time" for load in loads]
    names = {
        "stock": "stock vLLM",
        "stock again": "stock vLLM, a second server",
        "all": "plug-in, nothing pruned",
        "pruned": "plug-in, pruned",
        "no picture": "stock vLLM, no picture",
    }

    def cell(value: str, found: Mapping[str, Any], digits: int) -> str:
        low, high = found["ratio_ci95"]
        is_base = found["ratio"] == low == high == 1
        return value if is_base else f"{value}: {found['ratio']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    body = []
    for row in result["results"]:
        times = [cell(f"{row[name]['milliseconds']:,.0f} ms", row[name], 3) for name in ("ttft", "request")]
        rates = [
            cell(f"{found['requests_per_second']:.1f}", found, 2) if (found := row["throughput"].get(load)) else ""
            for load in loads
        ]
        body.append([row["model"], names[row["arm"]], str(row["num_tokens"]), *times, *rates])
    return _markdown(header, body)


def vllm_answers(result: Result) -> str:
    """Accuracy through vLLM and through transformers, and every question that the two answer otherwise."""
    header = ["pruner", "visual tokens", "equal answers", "accuracy in vLLM", "in transformers", "difference"]
    body, differing = [], []
    for row in result["results"]:
        difference = row["difference"]
        low, high = (100 * difference[bound] for bound in ("low", "high"))
        body.append(
            [
                _name(row),
                str(row["num_tokens"]),
                f"{row['equal']:,} of {row['questions']:,}",
                *(f"{100 * row['accuracy'][engine]['mean']:.1f}" for engine in ("vllm", "transformers")),
                f"{100 * difference['mean']:+.1f} [{low:+.1f}, {high:+.1f}]",
            ]
        )
        differing += [[_name(row), *_other_answers(each)] for each in row["differing"]]
    asked = result["questions"]
    about = f"{asked['questions']:,} {asked['split']} questions about {asked['images']} {asked['difficulty']} pictures"
    parts = [
        _markdown(header, body),
        f"<sub>Accuracy in per cent, paired difference with its 95 % interval; {about}.</sub>",
    ]
    if differing:
        titles = ["pruner", "question", "", "right", "vLLM", "transformers", "lead of vLLM's answer there"]
        parts.append(_markdown(titles, differing))
    return "\n\n".join(parts)


def _other_answers(row: Result) -> list[str]:
    lead = f"{row['logprob_gap']:.1e} in logprob"
    return [row["question"], row["text"], row["right"], row["vllm"], row["transformers"], lead]


def soak(result: Result) -> str:
    """What was asked of one server for long, whether the answers were right, and what became of its memory."""
    body = [
        [
            name,
            f"{kind['asked']:,}",
            f"{kind['as_expected']:,}",
            f"{kind['median_seconds']:.2f} s",
            "" if kind["p95_seconds"] is None else f"{kind['p95_seconds']:.2f} s",
        ]
        for name, kind in result["kinds"].items()
    ]
    memory = result["resident_mib"]
    table = _markdown(["requests", "asked", "as expected", "median", "95th percentile"], body)
    claims = "; ".join(f"{claim}: {'yes' if holds else '**no**'}" for claim, holds in result["holds"].items())
    return (
        f"{table}\n\n{result['requests']:,} of {result['planned_requests']:,} planned requests in "
        f"{result['seconds'] / 60:.1f} minutes, {result['concurrency']} at a time. Resident memory after "
        f"{memory['warm_up_requests']:,} requests {memory['after_warm_up']:,.0f} MiB, at the end "
        f"{memory['at_end']:,.0f} MiB, at most {memory['largest']:,.0f} MiB. Largest difference of a logprob from "
        f"transformers: {result['largest_logprob_difference']:.1e}. Asked once more, as OpenAI's client does after "
        f"status 500 or a broken connection: {sum(result['asked_again'].values())}; images that vLLM's processes "
        f"disagreed about having in their caches: {result['cache_misses_of_vllm']}. {claims}."
    )


TABLES: Mapping[str, Callable[[Result], str]] = {
    "cost": cost,
    "growth": growth,
    "operators": operators,
    "models": models,
    "pruners": pruners,
    "published": published,
    "selection": selection,
    "soak": soak,
    "vllm": vllm,
    "vllm-answers": vllm_answers,
}
"""Name in a document's mark -> what draws the table."""


def draw_table(kind: str, name: str, folder: Path) -> str:
    """A result file's table with a line on where it comes from; a file that is not there yet is said to be missing.

    Raises:
        InvalidInputError: the file holds no such results.
    """
    path = folder / name
    if not path.is_file():
        return f"*Not measured yet: no `{name}`.*"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        drawn = TABLES[kind](result)
        return f"{drawn}\n\n{_source(name, result)}" if kind not in ("models", "pruners") else drawn
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{path} holds no {kind} results ({error!r}); write it anew") from error


def _source(name: str, result: Result) -> str:
    """One line that says where the numbers come from."""
    if "source" in result:
        return f"<sub>{result['source']}. Data: [`{name}`]({name}).</sub>"
    environment = result["environment"]
    packages = [name for name in ("torch", "transformers", "vllm") if name in environment["packages"]]
    versions = ", ".join(f"{name} {environment['packages'][name]}" for name in packages)
    device = " + ".join([*environment["gpus"], f"{environment['cpu']}, {environment['threads']} threads"])
    about = f"{result['description']} " if "description" in result else ""
    return f"<sub>{about}Source: [`{name}`]({name}); {versions}; {device}.</sub>"


def _name(row: Result) -> str:
    return "all tokens" if row["pruner"] == NONE else f"`{row['pruner']}`"


def _times(rows: Sequence[Result]) -> dict[tuple[str, tuple[int, int, int]], Result]:
    return {(row["pruner"], (row["images"], row["tokens"], row["num_tokens"])): row for row in rows}


def _clocks(row: Result | None) -> str:
    return "" if row is None else f"{_brief(row['cpu_ms'])} ({_brief(row['wall_ms'])}){'*' * ('one_sequence' in row)}"


def _brief(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 9.95 else f"{milliseconds:.1f}"


def _verdict(ours: Result, theirs: Result) -> str:
    """By CPU time; within a twentieth the two are called equal."""
    factor = theirs["cpu_ms"] / ours["cpu_ms"]
    if 0.95 <= factor <= 1.05:
        return "equal"
    return f"{factor:.1f} x faster" if factor > 1 else f"{1 / factor:.1f} x slower"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """The first columns, as many as hold text, read from the left, numbers from the right."""
    rule = [*["---"] * texts, *["---:"] * (len(header) - texts)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))
