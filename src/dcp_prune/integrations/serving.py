"""The OpenAI-compatible server of `transformers serve` for one model, with a pruner attached to it.

Everything that is private in transformers and needed here is imported and used in this module only.
"""

from __future__ import annotations

import functools
import logging
import socket
import threading
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from transformers import PreTrainedModel, ProcessorMixin
from transformers.image_utils import load_image

from dcp_prune import __version__
from dcp_prune.errors import DcpPruneError, InvalidInputError, UnsupportedVersionError
from dcp_prune.integrations.transformers import PruneHandle, PruneRecord, prune
from dcp_prune.pruners.base import Pruner

try:
    import openai  # noqa: F401  # the types of requests and answers
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
except ModuleNotFoundError as missing:
    raise DcpPruneError(
        f"serving needs {missing.name}, which is not installed; run: pip install 'dcp-prune[serve]'"
    ) from missing

_CHANGED = (
    "this version of transformers has another `transformers serve` than the one that serving builds on; "
    "install transformers 5.19 to 5.23, with which it is tested"
)
try:
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.utils import BaseHandler, GenerationState
except (ImportError, AttributeError) as changed:
    raise UnsupportedVersionError(_CHANGED) from changed

LOGGER = logging.getLogger(__name__)
"""One line for each call with images, at level INFO."""

_IMAGE_SECONDS = 10.0
"""How long an image behind an address may take to arrive."""


@dataclass
class Meter:
    """Counts what pruning did to all calls with images since the server started.

    Attributes:
        calls: to `generate` that came with images; `images` of all of them.
        visual_tokens: before and after, of all images.
        prompt_tokens: before and after, of all prompts with images: what prefill processes.
    """

    calls: int = 0
    images: int = 0
    visual_tokens: tuple[int, int] = (0, 0)
    prompt_tokens: tuple[int, int] = (0, 0)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, record: PruneRecord) -> None:
        """Adds one call and logs it."""
        images = record.tokens_per_image
        visual = (sum(before for before, _ in images), sum(after for _, after in images))
        prompt = (record.prompt_before, record.prompt_after)
        with self._lock:
            self.calls += 1
            self.images += len(images)
            self.visual_tokens = (self.visual_tokens[0] + visual[0], self.visual_tokens[1] + visual[1])
            self.prompt_tokens = (self.prompt_tokens[0] + prompt[0], self.prompt_tokens[1] + prompt[1])
        LOGGER.info("%d image(s), %d -> %d visual tokens, prompt %d -> %d tokens", len(images), *visual, *prompt)

    def __deepcopy__(self, memo: object) -> Meter:
        """Calls of a copied model are counted with those of the original."""
        return self

    def exposition(self) -> str:
        """The counts in the text format of Prometheus."""
        with self._lock:
            counts = {
                "calls": ("Calls that came with images.", {"": self.calls}),
                "images": ("Images of these calls.", {"": self.images}),
                "visual_tokens": ("Visual tokens of these images, without and with pruning.", self.visual_tokens),
                "prompt_tokens": ("Prompt tokens of these calls, without and with pruning.", self.prompt_tokens),
            }
        lines: list[str] = []
        for name, (text, values) in counts.items():
            metric = f"dcp_prune_{name}_total"
            lines += [f"# HELP {metric} {text}", f"# TYPE {metric} counter"]
            if isinstance(values, tuple):
                values = dict(zip(('{pruning="before"}', '{pruning="after"}'), values, strict=True))
            lines += [f"{metric}{label} {value}" for label, value in values.items()]
        return "\n".join(lines) + "\n"


