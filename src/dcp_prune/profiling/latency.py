"""What a call costs with all visual tokens, with few of them, and at the limit: time by stages, memory, operations.

Every round runs all variants in a new order, and every ratio is taken within its round before the median over rounds,
so that a clock or a neighbour that changes between rounds cancels out. A round before the first is not counted.

*The limit* keeps as many tokens and chooses them at no cost: the whole encoder, then the short prompt. A pruner that
drops tokens inside the encoder can be faster than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean, median
from typing import Any, Literal

import torch

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import ShortInputs, get_adapter, prune_inputs
from dcp_prune.integrations.transformers.images import encode
from dcp_prune.memory import free_memory, in_words
from dcp_prune.profiling.benchmark import take_turns
from dcp_prune.profiling.counting import Hollow
from dcp_prune.profiling.first_token import FirstToken, first_token, now
from dcp_prune.profiling.memory import peak_bytes
from dcp_prune.pruners.base import Pruner
from dcp_prune.pruners.uniform import UniformPruner

NONE, LIMIT = "none", "limit"
"""Names of the run without a pruner, to which ratios refer, and of the one whose selection is free."""


@dataclass(frozen=True)
class Variant:
    """One way to run the model; `pruner` is None without one, and for the limit what makes its prompt."""

    name: str
    pruner: Pruner | None
    kind: Literal["all", "pruned", "limit"]


@dataclass(frozen=True)
class Sample:
    """One run; times in milliseconds, in-encoder stages as (layer, tokens of a tile that went on)."""

    ttft: float
    encoder: float
    selection: float | None
    per_token: float | None = None
    stages: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Cost:
    """What one variant costs: medians over the rounds, of a whole batch.

    Attributes:
        pruner: its name; `none` is the model as it is, `limit` the free selection.
        num_tokens: visual tokens of an image that the language model reads, in each of its layers.
        encoder_tokens: visual tokens of an image in a layer of the encoder, mean over its layers.
        ttft_ms: time to first token, from pixels and ids to the first new id, in milliseconds.
        ttft_interval_ms: 95 % interval of that median, or the extremes where there are fewer than six rounds.
        ttft_ratio: of that time to the time without pruner, in the same round.
        limit_share: of the limit's speed that is reached: its time by this one, in the same round; None for `none`.
        encoder_ms: vision encoder with its in-encoder stages, and projector, in milliseconds.
        encoder_ratio: of that time to the same encoder pass without stages, in the same round.
        selection_ms: all that is done to choose tokens and to shorten the prompt, in milliseconds; None without.
        selection_share: of that time in the time to first token, in the same round; None without.
        prefill_ms: what is left of the time to first token.
        per_token_ms: of each further token.
        images_per_second: that get their first token.
        kv_cache_bytes: the cache after the prefill.
        peak_bytes: the most memory up to the first token beyond weights and inputs; None where nobody knows.
        prefill_flops: operations up to the first token without the selection; None where they cannot be counted.
    """

    pruner: str
    num_tokens: int
    encoder_tokens: float
    ttft_ms: float
    ttft_interval_ms: tuple[float, float]
    ttft_ratio: float
    limit_share: float | None
    encoder_ms: float
    encoder_ratio: float
    selection_ms: float | None
    selection_share: float | None
    prefill_ms: float
    per_token_ms: float | None
    images_per_second: float
    kv_cache_bytes: int
    peak_bytes: int | None
    prefill_flops: int | None


def variants(pruners: Iterable[tuple[str, Pruner]], num_tokens: int) -> list[Variant]:
    """The model as it is, each pruner, and the limit of each budget.

    Args:
        pruners: by name; one name may come with several budgets.
        num_tokens: visual tokens of an image.
    """
    given = [Variant(name, pruner, "pruned") for name, pruner in pruners]
    budgets = {each.pruner.budget.resolve(num_tokens) for each in given if each.pruner is not None}
    limits = [Variant(LIMIT, UniformPruner(num_tokens=k), "limit") for k in sorted(budgets)]
    return [Variant(NONE, None, "all"), *given, *limits]


def check_memory(hollow: Hollow, batch: int, length: int, device: str) -> None:
    """Refuses a model whose weights and whose cache of so many prompts do not fit.

    Raises:
        InvalidInputError: says how much is needed.
    """
    needed = hollow.weight_bytes + hollow.prefill(batch, length).cache_bytes
    free = free_memory(device)
    if needed > free:
        raise InvalidInputError(
            f"weights and cache of this model take {in_words(needed)} in {str(hollow.model.dtype)[6:]}, and "
            f"{in_words(free)} are free; take --dtype bfloat16, a smaller --batch, or a smaller model"
        )


@torch.no_grad()
def measure(
    model: Any,
    inputs: Mapping[str, Any],
    chosen: Sequence[Variant],
    *,
    runs: int,
    new_tokens: int = 1,
    processor: Any = None,
    progress: Callable[[Sequence[int]], Any] = iter,
) -> list[Cost]:
    """Runs all variants `runs` times interleaved, after one round to warm up and one that looks at memory.

    Args:
        model: in evaluation mode.
        inputs: prompts with one image each, of equal length.
        chosen: from `variants`; the model as it is comes first.
        runs: rounds that count.
        new_tokens: generated in each run.
        processor: as for `prune_inputs`.
        progress: wraps the sequence of rounds.
    """
    kept = {
        place: prune_inputs(model, inputs, each.pruner, processor=processor)
        for place, each in enumerate(chosen)
        if each.kind == "limit" and each.pruner is not None
    }

    def run(place: str) -> Sample:
        each = chosen[int(place)]
        return _run(model, inputs, each, kept.get(int(place)), new_tokens, processor)

    _, *rounds = take_turns(map(str, range(len(chosen))), progress(range(runs + 1)), run)
    hollow = Hollow(type(model), model.config, model.dtype)
    return [_summarise(model, hollow, inputs, chosen, place, kept.get(place), rounds, processor)
            for place in range(len(chosen))]  # fmt: skip


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Distribution-free 95 % interval of the median: two order statistics; the extremes of fewer than six values."""
    ordered, n, tail, out = sorted(values), len(values), 0.0, 0
    while (tail := tail + comb(n, out) / 2**n) <= 0.025:
        out += 1
    out = max(0, out - 1)
    return ordered[out], ordered[n - 1 - out]


