"""A toy model behind a real server on a free port of this machine, and ways to ask it."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
from PIL import Image
from transformers import LlavaForConditionalGeneration

from dcp_prune.integrations.serving import Server, listen, url_of
from dcp_prune.integrations.transformers import prune
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import make_pruner

TOKENS, QUESTION = 6, "where is the cat"
PRUNER = make_pruner("dcp", num_tokens=8)


@contextmanager
def serve(model: Any, processor: Any, **options: Any) -> Iterator[Running]:
    """Until the block is left."""
    server = Server(model, processor, PRUNER, name="tiny", **options)
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=(listener,))
        thread.start()
        client = openai.OpenAI(base_url=url_of(listener), api_key="none", max_retries=0)
        yield Running(server, url_of(listener).removesuffix("/v1"), client, model, processor)
        server.stop()
        thread.join(timeout=20)
        assert not thread.is_alive()
    server.close()


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


def fetch(url: str, body: Any = None) -> tuple[int, str]:
    """Status and text of a GET, or of a POST if there is a body."""
    return post(url, None if body is None else json.dumps(body).encode())


def post(url: str, data: bytes | None) -> tuple[int, str]:
    """The same with any bytes for a body."""
    try:
        with urlopen(Request(url, data, {"Content-Type": "application/json"})) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}
