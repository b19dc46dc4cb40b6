"""Whatever a client sends is answered as it was meant, or refused by name; and no client makes others wait."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import Request, urlopen

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import QUESTION, Running, encode, fetch, post, serve, shown, text
from transformers import GenerationConfig

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.serving import Limits, answers, pictures
from dcp_prune.integrations.serving.answers import Answers
from dcp_prune.integrations.serving.asked import Chat, check
from tiny_llava import make_image

PICTURE = encode(make_image(1))
URL = PICTURE["image_url"]["url"]
LIMITS = Limits(body=200_000, pictures=3, picture=50_000, pixels=84 * 84 * 3, text=2_000, url=100, seconds=1.0)


@pytest.fixture(scope="module")
def running(pristine_model: Any, processor: Any) -> Iterator[Running]:
    """With small limits, and pictures of this machine allowed."""
    model = copy.deepcopy(pristine_model)
    with serve(model, processor, limits=LIMITS, allow_private_addresses=True) as found:
        yield found


def user(*parts: Any, **more: Any) -> dict[str, Any]:
    content = list(parts) or [text(QUESTION)]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0, **more}


def chat(running: Running, body: Any) -> tuple[int, str]:
    return fetch(f"{running.url}/v1/chat/completions", body)


def refused(answer: tuple[int, str], cause: str, status: int = 400) -> None:
    assert answer[0] == status, answer
    error = json.loads(answer[1])["error"]
    assert cause in error["message"], error
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ({}, "messages is missing"),
        ([1], "the body must be a JSON object"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, "messages must be a valid list"),
        ({"messages": [5]}, "messages.0 "),
        ({"messages": [{"content": "hello"}]}, "messages.0.role is missing"),
        ({"messages": [{"role": "robot", "content": "hello"}]}, "messages.0.role must be 'system', 'user'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content must be a valid list"),
        ({"messages": [{"role": "user", "content": "hello", "mood": "good"}]}, "messages.0: mood is not known"),
        (user({"type": "text", "text": 5}), "messages.0.content.0.text must be a valid string"),
        (user({"text": "hello"}), "a part has no type"),
        (user({"type": "text", "text": "a", "colour": "red"}), "colour is not known"),
        (user({"type": "image_url", "image_url": None}), "image_url is missing"),
        (user({"type": "image_url", "image_url": {"url": 5}}), "url must be a valid string"),
        (user({"type": "image", "image": URL}), "a part of type 'image' is not read here; send text, or pictures as"),
        (user({"type": "image", "source": {"data": "aa"}}), "a part of type 'image' is not read here"),
        (user({"type": "input_audio", "input_audio": {"data": "aa"}}), "a part of type 'input_audio' is not read here"),
        (user({"type": "video_url", "video_url": {"url": "http://x"}}), "a part of type 'video_url' is not read here"),
        (user({"type": "file", "file": {"file_id": "1"}}), "a part of type 'file' is not read here"),
        (user(max_tokens=0), "max_tokens must be greater than or equal to 1"),
        (user(max_tokens=-1), "max_tokens must be greater than or equal to 1"),
        (user(max_tokens="many"), "max_tokens must be a valid integer"),
        (user(max_tokens=10**30), "more than the 512 of this model"),
        (user(max_tokens=600), "600 new ones are asked for, more than the 512 of this model"),
        (user(temperature="hot"), "temperature must be a valid number"),
        (user(temperature=-1), "temperature must be greater than or equal to 0"),
        (user(top_p=0), "top_p must be greater than 0"),
        (user(seed=10**30), "seed"),
        (user(stop=5), "stop must be a valid list"),
        (user(stop=[""]), "stop.0 is empty"),
        (user(stop=["a"] * 17), "stop is too long; 16 are the most"),
        (user(stop="a" * 201), "stop.0 is too long; 200 are the most"),
        (user(stream="yes"), "stream must be a valid boolean"),
        (user(n=2), "n is not supported; leave it out, or send 1, got 2"),
        (user(logprobs=True), "logprobs is not supported"),
        (user(top_logprobs=3), "top_logprobs is not supported"),
        (user(presence_penalty=1.5), "presence_penalty is not supported"),
        (user(frequency_penalty=0.5), "frequency_penalty is not supported"),
        (user(logit_bias={"5": 10}), "logit_bias is not known here"),
        (user(response_format={"type": "json_object"}), "response_format is not supported"),
        (user(beam_width=4), "beam_width is not known here"),
        (user(tools=5), "tools must be a valid list"),
        (user(tools=[{"type": "function", "function": {"name": "f"}}]), "the chat template of tiny does not read them"),
        (user(chat_template_kwargs={"tokenize": False}), "the chat template of tiny does not read it"),
        (user(chat_template_kwargs={"chat_template": "{{ 1 }}"}), "the chat template of tiny does not read it"),
        (user(chat_template_kwargs={"messages": "x"}), "the chat template of tiny does not read it"),
        (user(chat_template_kwargs=5), "chat_template_kwargs must be a valid dictionary"),
        (user(generation_config="{"), "generation_config must be a JSON object"),
        (user(generation_config='{"num_beams": 4}'), "num_beams is not known here"),
        (user(text("half \ud800 a letter")), "half a character"),
        (user(text("x" * 3000)), "3,"),
        (user(*[PICTURE] * 4), "holds 4 pictures; 3 are the most"),
        (user(shown(f"http://127.0.0.1/{'x' * 100}")), "100 are the most"),
        (user(shown("file:///etc/passwd")), "an image must be given as a data:"),
        (user(encode(make_image(1).resize((200, 200)))), "has too many pixels"),
        (user(encode(make_image(1).resize((5, 5)))), "5 x 5 pixels, too small"),
        (user(text("where is <image>")), "the text holds <image>"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_a_request_that_cannot_be_answered_as_it_is_meant_is_refused_by_name(
    running: Running, body: Any, cause: str
) -> None:
    refused(chat(running, body), cause)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 30_000, b"NaN", b'"text"'])
def test_a_body_that_is_no_json_object_is_refused(running: Running, data: bytes) -> None:
    for route in ("/v1/chat/completions", "/v1/responses", "/load_model"):
        refused(post(running.url + route, data), "the body ")


def test_endless_objects_are_refused_before_they_are_read(model: Any, processor: Any) -> None:
    with serve(model, processor, limits=Limits(items=1_000)) as strict:
        for item in ({"role": "user"}, [], {}):
            refused(chat(strict, {"messages": [item] * 1_000}), "too many objects and lists; 1,000 are the most")


def test_deep_tools_are_refused_with_a_sentence(model: Any, processor: Any) -> None:
    processor = copy.deepcopy(processor)
    processor.chat_template += "{% if tools %}{{ tools | tojson }}{% endif %}"
    deep: Any = {}
    for _ in range(600):
        deep = {"a": deep}
    with serve(model, processor) as found:
        status, body = chat(found, user(tools=[{"type": "function", "function": {"name": "f", "parameters": deep}}]))
        assert status in (200, 400), body
        refused(chat(found, user(tools=[{"function": {"name": "<image>"}}])), "the text holds <image>")


def test_too_many_bytes_are_refused_before_they_are_read(running: Running) -> None:
    refused(chat(running, user(text("x" * 300_000))), "more than 200,000 bytes", status=413)


def test_what_says_nothing_new_is_accepted(running: Running) -> None:
    plain = json.loads(chat(running, user(PICTURE, text(QUESTION)))[1])["choices"][0]["message"]["content"]
    detailed = {"type": "image_url", "image_url": {"url": URL, "detail": "high"}}
    said = user(detailed, text(QUESTION), n=1, logprobs=False, presence_penalty=0.0, frequency_penalty=0, user="me")
    said |= {
        "stop": None,
        "tools": None,
        "response_format": {"type": "text"},
        "stream_options": {},
        "metadata": {"a": "b"},
    }
    status, body = chat(running, said)
    assert status == 200, body
    assert json.loads(body)["choices"][0]["message"]["content"] == plain
    as_text = user({"type": "image_url", "image_url": URL}, text(QUESTION))
    assert json.loads(chat(running, as_text)[1])["choices"][0]["message"]["content"] == plain


def test_an_earlier_answer_comes_back_as_the_client_holds_it(running: Running) -> None:
    found = running.ask(PICTURE, text(QUESTION))
    earlier = found.choices[0].message.model_dump()
    messages: Any = [{"role": "user", "content": [PICTURE, text(QUESTION)]}, earlier, {"role": "user", "content": "a"}]
    again = running.client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, temperature=0)
    assert again.usage.prompt_tokens > found.usage.prompt_tokens


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_ends_before_what_stops_it(running: Running, streamed: bool) -> None:
    asked: Any = {**user(PICTURE, text(QUESTION)), "model": "tiny", "max_tokens": 24}
    plain = running.client.chat.completions.create(**asked)
    whole = plain.choices[0].message.content
    words = whole.split()
    stop = next(word for word in words[1:-1] if word != words[0])
    found: Any = running.client.chat.completions.create(**asked, stop=["never said", stop], stream=streamed)
    if streamed:
        found = "".join(chunk.choices[0].delta.content or "" for chunk in found)
    else:
        assert found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens < plain.usage.completion_tokens
        found = found.choices[0].message.content
    assert found.strip() == whole[: whole.index(stop)].strip() != ""


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_pieces_up_to_a_stop_are_the_text_up_to_it(pieces: list[str], stops: list[str]) -> None:
    queue = answers._UntilStopped(stops)
    for piece in [*pieces, None]:
        queue.put_nowait(piece)
    found = [queue.get_nowait() for _ in range(queue.qsize())]
    assert found.pop() is None
    written, expected = "", "".join(pieces)
    for piece in pieces:  # nothing is read behind the piece that completes a stop
        written += piece
        if ends := [written.find(stop) for stop in stops if stop in written]:
            expected = written[: min(ends)]
            break
    assert "".join(found) == expected


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [{"n": 2}, {"logprobs": True, "top_logprobs": 2}])
def test_openais_client_learns_what_is_not_supported(running: Running, asked: dict[str, Any], stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match=f"{min(asked)} is not supported"):
        running.ask(PICTURE, text(QUESTION), **asked, stream=stream)


def test_what_transformers_chat_sends_is_answered(running: Running) -> None:
    settings = GenerationConfig(max_new_tokens=3, do_sample=True, temperature=0.7, top_k=5).to_json_string()
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "generation_config": settings}
    status, streamed = chat(running, {**body, "stream": True})
    assert status == 200, streamed
    last = json.loads([line for line in streamed.splitlines() if line][-1].removeprefix("data: "))
    assert last["usage"]["completion_tokens"] == 3


def test_the_responses_api_streams_only_when_asked(running: Running) -> None:
    content: Any = [{"type": "input_image", "image_url": URL}, {"type": "input_text", "text": QUESTION}]
    asked: Any = {"model": "tiny", "input": [{"role": "user", "content": content}], "max_output_tokens": 6}
    whole = running.client.responses.create(**asked, temperature=0)
    events = list(running.client.responses.create(**asked, temperature=0, stream=True))
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces).split() == whole.output_text.split() != []
    flat = running.client.responses.create(**{**asked, "input": content}, temperature=0)
    assert flat.output_text == whole.output_text


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ({}, "input must be a text or a list"),
        ({"input": []}, "input must be a text or a list"),
        ({"input": 5}, "input must be a text or a list"),
        ({"input": [5]}, "input is not as OpenAI's API has it"),
        ({"input": [{"role": "user", "content": "a"}, {"type": "item_reference"}]}, "item_reference"),
        ({"input": "a", "messages": []}, "messages is not known here"),
        ({"input": "a", "previous_response_id": "1"}, "previous_response_id is not known here"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens must be greater"),
        ({"input": "a", "max_tokens": 5}, "max_tokens is not known here"),
        ({"input": "a", "text": {"format": {"type": "json_object"}}}, "text is not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "'input_file' is not read here"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_the_responses_api_refuses_by_name_too(running: Running, body: Any, cause: str) -> None:
    refused(fetch(f"{running.url}/v1/responses", body), cause)


def test_a_temperature_samples_and_a_seed_makes_that_repeatable(running: Running) -> None:
    def ask(seed: int) -> str:
        body = user(PICTURE, text(QUESTION), temperature=2.0, seed=seed)
        return json.loads(chat(running, body)[1])["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, [1, 2, 3, 4, 1, 2, 3, 4]))
    assert found[:4] == found[4:]
    assert len(set(found)) > 1


def test_a_template_argument_is_taken_if_the_template_reads_it(model: Any, processor: Any) -> None:
    processor = copy.deepcopy(processor)
    processor.chat_template += "{% if enable_thinking %} what {% endif %}{{ bos_token }}"
    found = Answers("tiny", model, processor)

    def length(**arguments: Any) -> int:
        asked = check(Chat, user(chat_template_kwargs=arguments), LIMITS)
        return found.prompt(asked, [])["input_ids"].shape[1]

    assert length(enable_thinking=True) == length() + 1
    for name in ("bos_token", "messages", "add_generation_prompt"):
        with pytest.raises(InvalidInputError, match=f"{name}: the chat template of tiny does not read it"):
            length(**{name: "x"})


def test_without_its_key_nobody_is_answered(model: Any, processor: Any) -> None:
    with serve(model, processor, api_key="secret") as guarded:
        for route in ("/v1/models", "/metrics"):
            refused(fetch(guarded.url + route), "asks for its API key", status=401)
        for route in ("/v1/chat/completions", "/v1/responses", "/load_model"):
            refused(fetch(guarded.url + route, {}), "asks for its API key", status=401)
        assert fetch(f"{guarded.url}/health")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            guarded.client.models.list()
        known = guarded.client.with_options(api_key="secret")
        assert [each.id for each in known.models.list()] == ["tiny"]


def test_an_empty_key_is_refused(model: Any, processor: Any) -> None:
    with pytest.raises(InvalidInputError, match="the API key is empty"), serve(model, processor, api_key=" "):
        pass


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/v1/completions"])
def test_other_routes_are_not_there_and_say_so_in_the_same_form(running: Running, path: str) -> None:
    refused(fetch(running.url + path), "Not Found", status=404)


@contextmanager
def others(answer: Any) -> Iterator[tuple[str, list[str]]]:
    """Another server on this machine, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            answer(self)

        def log_message(self, format: str, *_: Any) -> None:
            pass

    other = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{other.server_port}", asked
    finally:
        other.shutdown()


