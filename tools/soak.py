"""One vLLM server with the plug-in under thousands of mixed requests, 32 at a time: `make soak`.

    python tools/soak.py --requests 10000 --minutes 30 --output results/vllm-soak.json

Valid requests (small, huge and 1 x 1 pictures, several pictures, budgets, streams) have to be answered with the words
and logprobs of transformers with the same pruner; those that cannot be answered have to be refused with a 4xx status;
some streams are cut off half-way. The server's caches are small, so that they are full early and throw out all the
time; what its processes take of the memory should not grow after that. Needs the environment of `make test-vllm`,
whose folder of tests has to be on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import psutil
import torch
from checkpoints import as_on_the_hub
from engines import Answer, Question, Reference
from PIL import Image
from servers import Server, chat, data_url

from dcp_prune.environment import environment
from dcp_prune.files import check_writable, to_json, write_atomically
from dcp_prune.registry import make_pruner
from dcp_prune.testbed.language import prompt
from dcp_prune.testbed.load import checkpoint_path
from dcp_prune.testbed.seeds import TUNING
from dcp_prune.testbed.world import make_scene

K = 16
CLOSE = 1e-3
"""Largest difference of logprobs that counts as equal; numbers depend a little on what else is in a batch."""
WARM_UP = 1000
"""Requests after which the memory should not grow."""
FLAT = 0.05
CONCURRENCY = 32
SETTINGS = {"num_tokens": K, "stage1_cache_mb": 16}
OPTIONS = {"mm-processor-cache-gb": 0.05}
MEMORY = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "131072", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""Environment in which what grows is what is held: glibc gives freed memory back, and oneDNN, which compiles a product
of matrices for each number of tokens in a step, keeps 64 of them instead of 1,024."""
ENVIRONMENT = {**MEMORY, "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "300"}  # by default a connection closes as it is used again
TOP = {"logprobs": True, "top_logprobs": 5, "return_tokens_as_token_ids": True}
KINDS = {"plain": 60, "stream": 12, "cancelled": 10, "several": 3, "huge": 2, "one pixel": 2, "invalid": 11}
"""What is asked, and how often in a hundred requests."""


@dataclass(frozen=True)
class Case:
    """A request that can be answered, and what transformers answers."""

    text: str
    images: tuple[str, ...]
    num_tokens: int | None
    expected: Answer

    def body(self, **options: Any) -> dict[str, Any]:
        return chat(self.text, *self.images, num_tokens=self.num_tokens, **TOP, **options)


@dataclass
class Tally:
    """What came of the requests so far."""

    asked: Counter[str] = field(default_factory=Counter)
    as_expected: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: list[str] = field(default_factory=list)
    statuses: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    asked_again: Counter[str] = field(default_factory=Counter)
    difference: float = 0.0

    @property
    def done(self) -> int:
        return sum(self.asked.values())

    def count(self, kind: str, problem: str | None, seconds: float) -> None:
        self.asked[kind] += 1
        self.seconds[kind].append(seconds)
        if problem is None:
            self.as_expected[kind] += 1
        elif len(self.failures) < 50:
            self.failures.append(f"{kind}: {problem}")


def make_cases(reference: Reference, each: int) -> dict[str, list[Case]]:
    """Requests of each valid kind, `each` of the plain ones and a few of the others."""
    scenes = [make_scene(seed, "crowded") for seed in range(TUNING.start, TUNING.start + max(1, each // 3))]
    pictures = [Image.fromarray(scene.image) for scene in scenes]
    generator = random.Random(0)
    cases: dict[str, list[Case]] = defaultdict(list)

    def add(kind: str, text: str, pictures: list[Image.Image], file: str, num_tokens: int | None = None) -> None:
        urls = tuple(data_url(picture, file) for picture in pictures)
        images = tuple(as_seen(url) for url in urls)
        placeholders = " ".join(["<image>"] * len(images))
        question = Question(prompt(text).replace("<image>", placeholders), images)
        expected = reference.ask(question, make_pruner("dcp", num_tokens=num_tokens or K))
        cases[kind].append(Case(text, urls, num_tokens, expected))

    for number in range(each):
        scene = number % len(scenes)
        text = generator.choice(scenes[scene].questions).text
        add("plain", text, [pictures[scene]], ("png", "jpeg")[number % 2], (None, None, 8, 3)[number % 4])
    for number in range(max(2, each // 20)):
        text = scenes[number % len(scenes)].questions[0].text
        add("several", text, [generator.choice(pictures) for _ in range(2 + number % 2)], "png")
        large = pictures[number % len(pictures)].resize((4000 - 10 * number, 3000))
        add("huge", text, [large], "jpeg")
        add("one pixel", text, [Image.new("RGB", (1, 1), tuple(generator.choices(range(256), k=3)))], "png")
    return {**cases, "stream": cases["plain"], "cancelled": cases["plain"]}


def as_seen(url: str) -> Image.Image:
    """The picture that a server reads from a data address."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def invalid_bodies() -> list[dict[str, Any]]:
    """Requests that nobody can answer."""
    picture = data_url(Image.fromarray(make_scene(TUNING.start, "standard").image))
    cut, text = picture[: len(picture) // 2], "is there a cat ?"
    claims = bytearray(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\2\0\0\0")  # 65,536 x 65,536 pixels
    return [
        chat(text, cut[: len(cut) // 4 * 4]),
        chat(text, data_url(b"this is no picture")),
        chat(text, data_url(bytes(claims))),
        chat(text, "data:image/png;base64,%%%"),
        chat(text, picture, num_tokens=K + 1),
        chat(text, picture, num_tokens=0),
        chat(text, picture, num_tokens="many"),
        chat(text, *[picture] * 5),  # more than the server takes
        chat(" ".join(["cat"] * 3000), picture),  # longer than the context
        {**chat(text, picture), "temperature": -1},
        {**chat(text, picture), "model": "another"},
        {"model": "testbed"},
    ]


def problem_of(case: Case, answer: Mapping[str, Any], tally: Tally) -> str | None:
    """What is wrong with an answer, None if it is the one of transformers."""
    if answer["usage"]["prompt_tokens"] != case.expected.prompt_tokens:
        return f"{answer['usage']['prompt_tokens']} prompt tokens instead of {case.expected.prompt_tokens}"
    return problem_of_steps(case, answer["choices"][0]["logprobs"]["content"], tally)


def problem_of_steps(case: Case, steps: list[Any], tally: Tally) -> str | None:
    ids = [token_id(step) for step in steps]
    if ids != list(case.expected.ids):
        return f"tokens {ids} instead of {list(case.expected.ids)} for {case.text!r}, budget {case.num_tokens}"
    difference = max(
        abs(top["logprob"] - case.expected.logprobs[number, token_id(top)].item())
        for number, step in enumerate(steps)
        for top in step["top_logprobs"]
        if top["logprob"] > -20
    )
    tally.difference = max(tally.difference, difference)
    return None if difference < CLOSE else f"logprobs differ by {difference:.2g} for {case.text!r}"


def token_id(entry: Mapping[str, Any]) -> int:
    return int(entry["token"].removeprefix("token_id:"))


class ServerError(Exception):
    """Status 500, or an error within a stream. It is asked once more, as OpenAI's client does by itself, and as that
    does after a broken connection: vLLM's processes may disagree about which images are cached, and count on that."""


class Soak:
    """Asks one request after the other from several tasks."""

    def __init__(self, server: Server, cases: Mapping[str, list[Case]]) -> None:
        self.server, self.cases, self.invalid, self.tally = server, cases, invalid_bodies(), Tally()
        self.memory: list[tuple[int, float, dict[str, float]]] = []

    async def run(self, requests: int, seconds: float) -> None:
        """Until so many requests are asked or so much time is spent."""
        numbers, end = iter(range(requests)), time.monotonic() + seconds
        limits = httpx.Limits(max_connections=CONCURRENCY)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=300, limits=limits) as client:

            async def ask_on() -> None:
                for number in numbers:
                    if time.monotonic() > end or self.server.process.poll() is not None:
                        return
                    await self.ask(client, number)

            watch = asyncio.create_task(self.watch_memory())
            await asyncio.gather(*(ask_on() for _ in range(CONCURRENCY)))
            watch.cancel()

    async def watch_memory(self) -> None:
        begin = last = time.monotonic()
        while True:
            resident = {}
            for process in self.server.family():
                try:
                    name = process.name()
                    resident[name] = resident.get(name, 0.0) + process.memory_info().rss / 2**20
                except psutil.Error:
                    continue
            self.memory.append((self.tally.done, time.monotonic() - begin, resident))
            if time.monotonic() - last > 30:
                last = time.monotonic()
                total = sum(resident.values())
                print(f"{self.tally.done} requests, {total:,.0f} MiB, {len(self.tally.failures)} failures", flush=True)
            await asyncio.sleep(1)

    async def ask(self, client: httpx.AsyncClient, number: int) -> None:
        generator = random.Random(number)
        (kind,) = generator.choices(list(KINDS), list(KINDS.values()))
        start = time.perf_counter()
        try:
            if kind == "invalid":
                which = generator.randrange(len(self.invalid))
                status = (await client.post("/v1/chat/completions", json=self.invalid[which])).status_code
                self.tally.statuses[f"invalid {which}"][status] += 1
                problem = None if 400 <= status < 500 else f"status {status} for invalid request {which}"
            else:
                case = generator.choice(self.cases[kind])
                ask = {"stream": self.stream, "cancelled": self.cancel}.get(kind, self.whole)
                try:
                    problem = await ask(client, case, generator)
                except (ServerError, httpx.TransportError) as error:
                    self.tally.asked_again[type(error).__name__] += 1
                    problem = await ask(client, case, generator)
        except (httpx.HTTPError, ServerError) as error:
            problem = repr(error)
        self.tally.count(kind, problem, time.perf_counter() - start)

    async def whole(self, client: httpx.AsyncClient, case: Case, _: random.Random) -> str | None:
        response = await client.post("/v1/chat/completions", json=case.body())
        if response.status_code == 500:
            raise ServerError(response.text[:300])
        if response.status_code != 200:
            return f"status {response.status_code}: {response.text[:300]}"
        return problem_of(case, response.json(), self.tally)

    async def stream(self, client: httpx.AsyncClient, case: Case, _: random.Random) -> str | None:
        steps: list[Any] = []
        async with client.stream("POST", "/v1/chat/completions", json=case.body(stream=True)) as response:
            if response.status_code == 500:
                raise ServerError
            if response.status_code != 200:
                return f"status {response.status_code}"
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ServerError(str(event))
                    for choice in event["choices"]:
                        steps += (choice.get("logprobs") or {}).get("content") or []
        return problem_of_steps(case, steps, self.tally)

    async def cancel(self, client: httpx.AsyncClient, case: Case, generator: random.Random) -> str | None:
        """Hangs up at once, or after some words of a long answer."""
        body = case.body(stream=True, max_tokens=200)
        if generator.random() < 0.3:
            try:
                async with asyncio.timeout(generator.random() * 0.2):
                    await client.post("/v1/chat/completions", json=body)
            except TimeoutError:
                pass
            return None
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                return f"status {response.status_code}"
            words = generator.randrange(1, 20)
            async for _ in response.aiter_lines():
                words -= 1
                if words == 0:
                    break
        return None

    def memory_summary(self) -> dict[str, Any]:
        """Resident memory in MiB, summed over the server's processes: medians of the first and the last tenth after the
        warm-up, and the largest."""
        warm_up = min(WARM_UP, self.tally.done // 4)
        after = [sum(parts.values()) for done, _, parts in self.memory if done >= warm_up]
        tenth = max(1, len(after) // 10)
        first, last = median(after[:tenth]), median(after[-tenth:])
        step = max(1, len(self.memory) // 60)
        course = [
            {"requests": done, "seconds": round(at), **{name: round(size) for name, size in parts.items()}}
            for done, at, parts in self.memory[::step]
        ]
        return {
            "warm_up_requests": warm_up,
            "after_warm_up": round(first, 1),
            "largest": round(max(after), 1),
            "at_end": round(last, 1),
            "growth": round(last / first - 1, 4),
            "largest_growth": round(max(after) / first - 1, 4),
            "course": course,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=30, help="the most that asking may take")
    parser.add_argument("--cases", type=int, default=240, help="different plain requests")
    parser.add_argument("--output", type=Path, default=Path("results/vllm-soak.json"))
    args = parser.parse_args()
    check_writable(args.output)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = as_on_the_hub(checkpoint_path("weak"), Path(folder) / "testbed")
        cases = make_cases(Reference(checkpoint), args.cases)
        print(f"{len(cases['plain'])} plain requests have their reference", flush=True)
        with Server(checkpoint, SETTINGS, OPTIONS, Path(folder), ENVIRONMENT) as server:
            soak, start = Soak(server, cases), time.monotonic()
            asyncio.run(soak.run(args.requests, args.minutes * 60))
            seconds = time.monotonic() - start
            result = summary(soak, seconds, args.requests)
            if not all(result["holds"].values()):
                log = args.output.with_suffix(".log")
                write_atomically(log, server.log.read_bytes())
                print(f"not all is as it should be; the server's log is {log}")
    write_atomically(args.output, to_json(result).encode())
    print(to_json({name: value for name, value in result.items() if name in ("holds", "requests", "failures")}))
    return 0 if all(result["holds"].values()) else 1


def summary(soak: Soak, seconds: float, planned: int) -> dict[str, Any]:
    """The result file."""
    import vllm

    tally, server, memory = soak.tally, soak.server, soak.memory_summary()
    idle = server.is_healthy() and wait_until_idle(server)
    drifts = server.log.read_bytes().count(b"Multi-modal cache miss for request")
    valid = [kind for kind in KINDS if kind not in ("invalid", "cancelled")]
    kinds = {
        kind: {
            "asked": tally.asked[kind],
            "as_expected": tally.as_expected[kind],
            "median_seconds": round(median(spent), 3),
            "p95_seconds": round(quantiles(spent, n=20)[-1], 3) if len(spent) > 1 else None,
        }
        for kind, spent in sorted(tally.seconds.items())
    }
    manifest: dict[str, Any] = {**environment()}
    manifest["packages"] = {**manifest["packages"], "vllm": vllm.__version__}
    return {
        "description": f"One vLLM server, {CONCURRENCY} requests at a time, testbed (weak), {K} of 576 visual tokens.",
        "requests": tally.done,
        "planned_requests": planned,
        "seconds": round(seconds, 1),
        "requests_per_second": round(tally.done / seconds, 2),
        "concurrency": CONCURRENCY,
        "settings": SETTINGS,
        "server_environment": ENVIRONMENT,
        "kinds": kinds,
        "statuses_of_invalid": {name: dict(each) for name, each in sorted(tally.statuses.items())},
        "asked_again": dict(tally.asked_again),
        "cache_misses_of_vllm": drifts,
        "largest_logprob_difference": tally.difference,
        "resident_mib": memory,
        "metrics": server.metrics() if idle else {},
        "failures": tally.failures,
        "holds": {
            "no crash": server.process.poll() is None and server.is_healthy(),
            "nothing left running": idle,
            "valid requests answered as by transformers": all(
                tally.as_expected[kind] == tally.asked[kind] for kind in valid
            ),
            "invalid requests refused with 4xx": tally.as_expected["invalid"] == tally.asked["invalid"],
            "no error but vLLM's own cache misses": tally.asked_again["ServerError"] <= drifts,
            "cancelled requests did no harm": tally.as_expected["cancelled"] == tally.asked["cancelled"],
            f"memory flat within {FLAT:.0%} after {memory['warm_up_requests']} requests": abs(memory["growth"]) <= FLAT,
        },
        "environment": manifest,
    }


def wait_until_idle(server: Server, seconds: float = 30) -> bool:
    """Whether the server soon has no request left, those of clients that hung up among them."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        lines = server.client.get("/metrics").text.splitlines()
        busy = [line for line in lines if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))]
        if busy and all(float(line.rsplit(" ", 1)[1]) == 0 for line in busy):
            return True
        time.sleep(0.5)
    return False


if __name__ == "__main__":
    sys.exit(main())
