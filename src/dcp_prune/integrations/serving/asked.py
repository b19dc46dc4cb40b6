"""What a client may send to the two routes that answer; everything else is refused by name.

A field that is null or empty counts as left out, as clients send all that they know of.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.serving.limits import Limits

PICTURE_FORM = '{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,..."}}'
_NOTHING: tuple[Any, ...] = ([], {}, "")


class _Known(BaseModel):
    """Refuses every field that is not declared, unless it is empty, or says what holds anyway."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    NEUTRAL: ClassVar[Mapping[str, Any]] = {}
    """The one value that changes nothing."""
    IGNORED: ClassVar[frozenset[str]] = frozenset()
    """What has no bearing on the answer."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _refuse_the_rest(self) -> Any:
        for name, value in (self.model_extra or {}).items():
            if name in self.IGNORED or value in _NOTHING:
                continue
            if name not in self.NEUTRAL:
                raise ValueError(f"{name} is not known here; leave it out")
            if value != self.NEUTRAL[name]:
                raise ValueError(
                    f"{name} is not supported; leave it out, or send {json.dumps(self.NEUTRAL[name])}, "
                    f"got {_short(value)}"
                )
        return self


class TextPart(_Known):
    """`output_text` is what /v1/responses calls an answer that comes back as part of a conversation."""

    IGNORED = frozenset({"annotations", "logprobs"})
    type: Literal["text", "input_text", "output_text"]
    text: str


class Address(_Known):
    """Of a picture; `detail` is for the budget to say."""

    IGNORED = frozenset({"detail"})
    url: str


class ImagePart(_Known):
    """A picture."""

    IGNORED = frozenset({"detail"})
    type: Literal["image_url", "input_image"]
    image_url: Annotated[Address, BeforeValidator(lambda given: {"url": given} if isinstance(given, str) else given)]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Function(_Known):
    """A call that the model asked for in an earlier turn."""

    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(lambda given: _object(given, "arguments"))]


class ToolCall(_Known):
    """See `Function`."""

    IGNORED = frozenset({"index"})
    id: str = ""
    type: Literal["function"] = "function"
    function: Function


class Message(_Known):
    """One turn of the conversation."""

    IGNORED = frozenset({"id", "type", "status", "refusal"})
    role: Literal["system", "user", "assistant", "tool"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)] = []
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Sampling(_Known):
    """What may be said about generation, also as JSON in `generation_config`, which `transformers chat` sends."""

    IGNORED = frozenset({"transformers_version", "_from_model_config"})
    max_new_tokens: int | None = Field(None, ge=1)
    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=1000)


def _sampling(given: Any) -> Any:
    return given if given is None or isinstance(given, Sampling) else _object(given, "generation_config")


Tools = list[dict[str, Any]]


class _Request(_Known):
    """What both routes take."""

    IGNORED = frozenset(
        {"user", "metadata", "service_tier", "store", "safety_identifier", "prompt_cache_key", "stream_options"}
    )
    model: str | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    tools: Tools | None = Field(None, max_length=128)
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None
    generation_config: Annotated[Sampling | None, BeforeValidator(_sampling)] = None


class Chat(_Request):
    """The body of a request to /v1/chat/completions."""

    NEUTRAL = {
        "n": 1,
        "logprobs": False,
        "top_logprobs": 0,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
    }
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]] | None,
        Field(max_length=16),
        BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    ] = None

    @property
    def most(self) -> int | None:
        """New tokens at the most; the newer name counts."""
        return self.max_completion_tokens or self.max_tokens


class Responses(_Request):
    """The body of a request to /v1/responses; `messages` are made of `input` and `instructions`."""

    NEUTRAL = {
        "background": False,
        "top_logprobs": 0,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "text": {"format": {"type": "text"}},
        "truncation": "disabled",
    }
    messages: list[Message] = Field(min_length=1)
    max_output_tokens: int | None = Field(None, ge=1)
    stop: ClassVar[None] = None

    @property
    def most(self) -> int | None:
        """New tokens at the most."""
        return self.max_output_tokens


Body = TypeVar("Body", Chat, Responses)


def read_json(data: bytes, limits: Limits) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        InvalidInputError: it is no UTF-8, no JSON, nested too deeply, holds too much, or no object.
    """
    # Counted before: a body of empty objects takes fifty times its size once it is read.
    if data.count(b"{") + data.count(b"[") > limits.items:
        raise InvalidInputError(f"the body holds too many objects and lists; {limits.items:,} are the most")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"the body is not valid JSON ({_short(str(error), 100)})") from None
    if not isinstance(body, dict):
        raise InvalidInputError(f"the body must be a JSON object, got {_short(body)}")
    return body


def check(kind: type[Body], body: dict[str, Any], limits: Limits) -> Body:
    """The request, if it can be answered.

    Raises:
        InvalidInputError: a field that is unknown, of a wrong type or out of its range; too many pictures, or too long
            a text.
    """
    try:
        asked = TypeAdapter(kind).validate_python(body)
    except (ValidationError, RecursionError) as error:
        raise InvalidInputError(_sentence(error)) from None
    if (count := len(pictures_of(asked))) > limits.pictures:
        raise InvalidInputError(f"the request holds {count} pictures; {limits.pictures} are the most")
    length = 0
    for text in texts_of(body):
        if not text.startswith("data:image/"):
            length += len(text)
        if any("\ud800" <= letter <= "\udfff" for letter in text[: limits.text]):
            raise InvalidInputError("a text holds half a character (a lone surrogate), which is not valid Unicode")
    if length > limits.text:
        raise InvalidInputError(f"the request holds {length:,} characters of text; {limits.text:,} are the most")
    return asked


def pictures_of(asked: Chat | Responses) -> list[str]:
    """The addresses of all pictures, in order."""
    return [part.image_url.url for message in asked.messages for part in message.content if isinstance(part, ImagePart)]


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            waiting += [*value, *value.values()]
        elif isinstance(value, Sequence):
            waiting += value


def _object(given: Any, name: str) -> Any:
    if not isinstance(given, str):
        return given
    try:
        found = json.loads(given)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be a JSON object, got {_short(given)}")
    return found


def _sentence(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "the request is nested too deeply"
    first = error.errors(include_url=False)[0]
    steps = [str(step) for step in first["loc"]]
    # Pydantic puts the type of a part into the path, in front of the field that is often called the same.
    place = ".".join(step for step, before in zip(steps, ["", *steps], strict=False) if step != before)
    context: Any = first.get("ctx", {})
    kind = str(first["type"])
    if kind == "value_error":
        return f"{place}: {context['error']}" if place else str(context["error"])
    if kind in ("missing", "too_short", "string_too_short"):
        return f"{place} is {'missing' if kind == 'missing' else 'empty'}"
    if kind in ("too_long", "string_too_long"):
        return f"{place} is too long; {context['max_length']:,} are the most"
    if kind == "union_tag_invalid":
        return f"{place}: a part of type {context['tag']!r} is not read here; send text, or pictures as {PICTURE_FORM}"
    if kind == "union_tag_not_found":
        return f'{place}: a part has no type; write {{"type": "text", "text": "..."}} or {PICTURE_FORM}'
    return f"{place} {first['msg'].replace('Input should', 'must')}, got {_short(first['input'])}"


def _short(value: Any, most: int = 60) -> str:
    text = value if isinstance(value, str) else reprlib.repr(value)
    text = " ".join(text[: 4 * most].split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
