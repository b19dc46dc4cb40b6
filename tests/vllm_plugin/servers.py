"""vLLM's OpenAI server as a process of its own, asked by HTTP."""
# pyright: reportMissingImports=false

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
from PIL import Image

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # compiling the gathering of logprobs takes longer than all else
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "dcp_prune",
}
OPTIONS = {
    "dtype": "float32",
    "max-model-len": 2048,
    "max-num-batched-tokens": 2048,
    "max-num-seqs": 32,
    "block-size": 32,
    "kv-cache-memory-bytes": 64 * 2**20,
    "limit-mm-per-prompt": {"image": 4},
    "served-model-name": "testbed",
    "enable-prompt-tokens-details": True,
    "trust-request-mm-kwargs": True,
    "enforce-eager": True,
}
START_SECONDS = 300


def flags(options: Mapping[str, Any]) -> list[str]:
    """`{"dtype": "float32"}` as words of a command; False leaves a flag out."""
    words = []
    for name, value in options.items():
        if value is not False:
            words.append(f"--{name}")
            if value is not True:
                words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


def overrides(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes vLLM serve a LLaVA pruned; without settings it serves the stock model."""
    pruned = {"architectures": ["DcpLlavaForConditionalGeneration"], "dcp_prune": dict(settings)}
    return {"hf-overrides": pruned} if settings else {}


class Server:
    """A server on loopback with all of its processes; a context that ends them.

    Raises:
        RuntimeError: it did not start; the end of its log is the message.
    """

    def __init__(
        self,
        checkpoint: Path,
        settings: Mapping[str, Any],
        options: Mapping[str, Any] = {},
        folder: Path | None = None,
        environment: Mapping[str, str] = {},
    ) -> None:
        self.folder = folder or Path(tempfile.mkdtemp())
        self.options = {**OPTIONS, **overrides(settings), **options}
        self.environment = {**os.environ, **ENVIRONMENT, **environment}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # `vllm serve` asks for the version of a package called vllm, and the CPU build is called vllm-cpu.
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port), *flags(self.options)]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def __enter__(self) -> Self:
        metrics = self.folder / "metrics"
        metrics.mkdir(exist_ok=True)
        environment = {**self.environment, "PROMETHEUS_MULTIPROC_DIR": str(metrics)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        start = time.monotonic()
        while not self.is_healthy():
            if self.process.poll() is not None or time.monotonic() - start > START_SECONDS:
                self.__exit__()
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-5000:]}")
            time.sleep(0.25)
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it and everything it started."""
        with suppress(ProcessLookupError):
            self.resume()
        family = self.family()
        self.process.send_signal(signal.SIGINT)
        alive = psutil.wait_procs(family, timeout=20)[1]
        for each in alive:
            each.kill()
        psutil.wait_procs(alive, timeout=10)
        self.client.close()

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def pause(self) -> None:
        """Stops its processes where they are. A worker of vLLM looks for work without rest for a second after each
        request, so that servers side by side would take the processor from each other."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def family(self) -> list[psutil.Process]:
        """The server's process and all below it."""
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def is_healthy(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a chat request.

        Raises:
            httpx.HTTPStatusError: it was refused.
        """
        return self.post(body).raise_for_status().json()

    def post(self, body: Mapping[str, Any]) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json=body)

    def metrics(self) -> dict[str, float]:
        """Sums over the labels of each metric whose name starts with `dcp_prune`."""
        found: dict[str, float] = {}
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith("dcp_prune"):
                name, value = line.rsplit(" ", 1)
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found


def data_url(image: Image.Image | bytes, kind: str = "png") -> str:
    """A picture, or bytes that claim to be one, inside of an address."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        image = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def chat(text: str, *images: str, num_tokens: object = None, **options: Any) -> dict[str, Any]:
    """The body of a chat request: images, then a question. The prompt is that of `testbed.language.prompt`."""
    content = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    body = {
        "model": "testbed",
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
        "add_special_tokens": True,  # the template leaves out the token that starts a text
        "temperature": 0,
        "max_tokens": 3,
        "ignore_eos": True,
        **options,
    }
    return body if num_tokens is None else {**body, "mm_processor_kwargs": {"num_tokens": num_tokens}}
