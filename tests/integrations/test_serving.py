"""The server answers OpenAI clients as `model.generate` does under `prune`, and survives what it cannot answer."""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dcp_prune.errors import DcpPruneError, InvalidInputError, UnsupportedVersionError
from dcp_prune.integrations import serving
from dcp_prune.integrations.serving import Server, listen, url_of
from dcp_prune.integrations.transformers import get_handle, prune
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import make_pruner
from dcp_prune.testbed.load import load
from dcp_prune.testbed.world import make_scene
from tiny_llava import make_image

TOKENS, QUESTION = 6, "where is the cat"
PRUNER = make_pruner("dcp", num_tokens=8)


@dataclass(frozen=True)
class Running:
    server: Server
    url: str
    client: openai.OpenAI
    model: Any
    processor: Any

    def ask(self, *parts: dict[str, Any], **options: Any) -> Any:
        messages: Any = [{"role": "user", "content": list(parts)}]
        return self.client.chat.completions.create(
            model=self.server.name, messages=messages, max_tokens=TOKENS, temperature=0, **options
        )

    def answer(self, *parts: dict[str, Any]) -> str:
        return self.ask(*parts).choices[0].message.content

    def expected(self, *parts: dict[str, Any], pruned: bool = True) -> str:
        """On a copy of the model, which no server has seen."""
        twin = LlavaForConditionalGeneration.from_pretrained(self.model.name_or_path).eval()
        return generated(twin, self.processor, parts, PRUNER if pruned else None)


