"""vLLM as it is against vLLM with the plug-in, on one machine, in turns: `make bench-vllm`.

    python tools/bench_vllm.py --models testbed vit-l-1b --output results/vllm-bench.json

Two servers stand side by side and are asked one after the other: the stock one, and one with the plug-in, which is
asked with a budget of all tokens, where nothing is pruned, and with 16. Every request has a picture that no server has
seen, and no cache is on. Each round asks all of them in a new order about the same picture, and the stock server
without a picture, which tells what a request costs that no pruning can spare. Ratios are taken within a round; what is
reported are medians over the rounds, with 95 % bootstrap intervals of the ratios. Requests per second are those of
whole blocks of requests; the large model answers single requests only. Needs the environment of `make test-vllm`, whose
folder of tests has to be on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from checkpoints import as_on_the_hub
from PIL import Image
from safetensors.torch import save_file
from servers import Server, chat, data_url
from transformers import CLIPImageProcessorPil, LlavaProcessor

from dcp_prune.eval.environment import environment
from dcp_prune.files import check_writable, to_json, write_atomically
from dcp_prune.profiling.latency import build_config, build_model
from dcp_prune.testbed.language import IMAGE, SPECIAL, make_tokenizer
from dcp_prune.testbed.load import checkpoint_path
from dcp_prune.testbed.seeds import TUNING
from dcp_prune.testbed.world import make_scene

N, K = 576, 16
ANSWER = 8
"""New tokens of an answer, where the whole request is timed."""
CONCURRENCIES = (1, 8, 32)
COLD = {"no-enable-prefix-caching": True, "mm-processor-cache-gb": 0, "limit-mm-per-prompt": {"image": 1}}
DTYPES = {"testbed": "float32", "vit-l-1b": "bfloat16"}


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
    config = build_config()
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
    tokenizer = make_tokenizer()
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


def interleaved(arms: list[Arm], rounds: int, measure: Callable[[Arm], float], order: random.Random) -> dict[str, Any]:
    """Arm -> medians of the measure and of its ratio to the first arm in the same round, with its 95 % interval."""
    taken: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in range(rounds):
        for arm in order.sample(arms, len(arms)):
            taken[arm.name].append(measure(arm))
    stock = np.array(taken[arms[0].name])
    draws = np.random.default_rng(0).integers(rounds, size=(10_000, rounds))
    found = {}
    for name, values in taken.items():
        ratios = np.array(values) / stock
        found[name] = {
            "seconds": median(values),
            "ratio": float(np.median(ratios)),
            "ratio_ci95": np.quantile(np.median(ratios[draws], axis=1), (0.025, 0.975)).tolist(),
            "range": [min(values), max(values)],
        }
    return found


def bench(model: str, folder: Path, rounds: int, blocks: int, requests: int) -> list[dict[str, Any]]:
    """The rows of one model."""
    checkpoint = CHECKPOINTS[model](folder / model)
    options = {**COLD, "dtype": DTYPES[model], "max-num-batched-tokens": 8192, "kv-cache-memory-bytes": 2**28}
    settings = {"num_tokens": N, "stage1_cache_mb": 0}
    (folder / "stock").mkdir()
    (folder / "plug-in").mkdir()
    with (
        Server(checkpoint, {}, options, folder / "stock") as stock,
        Server(checkpoint, settings, options, folder / "plug-in") as plugin,
    ):
        arms = [Arm("stock", stock, None), Arm("all", plugin, None), Arm("pruned", plugin, K)]
        single = [*arms, Arm("no picture", stock, None, shows_picture=False)]
        fresh, order = pictures(), random.Random(0)

        def on_one_picture(measure: Callable[[Arm, str], float]) -> Callable[[Arm], float]:
            shown: dict[str, Iterator[str]] = {}
            images = [next(fresh) for _ in range(rounds)]
            return lambda arm: measure(arm, next(shown.setdefault(arm.name, iter(images))))

        for arm in single:  # warm up
            whole_request(arm, next(fresh))
        first = interleaved(single, rounds, on_one_picture(first_token), order)
        print(model, "time to first token", first, flush=True)
        whole = interleaved(single, rounds, on_one_picture(whole_request), order)
        print(model, "whole request", whole, flush=True)
        throughput = {}
        for concurrency in CONCURRENCIES if blocks else ():
            measure = seconds_per_request(concurrency, [next(fresh) for _ in range(requests)])
            throughput[concurrency] = interleaved(arms, blocks, measure, order)
            print(model, concurrency, throughput[concurrency], flush=True)
    return [
        {
            "model": model,
            "rounds": rounds,
            "arm": arm.name,
            "num_tokens": (arm.num_tokens or N) if arm.shows_picture else 0,
            "ttft": in_milliseconds(first[arm.name]),
            "request": in_milliseconds(whole[arm.name]),
            "throughput": {
                str(load): {
                    "requests_per_second": 1 / found[arm.name]["seconds"],
                    "ratio": 1 / found[arm.name]["ratio"],
                    "ratio_ci95": sorted(1 / bound for bound in found[arm.name]["ratio_ci95"]),
                }
                for load, found in throughput.items()
                if arm.name in found
            },
        }
        for arm in single
    ]


def in_milliseconds(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "milliseconds": 1e3 * found["seconds"],
        "milliseconds_range": [1e3 * bound for bound in found["range"]],
        "ratio": found["ratio"],
        "ratio_ci95": found["ratio_ci95"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CHECKPOINTS), default=list(CHECKPOINTS))
    parser.add_argument("--rounds", type=int, default=151, help="of one request each")
    parser.add_argument("--rounds-large", type=int, default=7, help="the same for the large model")
    parser.add_argument("--blocks", type=int, default=7, help="of many requests, for each number of them at a time")
    parser.add_argument("--requests", type=int, default=64, help="in such a block")
    parser.add_argument("--output", type=Path, default=Path("results/vllm-bench.json"))
    args = parser.parse_args()
    check_writable(args.output)
    import vllm

    rows = []
    if args.output.exists():  # other models stay as they were measured
        rows = [row for row in json.loads(args.output.read_text())["results"] if row["model"] not in args.models]
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            large = model == "vit-l-1b"
            rounds, blocks = (args.rounds_large, 0) if large else (args.rounds, args.blocks)
            rows += bench(model, Path(folder), rounds, blocks, args.requests)
        manifest: dict[str, Any] = {**environment()}
        manifest["packages"] = {**manifest["packages"], "vllm": vllm.__version__}
        counts = ", ".join(f"{row['rounds']} rounds of {row['model']}" for row in rows if row["arm"] == "stock")
        result = {
            "description": f"Medians of {counts}, and of blocks of {args.requests} requests; {ANSWER} new tokens per "
            "request; caches off.",
            "results": rows,
            "environment": manifest,
        }
        write_atomically(args.output, to_json(result).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