def give(handler: BaseHTTPRequestHandler, data: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


def test_a_picture_behind_an_address_is_seen_as_if_it_were_sent(running: Running) -> None:
    picture = answers_of(running, PICTURE)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/moved.png":
            give(handler, b"", 302, Location="/photo.png")
        else:
            give(handler, base64.b64decode(URL.partition(",")[2]))

    with others(answer) as (url, asked):
        assert answers_of(running, shown(f"{url}/moved.png")) == picture
    assert asked == ["/moved.png", "/photo.png"]


def answers_of(running: Running, part: dict[str, Any]) -> str:
    status, body = chat(running, user(part, text(QUESTION)))
    assert status == 200, body
    return json.loads(body)["choices"][0]["message"]["content"]


def test_an_address_that_drips_is_left_after_the_deadline_and_nobody_waits_for_it(running: Running) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        give(handler, b"")
        for _ in range(50):
            try:
                handler.wfile.write(b"x")
                handler.wfile.flush()
            except OSError:
                return
            time.sleep(0.1)

    with others(drip) as (url, _), ThreadPoolExecutor(4) as pool:
        start = time.perf_counter()
        dripping = [pool.submit(chat, running, user(shown(f"{url}/{n}"), text(QUESTION))) for n in range(4)]
        time.sleep(0.2)
        asked = time.perf_counter()
        assert fetch(f"{running.url}/health")[0] == 200
        assert time.perf_counter() - asked < 0.5
        for future in dripping:
            refused(future.result(), "did not arrive within 1 seconds")
        assert time.perf_counter() - start < 3


def test_an_endless_picture_is_left_at_its_limit(running: Running) -> None:
    def flood(handler: BaseHTTPRequestHandler) -> None:
        give(handler, b"")
        try:
            for _ in range(10_000):
                handler.wfile.write(b"x" * 10_000)
        except OSError:
            pass

    with others(flood) as (url, _):
        refused(chat(running, user(shown(url), text(QUESTION))), "has more than 50,000 bytes")


@pytest.mark.parametrize("status", [404, 500])
def test_an_address_without_a_picture_is_refused(running: Running, status: int) -> None:
    with others(lambda handler: give(handler, b"", status)) as (url, _):
        refused(chat(running, user(shown(url), text(QUESTION))), f"the answer was {status}")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "[::ffff:127.0.0.1]"])
