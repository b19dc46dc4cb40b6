"""The OpenAI server of vLLM with the plug-in, asked by HTTP as any client would."""
# pyright: reportMissingImports=false

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import Answer, Question, Reference
from PIL import Image
from servers import Server, chat, data_url

from dcp_prune.registry import make_pruner
from dcp_prune.testbed.language import prompt
from dcp_prune.testbed.seeds import TUNING
from dcp_prune.testbed.world import make_scene

N, K = 576, 64
CLOSE = 1e-4
SCENES = [make_scene(seed, "crowded") for seed in range(TUNING.start + 10, TUNING.start + 20)]
IMAGES = [Image.fromarray(scene.image) for scene in SCENES]
TOP = {"logprobs": True, "top_logprobs": 10, "return_tokens_as_token_ids": True}


@pytest.fixture(scope="module")
def server(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with Server(checkpoints["testbed"], {"num_tokens": K}, folder=folder) as server:
        yield server


@pytest.fixture(scope="module")
def reference(checkpoints: dict[str, Path]) -> Reference:
    return Reference(checkpoints["testbed"])


def body(scene: int, number: int, **options: Any) -> dict[str, Any]:
    return chat(SCENES[scene].questions[number].text, data_url(IMAGES[scene]), **{**TOP, **options})


def difference(answer: dict[str, Any], reference: Reference, scene: int, number: int, num_tokens: int = K) -> float:
    """By how much the logprobs of an answer differ at most from those of transformers with the same pruner."""
    question = Question(prompt(SCENES[scene].questions[number].text), (IMAGES[scene],))
    return gap(answer, reference.ask(question, make_pruner("dcp", num_tokens=num_tokens)))


def gap(answer: dict[str, Any], expected: Answer) -> float:
    """By how much the logprobs of two answers differ at most."""
    assert answer["usage"]["prompt_tokens"] == expected.prompt_tokens
    steps = answer["choices"][0]["logprobs"]["content"]
    assert [token_id(step) for step in steps] == list(expected.ids)
    return max(
        abs(top["logprob"] - expected.logprobs[number, token_id(top)].item())
        for number, step in enumerate(steps)
        for top in step["top_logprobs"]
        if top["logprob"] > -20
    )


def token_id(entry: dict[str, Any]) -> int:
    return int(entry["token"].removeprefix("token_id:"))


def test_usage_counts_the_prompt_without_the_dropped_tokens(server: Server, reference: Reference) -> None:
    whole = reference.processor(text=prompt(SCENES[0].questions[0].text), images=IMAGES[0])["input_ids"][0]
    assert server.ask(body(0, 0))["usage"]["prompt_tokens"] == len(whole) - (N - K)


def test_two_questions_about_one_image_are_answered_as_in_transformers(server: Server, reference: Reference) -> None:
    before = server.metrics()
    for number in (0, 5):
        answer = server.ask(body(1, number))
        assert difference(answer, reference, 1, number) < CLOSE
    after = server.metrics()
    hits = "dcp_prune:stage1_hits_total"
    assert after[hits] - before.get(hits, 0) == 1  # the second question found the image encoded


def test_a_repeated_question_comes_from_the_prefix_cache(server: Server) -> None:
    first, again = server.ask(body(2, 1)), server.ask(body(2, 1))
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= K
    assert again["choices"][0]["message"] == first["choices"][0]["message"]


def test_a_stream_brings_the_same_words_and_the_same_usage(server: Server) -> None:
    whole = server.ask(body(3, 2))
    streamed = body(3, 2, stream=True, stream_options={"include_usage": True})
    with server.client.stream("POST", "/v1/chat/completions", json=streamed) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


def test_the_client_of_openai_is_understood(server: Server) -> None:
    from openai import OpenAI

    content: Any = chat(SCENES[4].questions[0].text, data_url(IMAGES[4]))["messages"]
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = client.chat.completions.create(model="testbed", messages=content, max_tokens=1, temperature=0)
    assert answer.choices[0].message.content


def test_a_request_may_ask_for_fewer_tokens(server: Server, reference: Reference) -> None:
    answer = server.ask(body(5, 3, num_tokens=7))
    assert difference(answer, reference, 5, 3, num_tokens=7) < CLOSE


@pytest.mark.parametrize("asked", [K + 1, 0, -3, "many", 1.5, True])
def test_a_budget_above_the_servers_is_a_bad_request_and_the_server_lives_on(server: Server, asked: Any) -> None:
    refused = server.post(body(6, 0, num_tokens=asked))
    assert refused.status_code == 400
    assert f"but an image may have 1 to {K} visual tokens on this server" in refused.json()["error"]["message"]
    assert server.ask(body(6, 0))["usage"]["prompt_tokens"] > K


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


BROKEN = {
    "cut short": data_url(png(IMAGES[0])[:900]),
    "no picture": data_url(b"this is no picture"),
    "empty": data_url(b""),
    "no base64": "data:image/png;base64,%%%",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_image_that_cannot_be_read_is_a_bad_request_and_the_server_lives_on(server: Server, kind: str) -> None:
    assert 400 <= server.post(chat("is there a cat ?", BROKEN[kind])).status_code < 500
    assert server.is_healthy()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 3), (4000, 3000)])
def test_pictures_of_odd_sizes_are_answered(server: Server, size: tuple[int, int]) -> None:
    answer = server.ask(chat("is there a cat ?", data_url(Image.new("RGB", size, "red"))))
    assert answer["usage"]["prompt_tokens"] > K


def test_metrics_count_tokens_before_and_after_and_what_was_chosen(server: Server) -> None:
    before = server.metrics()
    server.ask(body(7, 0))
    server.ask(body(7, 1))
    server.ask(body(7, 1))
    grown = {name: value - before.get(name, 0.0) for name, value in server.metrics().items()}
    assert grown["dcp_prune:visual_tokens_before_total"] == 3 * N
    assert grown["dcp_prune:visual_tokens_after_total"] == 3 * K
    assert grown["dcp_prune:pruned_images_total"] == 2  # the third answer found its image chosen
    assert grown["dcp_prune:stage1_lookups_total"] == 2
    assert grown["dcp_prune:stage1_hits_total"] == 1
    assert grown["dcp_prune:kappa_count"] == 2
    assert grown["dcp_prune:kappa_sum"] > 0
    assert 0 <= grown["dcp_prune:reselected_images_total"] <= 2
    assert grown["dcp_prune:select_milliseconds_count"] == 2
    assert grown["dcp_prune:encode_milliseconds_sum"] > 0
