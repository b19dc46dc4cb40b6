"""How time and memory of choosing tokens grow with the tokens, with how many are kept, and with the images.

`python -m dcp_prune.profiling.growth --help`. All sizes take turns in every round, and times are ratios to those of the
smallest size in the same round, so that what else the machine does cancels out.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any, Literal

import torch
from cyclopts import App, Parameter

from dcp_prune.profiling.benchmark import Report, run_command, take_turns
from dcp_prune.profiling.memory import peak_bytes
from dcp_prune.profiling.selection import Setting, make_tokens
from dcp_prune.registry import make_pruner

Along = Literal["tokens", "kept", "images"]

PRUNERS = ("dcp", "scope", "divprune", "cls_attention")
SIZES: Mapping[Along, Sequence[Setting]] = {
    "tokens": [Setting(1, n, 16) for n in (144, 576, 2304, 9216)],
    "kept": [Setting(1, 576, k) for k in (4, 16, 64, 256)],
    "images": [Setting(b, 576, 16) for b in (1, 4, 16, 64)],
}
TINY: Mapping[Along, Sequence[Setting]] = {
    "tokens": [Setting(1, n, 4) for n in (16, 64)],
    "kept": [Setting(1, 64, k) for k in (2, 8)],
    "images": [Setting(b, 64, 4) for b in (1, 4)],
}


@dataclass(frozen=True)
class Growth:
    """How one pruner grows along one size; medians over the rounds.

    Attributes:
        pruner: its name.
        along: what grows: `tokens` of an image, those that are `kept`, or `images`.
        sizes: of that, ascending.
        time_ratios: CPU time to that of the first size, in the same round.
        peak_bytes: the most memory beyond the tokens themselves, of each size; None where nobody knows.
        time_exponent: of the power law that fits the times best, over all but the first size.
        memory_exponent: the same of memory; None where nobody knows or too little is taken to be seen.
    """

    pruner: str
    along: Along
    sizes: tuple[int, ...]
    time_ratios: tuple[float, ...]
    peak_bytes: tuple[int | None, ...]
    time_exponent: float
    memory_exponent: float | None


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the straight line through the logarithms, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = fmean(x), fmean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def measure(
    pruners: Sequence[str],
    sizes: Mapping[Along, Sequence[Setting]],
    *,
    runs: int,
    width: int = 4096,
    encoder_width: int = 1024,
    progress: Callable[[Sequence[int], str], Any] = lambda rounds, what: rounds,
) -> list[Growth]:
    """Times every pruner along every size, and looks at its memory once.

    Args:
        pruners: names.
        sizes: by what grows.
        runs: rounds.
        width, encoder_width: of the features after and before the projector.
        progress: wraps the rounds of what grows.
    """
    grown = []
    for along, settings in sizes.items():
        tokens = [make_tokens(each.images, each.tokens, width=width, encoder_width=encoder_width) for each in settings]
        calls = {
            f"{pruner} {place}": (make_pruner(pruner, num_tokens=each.num_tokens), tokens[place])
            for pruner in pruners
            for place, each in enumerate(settings)
        }

        @torch.no_grad()
        def clock(name: str, calls: Any = calls) -> float:
            pruner, given = calls[name]
            began = time.process_time()
            pruner(given)
            return time.process_time() - began

        _, *rounds = take_turns(calls, progress(range(runs + 1), along), clock)
        for pruner in pruners:
            names = [f"{pruner} {place}" for place in range(len(settings))]
            peaks = [_peak(*calls[name]) for name in names]
            grown.append(_summarise(pruner, along, settings, names, rounds, peaks))
    return grown


@torch.no_grad()
def _peak(pruner: Any, tokens: Any) -> int | None:
    return peak_bytes(lambda: pruner(tokens), torch.device("cpu"))


def _summarise(
    pruner: str,
    along: Along,
    settings: Sequence[Setting],
    names: Sequence[str],
    rounds: Sequence[Mapping[str, float]],
    peaks: Sequence[int | None],
) -> Growth:
    sizes = [{"tokens": each.tokens, "kept": each.num_tokens, "images": each.images}[along] for each in settings]
    ratios = [median(times[name] / times[names[0]] for times in rounds) for name in names]
    start = 1 if len(sizes) > 2 else 0  # the smallest size is mostly the cost of calling at all
    known = [(size, peak) for size, peak in zip(sizes[start:], peaks[start:], strict=True) if peak]
    return Growth(
        pruner=pruner,
        along=along,
        sizes=tuple(sizes),
        time_ratios=tuple(ratios),
        peak_bytes=tuple(peaks),
        time_exponent=exponent(sizes[start:], ratios[start:]),
        memory_exponent=exponent(*zip(*known, strict=True)) if len(known) > 1 else None,
    )


app = App(name="python -m dcp_prune.profiling.growth", help_format="plaintext", version_flags=())


@app.default
def main(
    *,
    pruner: Annotated[list[str] | None, Parameter(negative="")] = None,
    runs: int = 3,
    tiny: Annotated[bool, Parameter(negative="")] = False,
    json: Path | None = None,
) -> None:
    """Measures how choosing tokens grows, on one thread of this machine's CPU. Takes minutes, and 3 GB of memory.

    Args:
        pruner: pruners to measure; may be given several times; default: dcp, scope, divprune and cls_attention.
        runs: interleaved rounds; medians are reported.
        tiny: small sizes, which take no time, to try this command out.
        json: file to write the result to.
    """
    report = Report(json, runs)
    widths = {"width": 64, "encoder_width": 32} if tiny else {"width": 4096, "encoder_width": 1024}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        grown = measure(pruner or PRUNERS, TINY if tiny else SIZES, runs=runs, progress=report.track, **widths)
    finally:
        torch.set_num_threads(threads)
    report.finish(
        "time and memory ~ size ** exponent, one thread",
        ("grows", "time exponent", "memory exponent", "at the largest, MiB"),
        (
            [
                each.pruner,
                f"{each.along} {each.sizes[0]:,} to {each.sizes[-1]:,}",
                f"{each.time_exponent:.2f}",
                "" if each.memory_exponent is None else f"{each.memory_exponent:.2f}",
                "" if each.peak_bytes[-1] is None else f"{each.peak_bytes[-1] / 2**20:,.0f}",
            ]
            for each in grown
        ),
        grown,
        description=(
            f"Checks and selection of one call: float32, {widths['width']} channels after the projector and "
            f"{widths['encoder_width']} before it, one thread, {runs} interleaved rounds on a machine with other work."
        ),
        **widths,
    )


def run(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(app, arguments)


if __name__ == "__main__":
    sys.exit(run())
