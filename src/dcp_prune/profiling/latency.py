"""Time to the first new token of a LLaVA with random weights: what pruning saves, and what selecting costs.

`python -m dcp_prune.profiling.latency --help` measures on this machine. Every round runs all pruners in a new order,
and every ratio is taken within its round before the median over rounds, so that a clock or a neighbour that changes
between rounds cancels out. Random weights cost what trained ones do: no step of any pruner depends on what tokens say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, cast

import torch
from cyclopts import App, Parameter
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dcp_prune.errors import MissingSignalError
from dcp_prune.integrations.transformers import encode_images, prune_inputs
from dcp_prune.profiling.benchmark import Report, run_command, take_turns
from dcp_prune.profiling.first_token import first_token, now
from dcp_prune.profiling.flops import llava_prefill_flops
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import list_pruners, make_pruner

NONE = "none"
"""Name of the run without a pruner, to which all ratios refer."""
TEXT_TOKENS = 40
"""Tokens of the prompt beside the image: a short system prompt and a question."""


@dataclass(frozen=True)
class Cost:
    """What one pruner costs: medians over the rounds.

    Attributes:
        pruner: its name; `none` is the model as it is.
        num_tokens: visual tokens that the language model reads.
        ttft_ms: time to first token, from pixels and ids to the first new id, in milliseconds.
        ttft_ratio: of that time to the time without pruner, in the same round.
        encoder_ms: vision encoder with its in-encoder stages, and projector, in milliseconds.
        encoder_ratio: of that time to the same encoder pass without stages, in the same round.
        selection_ms: all that is done to choose tokens and to shorten the prompt, in milliseconds; None for `none`.
        selection_share: of that time in the time to first token, in the same round; None for `none`.
        kv_cache_bytes: the cache after the prefill.
        prefill_flops: operations of the prefill without the selection.
    """

    pruner: str
    num_tokens: int
    ttft_ms: float
    ttft_ratio: float
    encoder_ms: float
    encoder_ratio: float
    selection_ms: float | None
    selection_share: float | None
    kv_cache_bytes: int
    prefill_flops: int


@dataclass(frozen=True)
class Sample:
    """One run of one pruner; times in milliseconds, in-encoder stages as (layer, tokens that went on)."""

    ttft: float
    encoder: float
    selection: float | None
    cache_bytes: int
    stages: tuple[tuple[int, int], ...] = ()


def build_config(*, tiny: bool = False) -> LlavaConfig:
    """CLIP ViT-L/14-336 and a Llama of one billion parameters; `tiny` has the same parts in sizes that take no time."""
    if tiny:
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=56,
            patch_size=7,
        )
        text = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
        )
    else:
        vision = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        )
        text = LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32064,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=text.vocab_size - 1)


def build_model(config: LlavaConfig, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """The model with random weights, always the same ones; in evaluation mode."""
    torch.manual_seed(0)
    return LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()


def make_inputs(model: Any) -> dict[str, torch.Tensor]:
    """One prompt with one image: some words, the image, more words; all random, always the same."""
    generator = torch.Generator().manual_seed(0)
    size, patches = _image(model.config)
    words = torch.randint(3, model.config.image_token_id, (1, TEXT_TOKENS), generator=generator)
    image = torch.full((1, patches), model.config.image_token_id)
    input_ids = torch.cat((words[:, :8], image, words[:, 8:]), dim=1)
    pixel_values = torch.randn(1, 3, size, size, generator=generator).to(model.dtype)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixel_values}
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


@torch.no_grad()
def measure(
    model: Any,
    inputs: Mapping[str, Any],
    pruners: Mapping[str, Pruner],
    *,
    runs: int,
    progress: Callable[[Sequence[int]], Any] = iter,
) -> list[Cost]:
    """Runs the model without a pruner and with each of them, `runs` times interleaved, after one round to warm up.

    Args:
        model: a LLaVA in evaluation mode.
        inputs: one prompt with one image.
        pruners: by the names that the result shall carry.
        runs: rounds that count.
        progress: wraps the sequence of rounds.
    """
    variants: dict[str, Pruner | None] = {NONE: None, **pruners}
    _, *rounds = take_turns(variants, progress(range(runs + 1)), lambda name: _run(model, inputs, variants[name]))
    return [_summarise(model.config, name, pruner, rounds) for name, pruner in variants.items()]


def _run(model: Any, inputs: Mapping[str, Any], pruner: Pruner | None) -> Sample:
    begin = now(model.device)
    encoded = encode_images(model, inputs["pixel_values"], *([pruner] if pruner else []))
    encoder = now(model.device) - begin
    first = first_token(model, inputs, pruner)
    record = None if first.short is None else first.short.record
    selection = None
    if record is not None:
        selection = sum(span for name, span in record.milliseconds.items() if name != "encode")
    stages = tuple((stage.layer, kept) for stage, kept in zip(encoded.stages, encoded.stage_tokens, strict=True))
    return Sample(first.milliseconds, encoder, selection, first.cache_bytes, stages)


def _summarise(config: LlavaConfig, name: str, pruner: Pruner | None, rounds: Sequence[Mapping[str, Sample]]) -> Cost:
    samples = [samples[name] for samples in rounds]
    _, patches = _image(config)
    kept = patches if pruner is None else pruner.budget.resolve(patches)
    # The model computes its whole encoder; a pruned call stops at the layer whose features are read.
    used = cast(Any, config.vision_config).num_hidden_layers + 1 + cast(int, config.vision_feature_layer)
    flops = llava_prefill_flops(
        config,
        text_tokens=TEXT_TOKENS,
        visual_tokens=kept,
        stages=samples[0].stages,
        encoder_layers=None if pruner is None else used,
    )
    selections = [(sample.selection, sample.ttft) for sample in samples if sample.selection is not None]
    return Cost(
        pruner=name,
        num_tokens=kept,
        ttft_ms=median(sample.ttft for sample in samples),
        ttft_ratio=median(samples[name].ttft / samples[NONE].ttft for samples in rounds),
        encoder_ms=median(sample.encoder for sample in samples),
        encoder_ratio=median(samples[name].encoder / samples[NONE].encoder for samples in rounds),
        selection_ms=median(selection for selection, _ in selections) if selections else None,
        selection_share=median(selection / ttft for selection, ttft in selections) if selections else None,
        kv_cache_bytes=samples[0].cache_bytes,
        prefill_flops=flops.total,
    )


def _image(config: LlavaConfig) -> tuple[int, int]:
    """Side of the image in pixels, and its patches."""
    vision = cast(Any, config.vision_config)
    return vision.image_size, (vision.image_size // vision.patch_size) ** 2


app = App(name="python -m dcp_prune.profiling.latency", help_format="plaintext", version_flags=())


@app.default
def main(
    *,
    pruner: Annotated[list[str] | None, Parameter(negative="")] = None,
    num_tokens: int = 16,
    runs: int = 7,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    threads: int | None = None,
    tiny: Annotated[bool, Parameter(negative="")] = False,
    json: Path | None = None,
) -> None:
    """Measures the time to first token of CLIP ViT-L/14-336 with a 1B-parameter Llama, random weights, on this machine.

    Takes minutes, and memory for the weights: about 6 GB in float32, half of it in bfloat16.

    Args:
        pruner: pruners to measure; may be given several times; default: all that this model can serve.
        num_tokens: visual tokens that each of them keeps.
        runs: interleaved rounds; medians are reported.
        dtype: of the weights.
        device: where the model runs.
        threads: threads of torch; default: as torch decides.
        tiny: a model of the same parts that takes no time, to try this command out.
        json: file to write the result to.
    """
    report = Report(json, runs)
    pruners = {name: make_pruner(name, num_tokens=num_tokens) for name in pruner or list_pruners()}
    if threads is not None:
        torch.set_num_threads(threads)
    config = build_config(tiny=tiny)
    with report.console.status("building the model with random weights"):
        model = build_model(config, getattr(torch, dtype)).to(device)  # type: ignore[arg-type]
    inputs = make_inputs(model)
    if pruner is None:
        pruners = _usable(model, inputs, pruners, report.say)
    progress = partial(report.track, what=f"{runs} rounds and one to warm up")
    costs = measure(model, inputs, pruners, runs=runs, progress=progress)
    size = "a tiny LLaVA" if tiny else "CLIP ViT-L/14-336 and a 1B-parameter Llama"
    report.finish(
        f"{num_tokens} of {costs[0].num_tokens} visual tokens, {dtype}, medians of {runs} rounds",
        ("TTFT ms", "ratio", "encoder ms", "ratio", "selecting ms", "share", "KV MiB"),
        map(_row, costs),
        costs,
        description=(
            f"{size}, random weights, {dtype}, one image and {TEXT_TOKENS} text tokens, {runs} interleaved rounds."
        ),
        parameters=sum(tensor.numel() for tensor in model.parameters()),
        dtype=dtype,
        device=device,
        text_tokens=TEXT_TOKENS,
    )


@torch.no_grad()
def _usable(
    model: Any, inputs: Mapping[str, Any], pruners: Mapping[str, Pruner], say: Callable[[str], None]
) -> dict[str, Pruner]:
    """Those of the pruners whose signals this model gives; says which ones are left out, and why."""
    usable: dict[str, Pruner] = {}
    for name, pruner in pruners.items():
        try:
            prune_inputs(model, inputs, pruner)
        except MissingSignalError as error:
            say(f"left out {name}: {error}")
        else:
            usable[name] = pruner
    return usable


def _row(cost: Cost) -> list[str]:
    return [
        cost.pruner,
        f"{cost.ttft_ms:,.0f}",
        f"{cost.ttft_ratio:.3f}",
        f"{cost.encoder_ms:,.0f}",
        f"{cost.encoder_ratio:.3f}",
        "" if cost.selection_ms is None else f"{cost.selection_ms:.1f}",
        "" if cost.selection_share is None else f"{cost.selection_share:.2%}",
        f"{cost.kv_cache_bytes / 2**20:.2f}",
    ]


def run(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(app, arguments)


if __name__ == "__main__":
    sys.exit(run())
