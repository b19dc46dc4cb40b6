"""What choosing the tokens costs by itself, each pruner beside its authors' code.

`python -m dcp_prune.profiling.selection --help` measures on this machine: one thread, features as a 7B LLaVA has them,
and from tokens to kept tokens all that a pruner does, its checks included. Pruners take turns, and of two calls in a
row the second counts, as in a loop over one method. CPU time is compared, since neighbours on a shared machine disturb
it less; wall time is reported beside it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from json import loads
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from cyclopts import App, Parameter
from torch import Tensor

from dcp_prune.environment import environment
from dcp_prune.errors import InvalidInputError
from dcp_prune.profiling.benchmark import Report, run_command, take_turns
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import list_pruners, make_pruner
from dcp_prune.tokens import VisualTokens

WORDS = 12
"""Words of the question."""
LAYERS = 23
"""Encoder layers in use by a 7B LLaVA; only to ask a pruner whether it works inside the encoder."""


@dataclass(frozen=True)
class Setting:
    """A batch of images or crops, and how many tokens of each are kept."""

    images: int
    tokens: int
    num_tokens: int


SETTINGS = (Setting(1, 576, 16), Setting(5, 576, 16), Setting(1, 2880, 80))
"""LLaVA-1.5 at 16; the five crops of LLaVA-NeXT each by itself at 80 in all; the five crops as one sequence at 80."""
TINY = (Setting(1, 64, 4), Setting(2, 64, 4))


@dataclass(frozen=True)
class Cost:
    """What one call of one pruner takes; medians over the rounds.

    Attributes:
        pruner: its name.
        images: images, or crops, in the call.
        tokens: visual tokens of each.
        num_tokens: kept of each.
        cpu_ms: CPU time of the process, in milliseconds.
        wall_ms: wall time, in milliseconds.
    """

    pruner: str
    images: int
    tokens: int
    num_tokens: int
    cpu_ms: float
    wall_ms: float


def make_tokens(images: int, tokens: int, *, width: int = 4096, encoder_width: int = 1024) -> VisualTokens:
    """Images of a few regions and noise, with every signal, always the same: float32, one question each.

    Args:
        images: b.
        tokens: n of each image.
        width: of the features after the projector, d.
        encoder_width: of those before it, v; its attention heads have 64 channels.
    """
    generator = torch.Generator().manual_seed(0)
    regions = 14

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    region = torch.randint(regions, (images, tokens), generator=generator)
    clarity = 0.5 + torch.rand(images, tokens, 1, generator=generator)

    def patches(channels: int) -> Tensor:
        return 0.7 * draw(channels) + draw(regions, channels)[region] + clarity * draw(images, tokens, channels)

    features = patches(width)
    salience = draw(regions)[region]
    return VisualTokens.from_features(
        features,
        encoder_features=patches(encoder_width),
        keys=patches(64),
        values=patches(64),
        cls_attention=(salience + draw(images, tokens)).softmax(dim=1),
        cls_value_affinity=(salience + draw(images, tokens)).softmax(dim=1),
        text=0.5 * features[:, :WORDS] + draw(images, WORDS, width),
        clip_similarity=0.2 + 0.02 * (salience + draw(images, tokens)),
    )


def measure(
    pruners: Sequence[str],
    settings: Sequence[Setting],
    *,
    runs: int,
    width: int = 4096,
    encoder_width: int = 1024,
    progress: Callable[[Sequence[int], Setting], Any] = lambda rounds, setting: rounds,
) -> list[Cost]:
    """Times every pruner once per round, in a new order each time.

    Args:
        pruners: names.
        settings: one after the other.
        runs: rounds.
        width, encoder_width: of the features after and before the projector.
        progress: wraps the sequence of a setting's rounds.
    """
    costs: list[Cost] = []
    for setting in settings:
        tokens = make_tokens(setting.images, setting.tokens, width=width, encoder_width=encoder_width)
        made = {name: make_pruner(name, num_tokens=setting.num_tokens) for name in pruners}
        rounds = list(take_turns(made, progress(range(runs), setting), lambda name: _time(made[name], tokens)))  # noqa: B023
        for name in made:
            cpu, wall = (median(times[name][clock] for times in rounds) for clock in (0, 1))
            costs.append(Cost(name, setting.images, setting.tokens, setting.num_tokens, cpu, wall))
    return costs


@torch.no_grad()
def _time(pruner: Pruner, tokens: VisualTokens) -> tuple[float, float]:
    """CPU and wall time of one call right after another, in milliseconds."""
    pruner(tokens)
    cpu, wall = time.process_time(), time.perf_counter()
    pruner(tokens)
    return (time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3


app = App(name="python -m dcp_prune.profiling.selection", help_format="plaintext", version_flags=())


@app.default
def main(
    *,
    pruner: Annotated[list[str] | None, Parameter(negative="")] = None,
    runs: int = 9,
    tiny: Annotated[bool, Parameter(negative="")] = False,
    authors: Path | None = None,
    json: Path | None = None,
) -> None:
    """Measures what choosing the tokens costs on one thread of this machine's CPU, in three settings. Takes minutes.

    Args:
        pruner: pruners to measure; may be given several times; default: all that choose after the encoder.
        runs: interleaved rounds; medians are reported.
        tiny: few and narrow tokens, which take no time, to try this command out.
        authors: file with the times of the authors' code, which the result then carries beside ours.
        json: file to write the result to.
    """
    report = Report(json, runs, reads=[] if authors is None else [authors])
    published = None if authors is None else _read_times(authors)
    names = pruner or _after_the_encoder(list_pruners(), report.say)
    widths = {"width": 64, "encoder_width": 32} if tiny else {"width": 4096, "encoder_width": 1024}

    def progress(rounds: Sequence[int], setting: Setting) -> Any:
        return report.track(rounds, f"{setting.images} x {setting.tokens} tokens, {runs} rounds")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        costs = measure(names, TINY if tiny else SETTINGS, runs=runs, progress=progress, **widths)
        made_in = environment()
    finally:
        torch.set_num_threads(threads)
    settings = list(dict.fromkeys((cost.images, cost.tokens, cost.num_tokens) for cost in costs))
    found = {(cost.pruner, (cost.images, cost.tokens, cost.num_tokens)): cost for cost in costs}
    report.finish(
        "CPU ms / wall ms of one call, one thread",
        [f"{images} x {tokens}, {kept} each" for images, tokens, kept in settings],
        (
            [name, *(f"{cost.cpu_ms:,.1f} / {cost.wall_ms:,.1f}" for at in settings for cost in (found[name, at],))]
            for name in names
        ),
        costs,
        description=(
            f"Checks and selection of one call: float32, {widths['width']} channels after the projector and "
            f"{widths['encoder_width']} before it, {WORDS} words, {runs} interleaved rounds."
        ),
        words=WORDS,
        authors=published,
        environment=made_in,
        **widths,
    )


def _read_times(path: Path) -> dict[str, Any]:
    """A file of times as it stands, if it holds any."""
    try:
        found = loads(path.read_text(encoding="utf-8"))
        for row in found["results"]:
            Cost(**{field.name: row[field.name] for field in fields(Cost)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{path} holds no times to compare with ({error!r}); give another --authors") from error
    return found


def _after_the_encoder(names: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Those that do not work inside the encoder, where selecting cannot be told from encoding; says which do."""
    kept: list[str] = []
    for name in names:
        if make_pruner(name, num_tokens=SETTINGS[0].num_tokens).encoder_stages(SETTINGS[0].tokens, LAYERS):
            say(f"left out {name}: it works inside the encoder; `make bench` times it there")
        else:
            kept.append(name)
    return kept


def run(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(app, arguments)


if __name__ == "__main__":
    sys.exit(run())