def _run(
    model: Any,
    inputs: Mapping[str, Any],
    variant: Variant,
    short: ShortInputs | None,
    new_tokens: int,
    processor: Any,
) -> Sample:
    if variant.kind == "pruned":
        first = first_token(model, inputs, variant.pruner, processor=processor, new_tokens=new_tokens)
        record = first.short.record if first.short is not None else None
        assert record is not None
        spent = dict(record.milliseconds)
        encoder = spent.pop("encode", 0.0)
        return Sample(first.milliseconds, encoder, sum(spent.values()), first.per_token_ms)
    began = now(model.device)
    encode(get_adapter(model), inputs, ())
    encoder = now(model.device) - began
    first = first_token(model, inputs if short is None else short.inputs, new_tokens=new_tokens)
    # The model as it is encodes once more by itself.
    ttft = first.milliseconds if short is None else encoder + first.milliseconds
    return Sample(ttft, encoder, None, first.per_token_ms)


def _summarise(
    model: Any,
    hollow: Hollow,
    inputs: Mapping[str, Any],
    chosen: Sequence[Variant],
    place: int,
    short: ShortInputs | None,
    rounds: Sequence[Mapping[str, Sample]],
    processor: Any,
) -> Cost:
    variant = chosen[place]
    adapter = get_adapter(model)
    samples = [samples[str(place)] for samples in rounds]
    everything = [samples["0"] for samples in rounds]
    total = max(map(len, adapter.layouts(inputs)))
    kept = total if variant.pruner is None else variant.pruner.budget.resolve(total)
    limit = next((
        number for number, each in enumerate(chosen)
        if each.kind == "limit" and each.pruner is not None and each.pruner.budget.resolve(total) == kept
    ), None)  # fmt: skip
    pruner = variant.pruner if variant.kind == "pruned" else None
    encoded = encode(adapter, inputs, [pruner] if pruner else [])
    stages = tuple((stage.layer, width) for stage, width in zip(encoded.stages, encoded.stage_tokens, strict=True))
    last: list[FirstToken] = []

    def once() -> None:
        if variant.kind == "limit" and short is not None:
            encode(adapter, inputs, ())
            last.append(first_token(model, short.inputs))
        else:
            last.append(first_token(model, inputs, pruner, processor=processor))

    peak = peak_bytes(once, model.device)
    shortened = short or last[0].short
    batch, length = (inputs if shortened is None else shortened.tensors)["input_ids"].shape
    prefill = hollow.prefill(batch, length)
    encoder_flops = hollow.encoder_flops(inputs, stages)
    ttft = [sample.ttft for sample in samples]
    selections = [sample.selection for sample in samples if sample.selection is not None]
    per_token = [sample.per_token for sample in samples if sample.per_token is not None]
    rows, cols = adapter.grid(inputs[adapter.image_inputs[0]])
    return Cost(
        pruner=variant.name,
        num_tokens=kept,
        encoder_tokens=total * _mean_share(stages, adapter.num_layers, rows * cols),
        ttft_ms=median(ttft),
        ttft_interval_ms=median_interval(ttft),
        ttft_ratio=median(own / other.ttft for own, other in zip(ttft, everything, strict=True)),
        limit_share=None
        if limit is None or variant.kind == "all"
        else median(samples[str(limit)].ttft / samples[str(place)].ttft for samples in rounds),
        encoder_ms=median(sample.encoder for sample in samples),
        encoder_ratio=median(own.encoder / other.encoder for own, other in zip(samples, everything, strict=True)),
        selection_ms=median(selections) if selections else None,
        selection_share=median(selection / time for selection, time in zip(selections, ttft, strict=True))
        if selections
        else None,
        prefill_ms=median(sample.ttft - sample.encoder - (sample.selection or 0.0) for sample in samples),
        per_token_ms=median(per_token) if per_token else None,
        images_per_second=batch / median(ttft) * 1e3,
        kv_cache_bytes=last[0].cache_bytes,
        peak_bytes=peak,
        prefill_flops=None if encoder_flops is None else encoder_flops + prefill.flops,
    )


def _mean_share(stages: Sequence[tuple[int, int]], layers: int, total: int) -> float:
    """Share of its tokens that a layer of the encoder reads, mean over the layers."""
    widths, plan, width = [], dict(stages), total
    for layer in range(layers):
        widths.append(width / total)
        width = plan.get(layer, width)
    return fmean(widths)