def test_addresses_that_are_not_public_are_not_asked(host: str) -> None:
    with others(lambda handler: give(handler, b"")) as (url, asked):
        address = url.replace("127.0.0.1", host)
        with pytest.raises(InvalidInputError, match=r"not a public address.*--allow-private-addresses|cannot be read"):
            asyncio.run(pictures.fetch([address], LIMITS))
        assert asked == []


def test_a_public_address_cannot_send_the_server_to_a_private_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "is_public", lambda address: address == "127.0.0.1")
    with others(lambda handler: give(handler, b"secret")) as (private, asked):
        there = private.replace("127.0.0.1", "127.0.0.2")
        with others(lambda handler: give(handler, b"", 302, Location=there)) as (url, first):
            with pytest.raises(InvalidInputError, match=r"127\.0\.0\.2 is not a public address"):
                asyncio.run(pictures.fetch([url], LIMITS))
            assert first == ["/"]
    assert asked == []


def test_the_address_that_was_looked_at_is_the_one_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "is_public", lambda address: True)
    with others(lambda handler: give(handler, handler.headers["Host"].encode())) as (url, _):
        port = url.rpartition(":")[2]
        answered = [[(2, 1, 6, "", ("127.0.0.1", int(port)))], OSError("asked twice")]

        async def resolve(*_: Any, **__: Any) -> Any:
            found = answered.pop(0)
            if isinstance(found, Exception):
                raise found
            return found

        async def ask() -> list[bytes]:
            monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
            return await pictures.fetch([f"http://pictures.example:{port}/a.png"], LIMITS)

        assert asyncio.run(ask()) == [f"pictures.example:{port}".encode()]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        *(
            (address, False)
            for address in "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1".split()
        ),
        *((address, False) for address in "0.0.0.0 224.0.1.1 255.255.255.255 ::1 :: fe80::1%eth0 fd00::1".split()),
        *((address, False) for address in "::ffff:10.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: 2001::1 ff0e::1".split()),
    ],
)
def test_only_the_internet_is_public(address: str, public: bool) -> None:
    assert pictures.is_public(address) is public