class Server:
    """One model behind `/v1/chat/completions` and `/v1/responses`, streaming or not, with its images pruned.

    Further routes: `/v1/models`, `/health`, and `/metrics` with the counts of `meter`. Requests
    that carry an image which cannot be read get status 400 and a sentence. Calls run one after the other.

    Attributes:
        app: the FastAPI application.
        handle: of the pruner; None without one.
        meter: what pruning did so far.

    Raises (at construction):
        UnsupportedModelError, InvalidInputError, MissingSignalError: see `prune`.
        UnsupportedVersionError: the server of this version of transformers is built in another way.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, pruner: Pruner | None, *, name: str) -> None:
        """Attaches `pruner` (None: serve all visual tokens) to `model`, which clients call by `name`.

        The processor needs a chat template.
        """
        if getattr(processor, "chat_template", None) is None:
            raise InvalidInputError(
                f"the processor of {name} has no chat template, without which messages do not become a prompt; "
                "set processor.chat_template, or put chat_template.jinja into the model's folder"
            )
        self.name = name
        self.meter = Meter()
        self.handle: PruneHandle | None = None
        if pruner is not None:
            self.handle = prune(model, pruner, processor=processor, on_record=self.meter.count)
        try:
            self.app = self._build(_OneModel(name, model, processor))
        except (AttributeError, TypeError) as error:
            self.close()
            raise UnsupportedVersionError(_CHANGED) from error
        self._uvicorn: uvicorn.Server | None = None

    def _build(self, manager: _OneModel) -> FastAPI:
        state = GenerationState()
        chat: Any = ChatCompletionHandler(manager, state)
        response: Any = ResponseHandler(manager, state)
        for handler in (chat, response):
            # Images are read before anything else, so that the client learns what is wrong with them.
            handler.get_processor_inputs_from_messages = functools.partial(
                _read_messages, marker=getattr(manager.processor, "image_token", None)
            )

        async def complete(request: Request, body: dict[str, Any]) -> Any:
            if "max_completion_tokens" in body:  # the newer name, which older versions of transformers pass over
                body["max_tokens"] = body.pop("max_completion_tokens")
            return await chat.handle_request(body, _id_of(request))

        async def respond(request: Request, body: dict[str, Any]) -> Any:
            return await response.handle_request(body, _id_of(request))

        def load(body: dict[str, Any]) -> Any:  # what `transformers chat` asks for first
            events = manager.load_model_streaming(manager.process_model_name(str(body.get("model"))))
            return StreamingResponse(events, media_type="text/event-stream")

        app = FastAPI(title="dcp-prune", version=__version__)
        app.add_api_route("/v1/chat/completions", complete, methods=["POST"])
        app.add_api_route("/v1/responses", respond, methods=["POST"])
        app.add_api_route("/v1/models", lambda: {"object": "list", "data": [manager.card]}, methods=["GET"])
        app.add_api_route("/load_model", load, methods=["POST"])
        app.add_api_route("/health", lambda: {"status": "ok"}, methods=["GET"])
        app.add_exception_handler(DcpPruneError, lambda _, error: _refusal(400, str(error)))
        app.add_exception_handler(HTTPException, lambda _, error: _refusal(error.status_code, error.detail))  # type: ignore[attr-defined]
        app.add_api_route("/metrics", lambda: PlainTextResponse(self.meter.exposition()), methods=["GET"])
        return app

    def run(self, listener: socket.socket) -> None:
        """Answers on an open socket, from `listen`, until `stop` is called or the process is interrupted."""
        self._uvicorn = uvicorn.Server(uvicorn.Config(self.app, log_level="warning"))
        self._uvicorn.run(sockets=[listener])

    def stop(self) -> None:
        """Lets `run` return after the calls that are under way."""
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True

    def close(self) -> None:
        """Takes the pruner off the model again."""
        if self.handle is not None:
            self.handle.remove()


def listen(host: str, port: int) -> socket.socket:
    """An open socket; port 0 takes any free port, and `url_of` says which.

    Raises:
        InvalidInputError: there is no such host, or the port is taken or not allowed.
    """
    try:
        if not 0 <= port <= 65535:
            raise OverflowError("ports go from 0 to 65535")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise InvalidInputError(
            f"cannot listen on {host}, port {port}: {cause}; name another --host or --port"
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """What OpenAI clients take as `base_url`."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


class _OneModel(ModelManager):
    """Hands out the one model that is loaded already."""

    def __init__(self, name: str, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        super().__init__()
        self.force_model = name
        self.model, self.processor = model, processor

    def load_model_and_processor(
        self, model_id_and_revision: str, progress_callback: Any = None, *_: Any, **__: Any
    ) -> Any:
        if model_id_and_revision != self.process_model_name(str(self.force_model)):
            raise InvalidInputError(f"this server has one model, {self.force_model}; ask for that")
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": model_id_and_revision, "cached": True})
        return self.model, self.processor

    @property
    def card(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        return {"id": self.force_model, "object": "model", "created": 0, "owned_by": "dcp-prune"}


def _read_messages(messages: list[dict[str, Any]], modality: Any, marker: str | None) -> list[dict[str, Any]]:
    try:
        read = BaseHandler.get_processor_inputs_from_messages(messages, modality)
    except (AttributeError, KeyError, TypeError) as error:
        raise HTTPException(400, f"the messages are not as OpenAI's API has them: {error!r}") from error
    for message in read:
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = _read_image(part.pop("url"))
            elif part["type"] == "text" and marker and marker in part["text"]:
                raise HTTPException(
                    400, f"the text holds {marker}, which stands for an image in the prompt; leave it out"
                )
    return read


def _id_of(request: Request) -> str:
    return request.headers.get("x-request-id") or str(uuid4())


def _refusal(status: int, sentence: str) -> JSONResponse:
    """In the form in which OpenAI's own server refuses, which clients show."""
    return JSONResponse({"error": {"message": sentence, "type": "invalid_request_error", "code": status}}, status)


def _read_image(url: str) -> Any:
    # Anything else would be taken for a path of this machine, which is not the client's to read.
    if not url.startswith(("data:image/", "http://", "https://")):
        raise HTTPException(400, "an image must be given as a data:image/...;base64,... or http(s) address")
    try:
        return load_image(url, timeout=_IMAGE_SECONDS)
    except Exception as error:  # of the network, of base64, and of every image format
        shown = url if url.startswith("http") else url[: url.find(",")]
        raise HTTPException(
            400, f"the image at {shown[:200]} cannot be read ({type(error).__name__}); is it an image, and whole?"
        ) from error
