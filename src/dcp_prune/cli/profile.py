"""`profile`: what pruning saves and costs, measured on this machine or counted beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from dcp_prune.cli.common import (
    Budgets,
    Json,
    Whole,
    app,
    check_outputs,
    environment_now,
    note,
    progress_bar,
    report_result,
    whole_numbers,
)
from dcp_prune.errors import InvalidInputError
from dcp_prune.files import write_atomically

if TYPE_CHECKING:
    from dcp_prune.pruners.base import Pruner

RANDOM = "random:"
DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("sdpa", "eager", "flash_attention_2")


@app.command
def profile(
    *,
    model: Annotated[
        str,
        Parameter(
            help="testbed, a model's folder, its hub name, or random:NAME for an architecture with random weights: "
            "random:tiny, random:vit-l-1b, random:llava-1.5-7b, random:llava-next-7b, random:qwen2.5-vl-7b."
        ),
    ] = "testbed",
    pruner: Annotated[
        list[str] | None,
        Parameter(
            negative="", help="A pruner as name or name(field=value, ...); several times for several; if not said: dcp."
        ),
    ] = None,
    num_tokens: Annotated[
        list[str] | None, Budgets, Parameter(help="Visual tokens to keep, with commas between them; if not said: 16.")
    ] = None,
    batch: Annotated[int, Whole, Parameter(help="Prompts at once, with one image each.")] = 1,
    question_length: Annotated[int, Whole, Parameter(help="Tokens of a prompt beside its image, about.")] = 40,
    new_tokens: Annotated[int, Whole, Parameter(help="Tokens to generate; the first one is timed apart.")] = 9,
    runs: Annotated[int, Whole, Parameter(help="Rounds that count; all variants run in each of them.")] = 7,
    dtype: Annotated[
        str | None, Parameter(help="Of the weights: float32, bfloat16 or float16; if not said: float32.")
    ] = None,
    device: Annotated[str, Parameter(help="Where the model runs, such as cpu or cuda.")] = "cpu",
    attention: Annotated[str, Parameter(help="sdpa, eager or flash_attention_2.")] = "sdpa",
    threads: Annotated[int | None, Whole, Parameter(help="Of torch within one operation.")] = None,
    dry_run: Annotated[
        list[Path] | None,
        Parameter(
            negative="",
            consume_multiple=True,
            help="Run nothing: count what these pictures cost, from the model's config and processor alone.",
        ),
    ] = None,
    plot: Annotated[Path | None, Parameter(help="Draw the times by stages, as PNG.")] = None,
    json: Json = None,
) -> None:
    """What pruning saves and costs: time by stages, memory and operations, with all visual tokens and with few.

    Beside each number of tokens stands the limit: as many tokens, chosen at no cost behind the whole encoder. All
    variants take turns, and ratios are taken within a round. With --dry-run nothing runs and no weights are needed.
    """
    budgets = whole_numbers(num_tokens or ["16"])
    given = {
        "--num-tokens": min(budgets),
        "--batch": batch,
        "--new-tokens": new_tokens,
        "--runs": runs,
        "--threads": 1 if threads is None else threads,
    }
    for option, value in given.items():
        if value < 1:
            raise InvalidInputError(f"{option} must be at least 1, got {value}")
    if question_length < 3:
        raise InvalidInputError(f"--question-length must be at least 3, got {question_length}")
    for option, value, known in (("--dtype", dtype or DTYPES[0], DTYPES), ("--attention", attention, ATTENTION)):
        if value not in known:
            raise InvalidInputError(f"{option} {value} is unknown; use {', '.join(known)}")
    if plot is not None and plot.suffix != ".png":
        raise InvalidInputError(f"--plot writes PNG, got {plot}; give a name that ends in .png")
    check_outputs(json, plot, inputs=(*([] if model.startswith(RANDOM) else [model]), *(dry_run or ())))
    from dcp_prune.eval.specs import plan

    methods = [
        (each.name, each.pruner) for each in plan(list(dict.fromkeys(pruner or ["dcp"])), budgets) if each.pruner
    ]
    if dry_run is not None:
        _count(model, methods, dry_run, question_length, dtype, json)
    else:
        _measure(
            model, methods, batch, question_length, new_tokens, runs, dtype, device, attention, threads, plot, json
        )


def _check_device(device: str, attention: str) -> None:
    import torch
    from transformers.utils import is_flash_attn_2_available

    try:
        kind = torch.device(device)
    except RuntimeError:
        raise InvalidInputError(f"--device {device} is unknown; use cpu or cuda") from None
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise InvalidInputError(
            f"--device {device} asks for a GPU, and torch sees {torch.cuda.device_count()} of them here; "
            "leave it out to run on the CPU"
        )
    if attention == "flash_attention_2" and not (kind.type == "cuda" and is_flash_attn_2_available()):
        raise InvalidInputError(
            "--attention flash_attention_2 needs a GPU and the package flash-attn; use sdpa, which every machine has"
        )


def _measure(
    name: str,
    methods: Sequence[tuple[str, Pruner]],
    batch: int,
    question_length: int,
    new_tokens: int,
    runs: int,
    dtype_name: str | None,
    device: str,
    attention: str,
    threads: int | None,
    plot: Path | None,
    json: Path | None,
) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    _check_device(device, attention)
    if plot is not None:
        import_module("dcp_prune.viz.plots")  # says at once if matplotlib is missing
    from dcp_prune.assistant import Assistant, Blueprint
    from dcp_prune.integrations.transformers import get_adapter
    from dcp_prune.memory import in_words
    from dcp_prune.profiling.architectures import build_model, get_architecture, make_inputs, move
    from dcp_prune.profiling.counting import Hollow
    from dcp_prune.profiling.latency import check_memory, measure, variants

    if threads is not None:
        torch.set_num_threads(threads)
    dtype: torch.dtype = getattr(torch, dtype_name or DTYPES[0])
    if name.startswith(RANDOM):
        architecture = get_architecture(name.removeprefix(RANDOM))
        config = architecture.config()
        hollow, processor = Hollow(_class_of(config), config, dtype), None
        inputs = make_inputs(hollow.model, architecture, batch=batch, text_tokens=question_length)
        load = partial(build_model, config, dtype, attention, device)
    else:
        blueprint = Blueprint.find(name)
        hollow, processor = Hollow(blueprint.kind, blueprint.config, dtype), blueprint.processor
        inputs = _question(Assistant(name, hollow.model, processor), batch, question_length)
        load = partial(blueprint.load, dtype=dtype, attention=attention, device=device)
    total = max(map(len, get_adapter(hollow.model).layouts(inputs)))
    for label, each in methods:
        if each.budget.fewest(total) >= total:
            raise InvalidInputError(
                f"{label} would keep all {total:,} visual tokens of an image, so nothing is pruned; lower --num-tokens"
            )
    check_memory(hollow, batch, inputs["input_ids"].shape[1], device)
    note(f"{name} takes {in_words(hollow.weight_bytes)} of memory for its weights in {str(dtype)[6:]}")
    with progress_bar("Loading the model", then="Measuring in rounds") as advance:
        model: Any = load()
        inputs = move(inputs, model)
        chosen = variants(methods, total)

        def rounds(numbers: Sequence[int]) -> Any:
            for number in numbers:
                advance(number, len(numbers))
                yield number

        costs = measure(model, inputs, chosen, runs=runs, new_tokens=new_tokens, processor=processor, progress=rounds)
    text_tokens = inputs["input_ids"].shape[1] - total
    result: dict[str, Any] = {
        "description": (
            f"{name}, {str(dtype)[6:]}, {attention}, {batch} x one image and "
            f"{text_tokens} text tokens, {runs} interleaved rounds."
        ),
        "model": name,
        "dtype": str(dtype)[6:],
        "device": device,
        "attention": attention,
        "batch": batch,
        "text_tokens": text_tokens,
        "new_tokens": new_tokens,
        "weight_bytes": hollow.weight_bytes,
        "runs": runs,
        "results": [asdict(cost) for cost in costs],
        "environment": environment_now(),
    }
    if plot is not None:
        from dcp_prune.viz.plots import time_bars, to_bytes

        names = [f"{cost.pruner} {cost.num_tokens}" for cost in costs]
        parts = {
            "encoder": [cost.encoder_ms for cost in costs],
            "selection": [cost.selection_ms or 0.0 for cost in costs],
            "prefill": [cost.prefill_ms for cost in costs],
        }
        write_atomically(plot, to_bytes(time_bars(name, names, parts), "png"))

    def show(console: Console) -> None:
        table = Table("", "tokens", "encoder", "first token", "95 %", "speed", "limit", "encode", "select", "prefill",
                      "next", "images/s", "KV MiB", "peak MiB", "GFLOP", box=None, pad_edge=False)  # fmt: skip
        for column in table.columns[1:]:
            column.justify = "right"
        for cost in costs:
            low, high = cost.ttft_interval_ms
            table.add_row(
                cost.pruner,
                f"{cost.num_tokens:,}",
                f"{cost.encoder_tokens:,.0f}",
                _digits(cost.ttft_ms),
                f"{_digits(low)}-{_digits(high)}",
                f"{1 / cost.ttft_ratio:.2f} x",
                "" if cost.limit_share is None else f"{cost.limit_share:.1%}",
                _digits(cost.encoder_ms),
                "" if cost.selection_ms is None else _digits(cost.selection_ms),
                _digits(cost.prefill_ms),
                "" if cost.per_token_ms is None else _digits(cost.per_token_ms),
                f"{cost.images_per_second:,.2f}",
                f"{cost.kv_cache_bytes / 2**20:,.2f}",
                "?" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**20:,.0f}",
                "?" if cost.prefill_flops is None else f"{cost.prefill_flops / 1e9:,.2f}",
            )
        console.print(table)
        console.print(
            "\ntokens: visual tokens of an image in every layer of the language model; encoder: mean over its layers.\n"
            "first token, encode, select, prefill, next (token): median ms of the whole batch; speed: "
            "against none.\nlimit: share of the speed that as many tokens reach if choosing them costs nothing.\n"
            "peak: the most memory up to the first token, beyond weights and inputs.",
            style="dim",
            highlight=False,
        )
        if plot is not None:
            console.print(f"The picture: {plot}", highlight=False, markup=False)

    report_result(result, json, show)


def _count(
    name: str,
    methods: Sequence[tuple[str, Pruner]],
    pictures: Sequence[Path],
    question_length: int,
    dtype_name: str | None,
    json: Path | None,
) -> None:
    if name.startswith(RANDOM):
        raise InvalidInputError(f"{name} has no processor that could read pictures; name a model for --dry-run")
    if not pictures:
        raise InvalidInputError("--dry-run needs pictures; name one or more image files")
    from dcp_prune.images import load_image

    loaded = [load_image(path) for path in pictures]
    import torch

    from dcp_prune.assistant import Assistant, Blueprint
    from dcp_prune.memory import in_words
    from dcp_prune.profiling.counting import Hollow
    from dcp_prune.profiling.dry_run import count_picture

    blueprint = Blueprint.find(name)
    hollow = Hollow(blueprint.kind, blueprint.config, getattr(torch, dtype_name or DTYPES[0]))
    prompt = _prompt(Assistant(name, hollow.model, blueprint.processor), question_length)
    costs = [
        cost
        for path, each in zip(pictures, loaded, strict=True)
        for cost in count_picture(hollow, blueprint.processor, each.image, prompt, methods, name=str(path))
    ]
    result = {
        "model": name,
        "dtype": dtype_name or DTYPES[0],
        "weight_bytes": hollow.weight_bytes,
        "results": [asdict(cost) for cost in costs],
        "environment": environment_now(),
    }

    def show(console: Console) -> None:
        table = Table("image", "pixels", "", "tokens", "prompt", "KV MiB", "encoder GFLOP", "prefill GFLOP",
                      box=None, pad_edge=False)  # fmt: skip
        for column in table.columns[3:]:
            column.justify = "right"
        for cost in costs:
            first = cost.pruner == "none"
            table.add_row(
                Path(cost.image).name if first else "",
                f"{cost.width} x {cost.height}" if first else "",
                cost.pruner,
                f"{cost.visual_tokens:,}",
                f"{cost.prompt_tokens:,}",
                f"{cost.kv_cache_bytes / 2**20:,.2f}",
                "?" if cost.encoder_flops is None else f"{cost.encoder_flops / 1e9:,.2f}",
                f"{cost.prefill_flops / 1e9:,.2f}",
            )
        console.print(table)
        console.print(
            f"\nNothing was run. Weights of {name}: {in_words(hollow.weight_bytes)} in {result['dtype']}.",
            style="dim",
            highlight=False,
        )

    report_result(result, json, show)


def _digits(milliseconds: float) -> str:
    """Three of them, or all before the point."""
    return f"{milliseconds:,.{0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2}f}"


def _class_of(config: Any) -> Any:
    """The class of the models of a configuration."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText._model_mapping[type(config)]


def _prompt(assistant: Any, length: int) -> str:
    """A prompt of about so many tokens beside its image."""
    tokenizer = assistant.processor.tokenizer
    words = len(tokenizer(assistant.prompt("what"))["input_ids"])
    return assistant.prompt(" ".join(["what"] * max(1, length - words + 2)))


def _question(assistant: Any, batch: int, length: int) -> dict[str, Any]:
    """Prompts about pictures of noise, as the processor makes them."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    pictures = [[Image.fromarray(draw.integers(0, 256, (672, 672, 3), dtype=np.uint8))] for _ in range(batch)]
    return dict(assistant.processor(images=pictures, text=[_prompt(assistant, length)] * batch, return_tensors="pt"))