def test_a_prompt_that_takes_long_to_make_keeps_nobody_waiting(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: Any) -> None:
        time.sleep(1.5)
        raise InvalidInputError("too late")

    monkeypatch.setattr(running.server._answers, "prompt", slow)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(chat, running, user()) for _ in range(4)]
        time.sleep(0.2)
        start = time.perf_counter()
        assert fetch(f"{running.url}/health")[0] == fetch(f"{running.url}/metrics")[0] == 200
        assert time.perf_counter() - start < 0.7
        for future in waiting:
            refused(future.result(), "too late")


def test_a_fault_of_the_model_is_an_error_of_the_server_in_one_sentence(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError('out of "memory"\nat last')

    monkeypatch.setattr(running.server._answers, "model", replace_generate(running.model, fail))
    status, body = chat(running, user())
    assert status == 500
    assert json.loads(body)["error"]["message"] == "the model failed (RuntimeError); the server's log says more"
    streamed = chat(running, user(stream=True))[1]
    last = [line for line in streamed.splitlines() if line][-1]
    assert "the model failed (RuntimeError)" in json.loads(last.removeprefix("data: "))["error"]


def replace_generate(model: Any, generate: Any) -> Any:
    other = copy.copy(model)
    other.__dict__ = {**model.__dict__, "generate": generate}
    return other


def test_limits_can_be_set(model: Any, processor: Any) -> None:
    with serve(model, processor, limits=replace(Limits(), text=10)) as strict:
        refused(chat(strict, user(text("a longer text"))), "10 are the most")


def test_a_request_id_of_the_client_is_kept(running: Running) -> None:
    request = Request(
        f"{running.url}/v1/chat/completions", json.dumps(user()).encode(), {"X-Request-Id": "mine", "A": "b"}
    )
    with urlopen(request) as answer:
        assert json.loads(answer.read())["id"] == "mine"
