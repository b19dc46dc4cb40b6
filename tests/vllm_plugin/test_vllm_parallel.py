"""Several processes answer as one does: tensor, pipeline and data parallelism, Ray actors, the batch runner."""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checkpoints import PLACEHOLDER
from engines import Question, Reference
from servers import ENVIRONMENT, OPTIONS, Server, chat, data_url, flags, overrides
from test_vllm_llava_next import LARGE, WIDE, ask_about
from test_vllm_qwen import make_picture
from test_vllm_server import CLOSE, IMAGES, SCENES, TOP, body, difference, gap

from dcp_prune.registry import make_pruner
from dcp_prune.testbed.language import prompt

pytestmark = pytest.mark.slow

K = 16
ASKED = [(scene, number) for scene in range(4) for number in (0, 5)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reference(checkpoints: dict[str, Path]) -> Reference:
    return Reference(checkpoints["testbed"])


WAYS = {
    "tensor": {"tensor-parallel-size": 2},
    "pipeline": {"pipeline-parallel-size": 2, "enforce-eager": False},
    "data": {"data-parallel-size": 2},
}
COMPILED = {"TORCH_COMPILE_DISABLE": "0"}
"""Uncompiled pipelines fail on a CPU, without any plug-in too: vLLM leaves out the run that makes room for what one
stage hands to the next."""


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_answer_as_one(
    checkpoints: dict[str, Path], reference: Reference, tmp_path: Path, way: str
) -> None:
    environment = COMPILED if way == "pipeline" else {}
    with Server(checkpoints["testbed"], {"num_tokens": K}, WAYS[way], tmp_path, environment) as server:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda asked: server.ask(body(*asked)), ASKED))
        lines = server.client.get("/metrics").text.splitlines()
    for (scene, number), answer in zip(ASKED, answers, strict=True):
        assert difference(answer, reference, scene, number, K) < CLOSE
    tokens = [line for line in lines if line.startswith("vllm:prompt_tokens_total{")]
    answering = sum(float(line.rsplit(" ", 1)[1]) > 0 for line in tokens)
    assert answering == (2 if way == "data" else 1)


SIZES = {
    "next": ("DcpLlavaNextForConditionalGeneration", "<image>", [ask_about(size).images[0] for size in (WIDE, LARGE)]),
    "qwen": ("DcpQwen2_5_VLForConditionalGeneration", PLACEHOLDER, [make_picture(0, 12, 3), make_picture(1, 4, 11)]),
}
"""Checkpoint -> its architecture, what stands for an image in a prompt, and pictures of sizes of their own."""


@pytest.mark.parametrize(("name", "encoder"), [("next", "weights"), ("qwen", "weights"), ("qwen", "data")])
def test_two_ranks_keep_the_same_tokens_of_images_of_many_sizes(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, encoder: str
) -> None:
    alone, text = Reference(checkpoints[name]), "what is this dog"
    architecture, placeholder, pictures = SIZES[name]
    options = {
        "hf-overrides": {"architectures": [architecture], "dcp_prune": {"num_tokens": 8}},
        "tensor-parallel-size": 2,
        "mm-encoder-tp-mode": encoder,
    }
    with Server(checkpoints[name], {}, options, tmp_path) as server:
        answers = [server.ask(chat(text, data_url(picture), **TOP)) for picture in pictures]
    for picture, answer in zip(pictures, answers, strict=True):
        question = Question(f"USER: {placeholder} {text} ASSISTANT: ", (picture,))
        expected = alone.ask(question, make_pruner("dcp", num_tokens=8))
        assert gap(answer, expected) < CLOSE


def test_the_batch_runner_answers_a_file_of_requests(
    checkpoints: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    requests = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body(*each)}
        for number, each in enumerate(ASKED)
    ]
    asked.write_text("".join(f"{json.dumps(request)}\n" for request in requests))
    options = {name: value for name, value in OPTIONS.items() if name != "trust-request-mm-kwargs"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch", "-i", str(asked), "-o", str(answered)]
    command += ["--model", str(checkpoints["testbed"]), *flags({**options, **overrides({"num_tokens": K})})]
    subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True, timeout=400)
    lines = [json.loads(line) for line in answered.read_text().splitlines()]
    assert sorted(int(line["custom_id"]) for line in lines) == list(range(len(ASKED)))
    for line in lines:
        answer: dict[str, Any] = line["response"]["body"]
        assert difference(answer, reference, *ASKED[int(line["custom_id"])], K) < CLOSE


def test_ray_actors_answer_a_file_of_questions(
    checkpoints: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    rows = []
    for number, (scene, question) in enumerate(ASKED):
        IMAGES[scene].save(tmp_path / f"{scene}.png")
        rows.append({"id": number, "image": f"{scene}.png", "question": SCENES[scene].questions[question].text})
    rows.append({"id": len(rows), "image": "missing.png", "question": "is there a cat ?"})
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    asked.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    example = [sys.executable, str(ROOT / "examples" / "vllm_on_ray.py"), str(checkpoints["testbed"]), str(asked)]
    example += ["--output", str(answered), "--num-tokens", str(K), "--actors", "2", "--rows", "3"]
    engine = {"dtype": "float32", "kv_cache_memory_bytes": 2**26, "max_model_len": 1024, "enforce_eager": True}
    example += ["--max-tokens", "3", "--engine", json.dumps(engine)]
    subprocess.run(example, env={**os.environ, **ENVIRONMENT}, check=True, timeout=400)
    lines = [json.loads(line) for line in answered.read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(len(rows)))
    assert {line.get("actor") for line in lines} >= {0, 1}
    for line in lines[:-1]:
        scene, _ = ASKED[line["id"]]
        question = Question(prompt(rows[line["id"]]["question"]), (IMAGES[scene],))
        expected = reference.ask(question, make_pruner("dcp", num_tokens=K))
        assert line["prompt_tokens"] == expected.prompt_tokens
        assert line["answer"] == reference.processor.tokenizer.decode(expected.ids, skip_special_tokens=True)
    assert "missing.png" in lines[-1]["error"]
