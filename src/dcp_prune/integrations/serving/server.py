"""The routes, and the one model behind them."""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from uuid import uuid4

import openai  # noqa: F401  # transformers needs it here, and is not clear about that
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers import PreTrainedModel, ProcessorMixin

from dcp_prune import __version__
from dcp_prune.errors import DcpPruneError, InvalidInputError, UnsupportedVersionError
from dcp_prune.integrations.serving.answers import CHANGED, Answers, messages_of
from dcp_prune.integrations.serving.asked import Chat, Responses, check, pictures_of, read_json
from dcp_prune.integrations.serving.limits import Limits
from dcp_prune.integrations.serving.meter import LOGGER, Meter
from dcp_prune.integrations.serving.pictures import decode, fetch
from dcp_prune.integrations.transformers import PruneHandle, prune
from dcp_prune.pruners.base import Pruner

T = TypeVar("T")

_HANDS = 2
"""Threads that read requests. More would not be faster where the model needs the processor, and take more memory."""


class Server:
    """One model behind `/v1/chat/completions` and `/v1/responses`, streaming or not, with its images pruned.

    Further routes: `/v1/models`, `/health`, and `/metrics` with the counts of `meter`. Calls run one after the other;
    requests are read beside them, and never on the event loop. What cannot be answered gets status 400 and a sentence.

    Attributes:
        app: the FastAPI application.
        handle: of the pruner; None without one.
        meter: what pruning did so far.

    Raises (at construction):
        UnsupportedModelError, InvalidInputError, MissingSignalError: see `prune`.
        UnsupportedVersionError: the server of this version of transformers is built in another way.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        pruner: Pruner | None,
        *,
        name: str,
        limits: Limits | None = None,
        api_key: str | None = None,
        allow_private_addresses: bool = False,
    ) -> None:
        """Attaches `pruner` (None: serve all visual tokens) to `model`, which clients call by `name`.

        The processor needs a chat template. With an `api_key`, every route but `/health` asks for it. Pictures are not
        fetched from loopback, private and other addresses that are not public, unless that is allowed.
        """
        if getattr(processor, "chat_template", None) is None:
            raise InvalidInputError(
                f"the processor of {name} has no chat template, without which messages do not become a prompt; "
                "set processor.chat_template, or put chat_template.jinja into the model's folder"
            )
        if api_key is not None and not api_key.strip():
            raise InvalidInputError("the API key is empty; give one that is hard to guess, or none")
        self.name = name
        self.meter = Meter()
        self._limits = limits or Limits()
        self._api_key = api_key
        self._allow_private = allow_private_addresses
        self._hands = ThreadPoolExecutor(_HANDS, thread_name_prefix="reading")
        self._uvicorn: uvicorn.Server | None = None
        self.handle: PruneHandle | None = None
        if pruner is not None:
            self.handle = prune(model, pruner, processor=processor, on_record=self.meter.count)
        try:
            self._answers = Answers(name, model, processor)
        except (AttributeError, TypeError) as error:
            self.close()
            raise UnsupportedVersionError(CHANGED) from error
        self.app = self._build()

    def _build(self) -> FastAPI:
        async def complete(request: Request) -> Any:
            return await self._answer(request, lambda body: check(Chat, body, self._limits))

        async def respond(request: Request) -> Any:
            return await self._answer(request, lambda body: check(Responses, messages_of(body), self._limits))

        async def load(request: Request) -> Any:  # what `transformers chat` asks for first
            body = await self._off_the_loop(read_json, await self._read(request), self._limits)
            self._check_name(body.get("model"))
            event = {"status": "ready", "model": self.name, "cached": True}
            return PlainTextResponse(f"data: {json.dumps(event)}\n\n", media_type="text/event-stream")

        async def models() -> Any:
            card = {"id": self.name, "object": "model", "created": 0, "owned_by": "dcp-prune"}
            return {"object": "list", "data": [card]}

        async def health() -> Any:
            return {"status": "ok"}

        async def metrics() -> Any:
            return PlainTextResponse(self.meter.exposition())

        app = FastAPI(title="dcp-prune", version=__version__, openapi_url=None)
        guarded = [Depends(self._check_key)]
        app.add_api_route("/v1/chat/completions", complete, methods=["POST"], dependencies=guarded)
        app.add_api_route("/v1/responses", respond, methods=["POST"], dependencies=guarded)
        app.add_api_route("/v1/models", models, methods=["GET"], dependencies=guarded)
        app.add_api_route("/load_model", load, methods=["POST"], dependencies=guarded)
        app.add_api_route("/metrics", metrics, methods=["GET"], dependencies=guarded)
        app.add_api_route("/health", health, methods=["GET"])
        app.add_exception_handler(DcpPruneError, lambda _, error: _refusal(400, str(error)))
        app.add_exception_handler(AnyHTTPException, _refused)  # type: ignore[arg-type]
        app.add_exception_handler(
            Exception,
            lambda _, error: _refusal(500, f"the model failed ({type(error).__name__}); the server's log says more"),
        )
        return app

    async def _answer(self, request: Request, read: Callable[[dict[str, Any]], Chat | Responses]) -> Any:
        data = await self._read(request)
        asked = await self._off_the_loop(lambda: read(read_json(data, self._limits)))
        self._check_name(asked.model)
        urls = pictures_of(asked)
        fetched = await fetch(urls, self._limits, allow_private=self._allow_private)

        def prepare() -> tuple[Any, Any]:
            images, notes = decode(urls, fetched, self._limits)
            for note in notes:
                LOGGER.info("%s", note)
            inputs = self._answers.prompt(asked, images)
            return inputs, self._answers.configure(asked, inputs)

        inputs, config = await self._off_the_loop(prepare)
        return await self._answers.answer(asked, _id_of(request), inputs, config)

    async def _off_the_loop(self, work: Callable[..., T], *arguments: Any) -> T:
        """Runs what takes time on a thread, so that other clients are heard meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._hands, work, *arguments)

    async def _read(self, request: Request) -> bytes:
        data = bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > self._limits.body:
                raise HTTPException(
                    413, f"the request has more than {self._limits.body:,} bytes; send smaller pictures"
                )
        return bytes(data)

    async def _check_key(self, request: Request) -> None:
        if self._api_key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._api_key.encode()):
            raise HTTPException(401, "this server asks for its API key; send it as Authorization: Bearer KEY")

    def _check_name(self, asked: Any) -> None:
        if asked is not None and asked != self.name:
            raise InvalidInputError(f"this server has one model, {self.name}; ask for that")

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
        self._hands.shutdown(wait=False)
        if self.handle is not None:
            self.handle.remove()


def _id_of(request: Request) -> str:
    return request.headers.get("x-request-id", "")[:200] or str(uuid4())


def _refused(_: Request, error: AnyHTTPException) -> JSONResponse:
    return _refusal(error.status_code, str(error.detail))


def _refusal(status: int, sentence: str) -> JSONResponse:
    """In the form in which OpenAI's own server refuses, which clients show."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": " ".join(sentence.split()), "type": kind, "code": status}}, status)
