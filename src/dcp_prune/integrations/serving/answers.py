"""Prompts of messages, and answers in the forms of OpenAI's API.

Everything that is private in transformers and needed for serving is imported and used in this module only: the thread
that generates, the streamer, and the forms of answers.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from dcp_prune.errors import DcpPruneError, InvalidInputError, UnsupportedVersionError
from dcp_prune.integrations.serving.asked import (
    Chat,
    ImagePart,
    Message,
    Responses,
    Sampling,
    Tools,
    texts_of,
)
from dcp_prune.integrations.serving.meter import LOGGER

CHANGED = (
    "this version of transformers has another `transformers serve` than the one that serving builds on; "
    "install transformers 5.19 to 5.23, with which it is tested"
)
try:
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.utils import (
        BaseGenerateManager,
        DirectStreamer,
        InferenceThread,
        _GenerationCancelled,
        _StreamError,
    )
    from transformers.utils.chat_template_utils import _get_template_variables
except (ImportError, AttributeError) as changed:
    raise UnsupportedVersionError(CHANGED) from changed

DEFAULT_NEW_TOKENS = 1024
"""Where an answer is cut off if nobody says it; the rest of the model's context, if that is less."""

_OURS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}
)
"""Variables of a chat template that are not for a client to set."""


class Answers:
    """One model that answers, one call after the other on a thread of its own.

    Raises (at construction):
        UnsupportedVersionError: the private parts of this version of transformers are others.
    """

    def __init__(self, name: str, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.name = name
        self.model: Any = model
        self.processor: Any = processor
        self.tokenizer: Any = getattr(processor, "tokenizer", processor)
        self._thread = InferenceThread()
        template = getattr(processor, "chat_template", None)
        template = template.get("default") if isinstance(template, dict) else template
        self._variables = _get_template_variables(template) - _OURS
        self._reads_tools = "tools" in _get_template_variables(template)
        config: Any = model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        markers = (getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio"))
        self._markers = [marker for marker in markers if isinstance(marker, str)]
        for form, extra in ((_Chat((), None, None), ()), (ResponseHandler(None, None), ("body",))):  # type: ignore[arg-type]
            for method in (form._streaming, form._non_streaming):
                names = ("request_id", "model", "processor", "model_id", *extra, "inputs", "gen_config", "gen_manager")
                inspect.signature(method).bind(**dict.fromkeys(names))

    def prompt(self, asked: Chat | Responses, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Inputs of `generate` on the model's device.

        Raises:
            InvalidInputError: a text holds a placeholder; tools or template arguments that the chat template does not
                read; messages that it does not take; or a prompt that is too long for the model.
        """
        self._check(asked)
        waiting = iter(images)
        arguments = asked.chat_template_kwargs or {}
        try:
            inputs = self.processor.apply_chat_template(
                [_turn(message, waiting) for message in asked.messages],
                add_generation_prompt=True,
                tools=_nested(asked.tools) if asked.tools else None,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **arguments,
            )
        except Exception as error:  # of the template, of the tokenizer and of every image processor
            cause = " ".join(str(error).split())[:200]
            raise InvalidInputError(
                f"no prompt can be made of these messages ({type(error).__name__}: {cause})"
            ) from error
        return inputs.to(self.model.device)

    def configure(self, asked: Chat | Responses, inputs: dict[str, Any]) -> GenerationConfig:
        """What the request says about generation; the model's own settings where it says nothing.

        Raises:
            InvalidInputError: prompt and answer do not fit into the model's context.
        """
        config = copy.deepcopy(self.model.generation_config)
        said = asked.generation_config or Sampling.model_validate({})
        said = said.model_copy(
            update={name: value for name in ("temperature", "top_p") if (value := getattr(asked, name)) is not None}
        )
        for name in Sampling.model_fields:
            if (value := getattr(said, name)) is not None:
                setattr(config, name, value)
        if said.do_sample is None and (said.temperature is not None or said.top_p is not None):
            config.do_sample = (
                said.temperature != 0
            )  # else a temperature would change nothing on a model that is greedy
        if not config.do_sample or said.temperature == 0:
            config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
        room = None if self.context is None else self.context - self._words(inputs)
        wanted = asked.most or said.max_new_tokens
        if room is not None and room < (wanted or 1):
            raise InvalidInputError(
                f"the prompt has {(self.context or 0) - room:,} tokens beside its images and {wanted or 1:,} new ones "
                f"are asked for, more than the {self.context:,} of this model; shorten it, or ask for fewer"
            )
        config.max_new_tokens = wanted or min(DEFAULT_NEW_TOKENS, DEFAULT_NEW_TOKENS if room is None else room)
        return config

    async def answer(
        self, asked: Chat | Responses, request_id: str, inputs: dict[str, Any], config: GenerationConfig
    ) -> Any:
        """The response, streamed or whole."""
        stops = tuple(asked.stop or ())
        form: Any = _Chat(stops, None, None) if isinstance(asked, Chat) else ResponseHandler(None, None)  # type: ignore[arg-type]
        more = {} if isinstance(asked, Chat) else {"body": {}}
        call = {
            "request_id": request_id,
            "model": self.model,
            "processor": self.tokenizer,
            "model_id": self.name,
            "inputs": inputs,
            "gen_config": config,
            "gen_manager": _Generation(self._thread, asked.seed, stops, as_json=isinstance(asked, Chat)),
            **more,
        }
        return form._streaming(**call) if asked.stream else await form._non_streaming(**call)

    def _check(self, asked: Chat | Responses) -> None:
        arguments = asked.chat_template_kwargs or {}
        known = {name for name in self._variables if not name.endswith("_token")}
        for name in arguments:
            if name not in known:
                raise InvalidInputError(
                    f"chat_template_kwargs.{name}: the chat template of {self.name} does not read it"
                )
        if asked.tools and not self._reads_tools:
            raise InvalidInputError(f"tools: the chat template of {self.name} does not read them; leave them out")
        for text in texts_of([_words_of(asked.messages), asked.tools, arguments]):
            for marker in self._markers:
                if marker in text:
                    raise InvalidInputError(
                        f"the text holds {marker}, which stands for an image in the prompt; leave it out"
                    )

    def _words(self, inputs: dict[str, Any]) -> int:
        """Tokens of the prompt that no pruner takes away."""
        ids = inputs["input_ids"]
        image = getattr(self.model.config, "image_token_id", None)
        return ids.shape[-1] if image is None else int((ids != image).sum())


def messages_of(body: dict[str, Any]) -> dict[str, Any]:
    """The body of a request to /v1/responses with `messages` in the form of /v1/chat/completions.

    Raises:
        InvalidInputError: `input` is missing, or holds an item that is unknown or of another form.
    """
    given = body.get("input")
    if not isinstance(given, str | list) or not given:
        raise InvalidInputError("input must be a text or a list of messages that is not empty")
    if "messages" in body:
        raise InvalidInputError("messages is not known here; leave it out, and send input")
    try:
        messages = ResponseHandler._normalize_input(copy.deepcopy(body))
    except Exception as error:  # its own refusals, and what it says of items of other forms
        cause = getattr(error, "detail", None) or repr(error)
        raise InvalidInputError(f"input is not as OpenAI's API has it ({cause})") from None
    rest = {name: value for name, value in body.items() if name not in ("input", "instructions")}
    return {**rest, "messages": messages}


def _words_of(messages: Sequence[Message]) -> list[Any]:
    """What is said in messages, pictures left out."""
    parts = [part.text for message in messages for part in message.content if not isinstance(part, ImagePart)]
    calls = [(call.function.name, call.function.arguments) for message in messages for call in message.tool_calls]
    return [parts, calls, [message.reasoning_content for message in messages]]


def _turn(message: Message, images: Any) -> dict[str, Any]:
    """A message as processors take it."""
    content = [
        {"type": "image", "image": next(images)} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
        for part in message.content
    ]
    turn: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        turn["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    for name in ("tool_call_id", "reasoning_content"):
        if getattr(message, name):
            turn[name] = getattr(message, name)
    return turn


def _nested(tools: Tools) -> Tools:
    """As chat templates read them: /v1/responses has one object where /v1/chat/completions has two."""
    return ResponseHandler._normalize_tools(tools) or []


class _Chat(ChatCompletionHandler):
    """Chat completions that end before what stops them."""

    def __init__(self, stops: Sequence[str], *nothing: Any) -> None:
        super().__init__(*nothing)
        self._stops = stops

    def _build_completion(self, request_id: str, content: str, *rest: Any, **more: Any) -> dict[str, Any]:
        return super()._build_completion(request_id, _before(content, self._stops), *rest, **more)


class _Generation(BaseGenerateManager):
    """One call to `generate`, on the thread of all of them.

    Args:
        thread: see there.
        seed: of this call, None for chance.
        stops: texts that end the answer and are no part of it.
        as_json: errors of a stream are put into JSON as they are.
    """

    def __init__(self, thread: InferenceThread, seed: int | None, stops: Sequence[str], *, as_json: bool) -> None:
        self._thread = thread
        self._seed = seed
        self._stops = stops
        self._as_json = as_json

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> Any:
        loop = asyncio.get_running_loop()
        queue = _UntilStopped(self._stops)
        streamer = DirectStreamer(processor._tokenizer, loop, queue, response_parser=response_parser)
        generate = self._call(model, processor, inputs, gen_config, streamer=streamer)

        def run() -> None:
            last: Any = None
            try:
                if not streamer._cancelled.is_set():  # its client may have gone while others were answered
                    generate()
                    return
            except _GenerationCancelled:
                pass
            except Exception as error:
                sentence = _failure(error)
                last = _StreamError(json.dumps(sentence)[1:-1] if self._as_json else sentence)
            loop.call_soon_threadsafe(queue.put_nowait, last)

        self._thread.submit(run)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        sequences = await self._thread.async_submit(self._call(model, processor, inputs, gen_config))
        length = inputs["input_ids"].shape[-1]
        new = sequences[0, length:]
        return processor.decode(new, skip_special_tokens=True), length, new

    def stop(self) -> None:
        pass

    def _call(self, model: Any, processor: Any, inputs: Any, config: Any, **more: Any) -> Callable[[], Any]:
        def generate() -> Any:
            if self._seed is not None:
                torch.manual_seed(self._seed)
            if self._stops:
                length = inputs["input_ids"].shape[-1]
                more["stopping_criteria"] = StoppingCriteriaList([_Stop(processor, self._stops, length)])
            return model.generate(**inputs, generation_config=config, tokenizer=processor, **more)

        return generate


class _Stop(StoppingCriteria):
    """Ends an answer that holds one of some texts. That of transformers takes subword tokenizers only."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], length: int) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._length = length
        self._tail = 4 * max(map(len, stops)) + 8  # a letter takes four tokens at the most, one for each byte

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        new = input_ids[:, max(self._length, input_ids.shape[1] - self._tail) :]
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        found = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(found, device=input_ids.device)


class _UntilStopped(asyncio.Queue[Any]):
    """Pieces of an answer, without what stops it: held back as long as they may be its beginning."""

    def __init__(self, stops: Sequence[str]) -> None:
        super().__init__()
        self._stops = stops
        self._held = ""
        self._stopped = False

    def put_nowait(self, item: Any) -> None:
        if not self._stops or type(item) is not str:  # reasoning and calls of tools are of types of their own
            if self._held and not self._stopped:
                super().put_nowait(self._held)
            self._held = ""
            super().put_nowait(item)
            return
        if self._stopped:
            return
        text = self._held + item
        ready = _before(text, self._stops)
        self._stopped = ready != text
        keep = 0 if self._stopped else max(_overlap(ready, stop) for stop in self._stops)
        self._held = ready[len(ready) - keep :]
        if len(ready) > keep:
            super().put_nowait(ready[: len(ready) - keep])


def _before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of `stops`."""
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _failure(error: Exception) -> str:
    if isinstance(error, DcpPruneError):
        return " ".join(str(error).split())
    LOGGER.error("a call failed", exc_info=error)
    return f"the model failed ({type(error).__name__}); the server's log says more"