def generated(model: Any, processor: Any, parts: Sequence[dict[str, Any]], pruner: Pruner | None) -> str:
    """What `generate` answers under `prune`."""
    read = [
        {"type": "image", "image": decode(part["image_url"]["url"])} if part["type"] == "image_url" else part
        for part in parts
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": read}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with nullcontext() if pruner is None else prune(model, pruner, processor=processor):
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def encode(image: Image.Image) -> dict[str, Any]:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return shown(f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}")


def shown(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def decode(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def fetch(url: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """Status and text of a GET, or of a POST if there is a body."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, {"Content-Type": "application/json"})) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, pristine_model: Any, processor: Any) -> Iterator[Running]:
    """The toy model, saved and loaded as a user's own is, behind a real server on a free port of this machine."""
    folder = tmp_path_factory.mktemp("served")
    pristine_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    loaded = LlavaProcessor.from_pretrained(folder)
    server = Server(model, loaded, PRUNER, name="tiny")
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=(listener,))
        thread.start()
        client = openai.OpenAI(base_url=url_of(listener), api_key="none", max_retries=0)
        yield Running(server, url_of(listener).removesuffix("/v1"), client, model, loaded)
        server.stop()
        thread.join(timeout=20)
        assert not thread.is_alive()
    server.close()
    assert get_handle(model) is None


def test_an_answer_is_that_of_generate_under_prune(running: Running) -> None:
    parts = (encode(make_image(1)), text(QUESTION))
    found = running.ask(*parts)
    assert found.choices[0].message.content == running.expected(*parts)
    assert found.choices[0].message.content != running.expected(*parts, pruned=False), "pruning changes this answer"
    assert found.usage.completion_tokens == TOKENS
    assert found.usage.prompt_tokens > 36, "the client's prompt is counted, not the short one"


def test_either_name_limits_the_length_of_an_answer(running: Running) -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]
    for name in ("max_tokens", "max_completion_tokens"):
        limit: dict[str, Any] = {name: 3}
        found: Any = running.client.chat.completions.create(model="tiny", messages=messages, **limit)
        assert found.usage.completion_tokens == 3


def test_a_stream_gives_the_same_answer_piece_by_piece(running: Running) -> None:
    parts = (encode(make_image(1)), text(QUESTION))
    pieces = [chunk.choices[0].delta.content or "" for chunk in running.ask(*parts, stream=True)]
    assert sum(map(bool, pieces)) > 1
    assert "".join(pieces).split() == running.expected(*parts).split()


def test_the_client_of_the_page_gets_an_answer(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "serve.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    make_image(1).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    for written, here in (("http://127.0.0.1:8000", running.url), ('"testbed"', '"tiny"')):
        assert written in block
        block = block.replace(written, here)
    exec(compile(block, "serve.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_two_clients_at_once_get_the_answers_to_their_own_images(running: Running) -> None:
    asked = [(encode(make_image(seed)), text(QUESTION)) for seed in (1, 2, 3, 4)]
    expected = [running.expected(*parts) for parts in asked]
    assert len(set(expected)) > 1
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda parts: running.answer(*parts), asked)) == expected


def test_several_images_in_one_message_are_all_pruned(running: Running) -> None:
    parts = (encode(make_image(1)), encode(make_image(2)), text(QUESTION))
    assert running.answer(*parts) == running.expected(*parts)
    assert running.server.handle.last.indices.shape == (2, 8)


def test_a_prompt_without_image_is_answered_by_the_model_alone(running: Running) -> None:
    before = running.server.meter.calls
    assert running.answer(text(QUESTION)) == running.expected(text(QUESTION))
    assert running.server.meter.calls == before


def test_the_responses_api_answers_too(running: Running) -> None:
    image = encode(make_image(1))["image_url"]["url"]
    content: Any = [{"type": "input_image", "image_url": image}, {"type": "input_text", "text": QUESTION}]
    asked: Any = [{"role": "user", "content": content}]
    found = running.client.responses.create(
        model="tiny", input=asked, max_output_tokens=TOKENS, temperature=0, stream=False
    )
    assert found.output_text == running.expected(encode(make_image(1)), text(QUESTION))


@pytest.mark.parametrize(
    ("part", "cause"),
    [
        (shown("data:image/png;base64,bm8gaW1hZ2U="), "the image at data:image/png;base64 cannot be read"),
        (shown(encode(make_image(1))["image_url"]["url"][:3000]), "cannot be read"),
        (shown("http://127.0.0.1:9/no-server.png"), "the image at http://127.0.0.1:9/no-server.png cannot be read"),
        (shown(str(Path(__file__))), "an image must be given as a data:"),
        (shown(""), "an image must be given as a data:"),
        ({"type": "image_url"}, "the messages are not as OpenAI's API has them"),
        (text("<image> what is this"), "the text holds <image>"),
    ],
    ids=["no image", "cut short", "unreachable", "path", "empty", "missing", "placeholder"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_image_is_refused_with_a_sentence_and_the_server_goes_on(
    running: Running, part: dict[str, Any], cause: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(cause)):
        running.ask(part, text(QUESTION), stream=stream)
    parts = (encode(make_image(1)), text(QUESTION))
    assert running.answer(*parts) == running.expected(*parts)


def test_another_model_is_refused_and_the_own_one_listed(running: Running) -> None:
    assert [model.id for model in running.client.models.list()] == ["tiny"]
    messages: Any = [{"role": "user", "content": QUESTION}]
    with pytest.raises(openai.BadRequestError, match="pinned to 'tiny'"):
        running.client.chat.completions.create(model="gpt", messages=messages)
    assert '"ready"' in fetch(f"{running.url}/load_model", {"model": "tiny"})[1]
    assert "this server has one model, tiny" in fetch(f"{running.url}/load_model", {"model": "gpt"})[1]


def test_metrics_and_log_count_tokens_before_and_after(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    def read() -> dict[str, int]:
        lines = fetch(f"{running.url}/metrics")[1].splitlines()
        return {name: int(value) for name, value in (line.split() for line in lines if not line.startswith("#"))}

    caplog.set_level("INFO", logger=serving.LOGGER.name)
    before = read()
    running.ask(encode(make_image(1)), encode(make_image(2)), text(QUESTION))
    grown = {name.removeprefix("dcp_prune_"): value - before[name] for name, value in read().items()}
    cut = 2 * (36 - 8)
    assert grown["calls_total"] == 1
    assert grown["images_total"] == 2
    assert grown['visual_tokens_total{pruning="before"}'] == 72
    assert grown['visual_tokens_total{pruning="after"}'] == 16
    long = grown['prompt_tokens_total{pruning="before"}']
    assert grown['prompt_tokens_total{pruning="after"}'] == long - cut
    assert f"2 image(s), 72 -> 16 visual tokens, prompt {long} -> {long - cut} tokens" in caplog.messages
    assert fetch(f"{running.url}/health")[0] == 200


def test_a_port_that_is_taken_is_refused_before_a_model_is_loaded() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(InvalidInputError, match=rf"cannot listen on 127.0.0.1, port {port}: .*name another"):
            listen("127.0.0.1", port)
    with pytest.raises(InvalidInputError, match="port 99999: ports go from 0 to 65535"):
        listen("127.0.0.1", 99999)


def test_a_copy_of_a_served_model_is_counted_with_it(model: Any, processor: Any, make_inputs: Any) -> None:
    server = Server(model, processor, PRUNER, name="tiny")
    copy.deepcopy(model).generate(**make_inputs("USER: <image> what is this"), max_new_tokens=1)
    assert server.meter.calls == 1


def test_a_processor_without_chat_template_is_refused(model: Any, processor: Any) -> None:
    processor = LlavaProcessor(processor.image_processor, processor.tokenizer)
    with pytest.raises(InvalidInputError, match="the processor of tiny has no chat template"):
        Server(model, processor, PRUNER, name="tiny")
    assert get_handle(model) is None


@pytest.fixture
def import_anew(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    monkeypatch.delitem(sys.modules, serving.__name__)
    return lambda: import_module(serving.__name__)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "openai"])
def test_a_missing_package_names_the_extra(
    import_anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DcpPruneError, match=rf"serving needs {package}.*pip install 'dcp-prune\[serve\]'"):
        import_anew()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("chat_completion", "ChatCompletionHandler"),
        ("model_manager", "ModelManager"),
        ("response", "ResponseHandler"),
        ("utils", "BaseHandler"),
        ("utils", "GenerationState"),
    ],
)
def test_each_private_name_of_transformers_that_vanishes_is_one_sentence(
    import_anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    monkeypatch.delattr(f"transformers.cli.serving.{module}.{name}")
    with pytest.raises(UnsupportedVersionError, match=r"another `transformers serve`.*install transformers 5.19"):
        import_anew()


def test_a_private_signature_that_changes_is_one_sentence_and_leaves_the_model_alone(
    model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "ChatCompletionHandler", lambda manager: None)
    with pytest.raises(UnsupportedVersionError, match="another `transformers serve`"):
        Server(model, processor, PRUNER, name="tiny")
    assert get_handle(model) is None


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is another thing there")
def test_the_command_serves_the_testbed_until_it_is_interrupted() -> None:
    scene = make_scene(1_000_000_000)
    model, processor = load("aligned")
    pruner = make_pruner("dcp", num_tokens=16)
    command = [sys.executable, "-m", "dcp_prune.cli", "serve", "testbed-aligned", "--num-tokens", "16", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "answers at" in line)
        client = openai.OpenAI(base_url=line.split("answers at ")[1].split(";")[0], api_key="none")
        for question in scene.questions[:3]:
            content: Any = [encode(Image.fromarray(scene.image)), text(question.text)]
            found = client.chat.completions.create(
                model="testbed-aligned",
                messages=[{"role": "user", "content": content}],
                max_tokens=TOKENS,
                temperature=0,
            )
            assert found.choices[0].message.content == generated(model, processor, content, pruner) != ""
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().count("-> 16 visual tokens") == 3
        assert process.wait(timeout=30) == 0
