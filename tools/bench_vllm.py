"""vLLM as it is against vLLM with the plug-in, on one machine, in turns: `make bench-vllm`.

    python tools/bench_vllm.py --models testbed vit-l-1b --output results/vllm-bench.json

Three servers stand side by side and are asked one after the other, each while the others are stopped: two stock ones,
of which the second tells how much two equal servers differ, and one with the plug-in, which is asked with a budget of
all tokens, where nothing is pruned, and with 16. Every request has a picture that no server has seen, and no cache is
on. Each round asks all of them in a new order about the same picture, and the stock server without a picture, which
tells what a request costs that no pruning can spare. After some rounds all servers are started anew. Ratios are taken
within a round; what is reported are medians over the rounds, with 95 % bootstrap intervals of the ratios, drawn over
starts and over the rounds of a start. Requests per second are those of whole blocks of requests; the large model
answers single requests only. Needs the environment of `make test-vllm`, whose folder of tests has to be on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import as_on_the_hub
from PIL import Image
from safetensors.torch import save_file
from servers import Server, chat, data_url
from transformers import CLIPImageProcessorPil, LlavaProcessor

from dcp_prune.environment import environment
from dcp_prune.files import check_writable, to_json, write_atomically
from dcp_prune.profiling.architectures import ARCHITECTURES, build_model
from dcp_prune.testbed.language import IMAGE, SPECIAL, make_tokenizer, vocabulary
from dcp_prune.testbed.load import checkpoint_path
from dcp_prune.testbed.seeds import TUNING
from dcp_prune.testbed.world import make_scene

N, K = 576, 16
ANSWER = 8
"""New tokens of an answer, where the whole request is timed."""
CONCURRENCIES = (1, 8, 32)
COLD = {"no-enable-prefix-caching": True, "mm-processor-cache-gb": 0, "limit-mm-per-prompt": {"image": 1}}
DTYPES = {"testbed": "float32", "vit-l-1b": "bfloat16"}
WARM_UP = {"testbed": 5, "vit-l-1b": 1}
"""Requests to each arm that are not measured."""


@dataclass(frozen=True)
class Arm:
    """One of those that are compared."""

    name: str
    server: Server
    num_tokens: int | None
    shows_picture: bool = True

    def body(self, image: str, **options: Any) -> dict[str, Any]:
        images = [image] if self.shows_picture else []
        return chat("is there a cat in the picture ?", *images, num_tokens=self.num_tokens, **options)


def make_large(folder: Path) -> Path:
    """CLIP ViT-L/14-336 and a Llama of one billion parameters with random weights in bfloat16, as on the hub."""
    config: Any = ARCHITECTURES["vit-l-1b"].config()
    config.image_token_index = config.image_token_id = SPECIAL.index(IMAGE)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = torch.bfloat16
    model = build_model(config, torch.bfloat16)
    model.save_pretrained(folder)
    weights = {
        name.replace("model.vision_tower.", "model.vision_tower.vision_model."): weight
        for name, weight in model.state_dict().items()
        if not name.startswith("lm_head")  # tied to the word embeddings
    }
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    size = config.vision_config.image_size
    images = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    tokenizer = make_tokenizer(vocabulary())
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return folder


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "testbed": lambda folder: as_on_the_hub(checkpoint_path("weak"), folder),
    "vit-l-1b": make_large,
}


def pictures() -> Iterator[str]:
    """Pictures without end, each another one."""
    for number in count():
        scene = make_scene(TUNING.start + number % len(TUNING), "crowded")
        noise = np.random.default_rng(number).integers(0, 16, scene.image.shape, dtype=np.uint8)
        yield data_url(Image.fromarray(scene.image // 2 + noise), "jpeg")


def first_token(arm: Arm, image: str) -> float:
    """Seconds from sending a request to its first new token."""
    start, seconds = time.perf_counter(), None
    body = arm.body(image, stream=True, max_tokens=1)
    with arm.server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():  # to its end, so that the next request does not meet the rest of this one
            if seconds is None and line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                # Random weights may write a token that is no text; then its end is what comes.
                if choices and (choices[0]["delta"].get("content") or choices[0]["finish_reason"]):
                    seconds = time.perf_counter() - start
    if seconds is None:
        raise RuntimeError("an answer without a token")
    return seconds


def whole_request(arm: Arm, image: str) -> float:
    start = time.perf_counter()
    arm.server.ask(arm.body(image, max_tokens=ANSWER))
    return time.perf_counter() - start


def seconds_per_request(concurrency: int, images: list[str]) -> Callable[[Arm], float]:
    def measure(arm: Arm) -> float:
        with ThreadPoolExecutor(concurrency) as pool:
            start = time.perf_counter()
            list(pool.map(lambda image: whole_request(arm, image), images))
            return (time.perf_counter() - start) / len(images)

    return measure


def interleaved(
    arms: list[Arm], rounds: int, measure: Callable[[Arm], float], order: random.Random
) -> dict[str, list[float]]:
    """Arm -> its measures, one a round. Servers are stopped before and after."""
    taken: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in range(rounds):
        for arm in order.sample(arms, len(arms)):
            arm.server.resume()
            arm.server.ask(replace(arm, shows_picture=False).body("", max_tokens=1))  # wakes what slept
            taken[arm.name].append(measure(arm))
            arm.server.pause()
    return taken


def compare(starts: list[dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Arm -> medians of the measure and of its ratio to the first arm in the same round, with its 95 % interval.

    Args:
        starts: of all servers; of each the measures of `interleaved`.
    """
    stock = np.array([start["stock"] for start in starts])
    num_starts, rounds = stock.shape
    random = np.random.default_rng(0)
    drawn_starts = random.integers(num_starts, size=(2_000, num_starts, 1))
    drawn_rounds = random.integers(rounds, size=(2_000, num_starts, rounds))
    found = {}
    for name in starts[0]:
        values = np.array([start[name] for start in starts])
        ratios = values / stock
        found[name] = {
            "value": float(np.median(values)),
            "ratio": float(np.median(ratios)),
            "ratio_ci95": np.quantile(
                np.median(ratios[drawn_starts, drawn_rounds], axis=(1, 2)), (0.025, 0.975)
            ).tolist(),
            "ratio_of_starts": np.median(ratios, axis=1).tolist(),
            "range": [float(values.min()), float(values.max())],
        }
    return found


