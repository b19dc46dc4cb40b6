"""The server answers OpenAI clients as `model.generate` does under `prune`, and survives what it cannot answer."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from served import PRUNER, QUESTION, TOKENS, Running, encode, fetch, generated, serve, shown, text
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dcp_prune.errors import DcpPruneError, InvalidInputError, UnsupportedVersionError
from dcp_prune.integrations import serving
from dcp_prune.integrations.serving import Server, answers, listen
from dcp_prune.integrations.transformers import get_handle
from dcp_prune.registry import make_pruner
from dcp_prune.testbed.load import load
from dcp_prune.testbed.world import make_scene
from tiny_llava import make_image


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, pristine_model: Any, processor: Any) -> Iterator[Running]:
    """The toy model, saved and loaded as a user's own is, behind a real server on a free port of this machine."""
    folder = tmp_path_factory.mktemp("served")
    pristine_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    with serve(model, LlavaProcessor.from_pretrained(folder)) as found:
        yield found
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
        (shown("data:image/png;base64,bm8gaW1hZ2U="), "the image at data:image/png;base64 is not an image"),
        (shown(encode(make_image(1))["image_url"]["url"][:3001]), "cannot be read: what follows is not base64"),
        (shown(encode(make_image(1))["image_url"]["url"][:1502]), "the file is truncated or damaged"),
        (shown("http://no.such.host.invalid/x.png"), "the image at http://no.such.host.invalid/x.png cannot be read"),
        (shown("http://127.0.0.1:9/x.png"), "the image at http://127.0.0.1:9/x.png is not fetched"),
        (shown(str(Path(__file__))), "an image must be given as a data:"),
        (shown(""), "an image must be given as a data:"),
        ({"type": "image_url"}, "image_url is missing"),
        (text("<image> what is this"), "the text holds <image>"),
    ],
    ids=["no image", "no base64", "cut short", "unreachable", "private", "path", "empty", "missing", "placeholder"],
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
    with pytest.raises(openai.BadRequestError, match="this server has one model, tiny"):
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
    for name in [name for name in sys.modules if name.startswith(serving.__name__)]:
        monkeypatch.delitem(sys.modules, name)
    return lambda: import_module(serving.__name__).Server


@pytest.mark.parametrize("package", ["fastapi", "httpx2", "openai", "uvicorn"])
def test_a_missing_package_names_the_extra(
    import_anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DcpPruneError, match=rf"serving needs {package}.*pip install 'dcp-prune\[serve\]'"):
        import_anew()


@pytest.mark.parametrize(
    "name",
    [
        "cli.serving.chat_completion.ChatCompletionHandler",
        "cli.serving.response.ResponseHandler",
        "cli.serving.utils.BaseGenerateManager",
        "cli.serving.utils.DirectStreamer",
        "cli.serving.utils.InferenceThread",
        "cli.serving.utils._GenerationCancelled",
        "cli.serving.utils._StreamError",
        "utils.chat_template_utils._get_template_variables",
    ],
)
def test_each_private_name_of_transformers_that_vanishes_is_one_sentence(
    import_anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr(f"transformers.{name}")
    with pytest.raises(UnsupportedVersionError, match=r"another `transformers serve`.*install transformers 5.19"):
        import_anew()


@pytest.mark.parametrize("handler", ["ChatCompletionHandler", "ResponseHandler"])
@pytest.mark.parametrize("method", ["_streaming", "_non_streaming"])
def test_a_private_signature_that_changes_is_one_sentence_and_leaves_the_model_alone(
    model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch, handler: str, method: str
) -> None:
    monkeypatch.setattr(getattr(answers, handler), method, lambda self, request: None)
    with pytest.raises(UnsupportedVersionError, match="another `transformers serve`"):
        Server(model, processor, PRUNER, name="tiny")
    assert get_handle(model) is None


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is another thing there")
def test_the_command_serves_the_testbed_until_it_is_interrupted() -> None:
    scene = make_scene(1_000_000_000)
    model, processor = load("weak")
    pruner = make_pruner("dcp", num_tokens=16)
    command = [sys.executable, "-m", "dcp_prune.cli", "serve", "testbed-weak", "--num-tokens", "16", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "answers at" in line)
        client = openai.OpenAI(base_url=line.split("answers at ")[1].split(";")[0], api_key="none")
        for question in scene.questions[:3]:
            content: Any = [encode(Image.fromarray(scene.image)), text(question.text)]
            found = client.chat.completions.create(
                model="testbed-weak",
                messages=[{"role": "user", "content": content}],
                max_tokens=TOKENS,
                temperature=0,
            )
            assert found.choices[0].message.content == generated(model, processor, content, pruner) != ""
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().count("-> 16 visual tokens") == 3
        assert process.wait(timeout=30) == 0