@dataclass(frozen=True)
class Amount:
    """How much is measured: after each of the starts so many rounds of single requests, and so many rounds of blocks
    of requests."""

    starts: int
    rounds: int
    blocks: int
    requests: int


def bench(model: str, folder: Path, amount: Amount) -> Iterator[list[dict[str, Any]]]:
    """The rows of one model, after each start of its servers."""
    checkpoint = CHECKPOINTS[model](folder / model)
    fresh, order = pictures(), random.Random(0)
    taken: dict[str, list[dict[str, list[float]]]] = defaultdict(list)
    for start in range(amount.starts):
        below = folder / str(start)
        below.mkdir()
        for name, values in measure_start(model, checkpoint, below, amount, fresh, order).items():
            taken[name].append(values)
        found = {name: compare(starts) for name, starts in taken.items()}
        yield [
            {
                "model": model,
                **asdict(replace(amount, starts=start + 1)),
                "arm": arm,
                "num_tokens": {"pruned": K, "no picture": 0}.get(arm, N),
                "ttft": in_milliseconds(found["ttft"][arm]),
                "request": in_milliseconds(found["request"][arm]),
                "throughput": {
                    str(load): per_second(found[str(load)][arm])
                    for load in CONCURRENCIES
                    if arm in found.get(str(load), ())
                },
            }
            for arm in found["ttft"]
        ]


def measure_start(
    model: str, checkpoint: Path, folder: Path, amount: Amount, fresh: Iterator[str], order: random.Random
) -> dict[str, dict[str, list[float]]]:
    """Measure -> arm -> values of one start of all servers."""
    options = {**COLD, "dtype": DTYPES[model], "max-num-batched-tokens": 8192, "kv-cache-memory-bytes": 2**28}
    plugin = {"num_tokens": N, "stage1_cache_mb": 0}
    servers: dict[str, Server] = {}
    with ExitStack() as stack:
        for name in order.sample(["stock", "stock again", "plug-in"], 3):
            (folder / name).mkdir()
            settings = plugin if name == "plug-in" else {}
            servers[name] = stack.enter_context(Server(checkpoint, settings, options, folder / name))
        arms = [
            Arm("stock", servers["stock"], None),
            Arm("stock again", servers["stock again"], None),
            Arm("all", servers["plug-in"], None),
            Arm("pruned", servers["plug-in"], K),
        ]
        single = [*arms, Arm("no picture", servers["stock"], None, shows_picture=False)]
        for arm in single:
            for _ in range(WARM_UP[model]):
                whole_request(arm, next(fresh))
        for server in servers.values():
            server.pause()

        def on_one_picture(measure: Callable[[Arm, str], float]) -> Callable[[Arm], float]:
            shown: dict[str, Iterator[str]] = {}
            images = [next(fresh) for _ in range(amount.rounds)]
            return lambda arm: measure(arm, next(shown.setdefault(arm.name, iter(images))))

        taken = {
            "ttft": interleaved(single, amount.rounds, on_one_picture(first_token), order),
            "request": interleaved(single, amount.rounds, on_one_picture(whole_request), order),
        }
        for load in CONCURRENCIES if amount.blocks else ():
            measure = seconds_per_request(load, [next(fresh) for _ in range(amount.requests)])
            taken[str(load)] = interleaved(arms, amount.blocks, measure, order)
        return taken


def in_milliseconds(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "milliseconds": 1e3 * found["value"],
        "milliseconds_range": [1e3 * bound for bound in found["range"]],
        **{name: found[name] for name in ("ratio", "ratio_ci95", "ratio_of_starts")},
    }


def per_second(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "requests_per_second": 1 / found["value"],
        "ratio": 1 / found["ratio"],
        "ratio_ci95": sorted(1 / bound for bound in found["ratio_ci95"]),
        "ratio_of_starts": [1 / ratio for ratio in found["ratio_of_starts"]],
    }


def write(output: Path, rows: list[dict[str, Any]], manifest: dict[str, Any]) -> None:
    """Puts the rows of one model in the place of those that stand there; other models stay as they were measured."""
    if output.exists():
        old = json.loads(output.read_text())["results"]
        rows = sorted(
            [row for row in old if row["model"] != rows[0]["model"]] + rows,
            key=lambda row: list(CHECKPOINTS).index(row["model"]),
        )
    counts = ", ".join(f"{row['starts']} x {row['rounds']} of {row['model']}" for row in rows if row["arm"] == "stock")
    block = next((row["requests"] for row in rows if row["throughput"]), 0)
    result = {
        "description": f"Medians of starts x rounds, {counts}, and of blocks of {block} requests; {ANSWER} new tokens "
        "per request; caches off.",
        "results": rows,
        "environment": manifest,
    }
    write_atomically(output, to_json(result).encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CHECKPOINTS), default=list(CHECKPOINTS))
    parser.add_argument("--starts", type=int, default=6, help="of all servers of the testbed")
    parser.add_argument("--rounds", type=int, default=80, help="of one request each, after each start")
    parser.add_argument("--blocks", type=int, default=2, help="of many requests, for each number of them at a time")
    parser.add_argument("--requests", type=int, default=64, help="in such a block")
    parser.add_argument("--rounds-large", type=int, default=7, help="of one start of the large model")
    parser.add_argument("--output", type=Path, default=Path("results/vllm-bench.json"))
    args = parser.parse_args()
    check_writable(args.output)
    import vllm

    manifest: dict[str, Any] = {**environment()}
    manifest["packages"] = {**manifest["packages"], "vllm": vllm.__version__}
    for model in args.models:
        amount = Amount(args.starts, args.rounds, args.blocks, args.requests)
        if model == "vit-l-1b":
            amount = Amount(1, args.rounds_large, 0, 0)
        with tempfile.TemporaryDirectory() as folder:
            for rows in bench(model, Path(folder), amount):  # what ends early has its starts so far
                write(args.output, rows, manifest)
                print(f"{model}: {rows[0]['starts']} of {amount.starts} starts", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
