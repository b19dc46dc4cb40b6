"""Hugging Face transformers: `prune_inputs` makes a prompt with fewer visual tokens, `prune` does so on every call.

The whole text side is shortened before the model sees it, so that caches, masks, positions, beams and stopping inside
`generate` deal with one consistent short prompt; the caller gets back the ids that were passed in.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.generation import for_short_prompt
from dcp_prune.integrations.prompt import (
    compact_positions,
    find_question,
    locate_images,
    surviving_columns,
    take_columns,
)
from dcp_prune.integrations.stopwatch import Stopwatch
from dcp_prune.models import EncodedImages, ModelAdapter, get_adapter, supported_architectures
from dcp_prune.pruners.base import Pruner
from dcp_prune.tokens import Signal

__all__ = [
    "EncodedImages",
    "PruneHandle",
    "PruneRecord",
    "ShortInputs",
    "encode_images",
    "get_handle",
    "prune",
    "prune_inputs",
    "supported_architectures",
]


@dataclass(frozen=True)
class PruneRecord:
    """What one call with images did.

    Attributes:
        pruner: the pruner that did it.
        tokens_before, tokens_after: visual tokens per image.
        prompt_before, prompt_after: columns of the prompt, padding included: what prefill processes.
        rows: batch row of each image. `i`.
        indices: ascending positions of the kept tokens among the original ones. `i k`.
        assignment: original token -> slot that absorbed it, -1 if it was dropped. `i n`.
        stats: what the pruner reported, e.g. `kappa` `i`.
        stage_stats: what each in-encoder stage reported.
        watch: the running times; read them as `milliseconds`.
    """

    pruner: Pruner
    tokens_before: int
    tokens_after: int
    prompt_before: int
    prompt_after: int
    rows: Int[Tensor, " i"]
    indices: Int[Tensor, "i k"]
    assignment: Int[Tensor, "i n"]
    stats: Mapping[str, Tensor]
    stage_stats: tuple[Mapping[str, Tensor], ...]
    watch: Stopwatch

    @property
    def kappa(self) -> Float[Tensor, " i"] | None:
        """Run-time distribution shift of the kept tokens, if the pruner measures it."""
        return self.stats.get("kappa")

    @property
    def reselected(self) -> Bool[Tensor, " i"] | None:
        """Whether the shift was severe enough to choose again, if the pruner does such a thing."""
        return self.stats.get("reselected")

    @property
    def milliseconds(self) -> dict[str, float]:
        """Time spent in `encode` (vision encoder, projector), `select` (all choosing of tokens, inside the encoder and
        after it) and `prompt` (shortening the text side)."""
        return self.watch.milliseconds()


@dataclass(frozen=True)
class ShortInputs:
    """Model inputs with fewer visual tokens, and the way back.

    Attributes:
        original: the inputs as they were given.
        record: what was done to the images; None if there were none.
        columns: column of the original prompt in each column of the short one, -1 for padding; None if nothing changed.
            With a cache, both prompts begin with the conversation so far. `b m`.
        width: columns of the original prompt.
        tensors: the short inputs without the images.
        features: the visual tokens that are left; None if there are none or nothing changed. `i k d`.
    """

    original: Mapping[str, Any]
    record: PruneRecord | None
    columns: Int[Tensor, "b m"] | None
    width: int
    tensors: Mapping[str, Any]
    features: Float[Tensor, "i k d"] | None
    adapter: ModelAdapter = field(repr=False)

    @property
    def inputs(self) -> dict[str, Any]:
        """Ready for `model(**inputs)` and `model.generate(**inputs)`; a fresh dictionary every time."""
        images = {} if self.features is None else self.adapter.hand_over(self.features)
        return {**self.tensors, **images}

    def restore(self, sequences: Int[Tensor, "r s"]) -> Int[Tensor, "r L"]:
        """What `generate` returned for the short prompt, with the original prompt in front of the new tokens.

        There may be more rows than prompts (beams, `num_return_sequences`).
        """
        if self.columns is None:
            return sequences
        prompt = self.original["input_ids"].to(sequences.device)
        prompt = prompt.repeat_interleave(sequences.shape[0] // prompt.shape[0], dim=0)
        return torch.cat((prompt, sequences[:, self.tensors["input_ids"].shape[1] :]), dim=1)


def encode_images(model: PreTrainedModel, pixel_values: Float[Tensor, "i c y x"], *pruners: Pruner) -> EncodedImages:
    """Runs the vision encoder once, for any number of questions and for all these pruners.

    Hand the result to `prune_inputs(..., encoded=...)`; `EncodedImages.select` repeats or reorders images.

    Args:
        model: a model with an adapter.
        pixel_values: preprocessed images.
        pruners: their in-encoder stages are applied, and all signals that any of them uses are captured.

    Raises:
        InvalidInputError: the pruners want different in-encoder stages, so they cannot share an encoder pass.
        UnsupportedModelError: see `get_adapter`.
    """
    return _encode(get_adapter(model), pixel_values, pruners)


def prune_inputs(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    pruner: Pruner,
    *,
    processor: Any = None,
    text: str | Sequence[str] | None = None,
    encoded: EncodedImages | None = None,
) -> ShortInputs:
    """Inputs in, shorter inputs out; the model is left alone.

        short = prune_inputs(model, inputs, pruner)
        ids = short.restore(model.generate(**short.inputs))

    Prompts without images, and budgets that are no smaller than the image, come back unchanged. Gradients are kept
    in training mode or when there are labels, if they are enabled at all.

    Args:
        model: a model with an adapter.
        inputs: what the model's processor made: `input_ids`, `pixel_values`, `attention_mask`, ...; tensors of the
            shape of `input_ids` (labels, token types) are shortened along.
        pruner: which tokens to keep, and how many.
        processor: the model's processor; its tokenizer knows more special tokens than the model's config.
        text: the question of each row, for text-aware pruners, instead of the words behind the last image; needs
            `processor`.
        encoded: images from `encode_images`, one per image of the prompt; `pixel_values` are then not needed.

    Raises:
        InvalidInputError: images and placeholders do not match, NaN or inf features, inputs that cannot be shortened.
        UnsupportedModelError: see `get_adapter`.
        MissingSignalError: the pruner requires a signal that the model does not give.
    """
    train = model.training or inputs.get("labels") is not None
    with torch.set_grad_enabled(torch.is_grad_enabled() and train):
        return _shorten(model, inputs, pruner, processor=processor, text=text, encoded=encoded)


def prune(model: PreTrainedModel, pruner: Pruner, *, processor: Any = None) -> PruneHandle:
    """Prunes in every `model.generate(...)` and `model(...)` from now on; a context manager, or `remove()` it.

        with prune(model, pruner) as handle:
            ids = model.generate(**inputs)
            handle.last.indices

    Args:
        model: a model with an adapter.
        pruner: which tokens to keep, and how many.
        processor: the model's processor; its tokenizer knows more special tokens than the model's config.

    Raises:
        UnsupportedModelError: see `get_adapter`.
        InvalidInputError: the model has a handle already, or an encoder stage does not fit the encoder.
    """
    return PruneHandle(model, pruner, processor=processor)


def get_handle(model: PreTrainedModel) -> PruneHandle | None:
    """The handle that prunes this model's calls, e.g. on a `deepcopy` of an attached model; None if there is none."""
    owner = getattr(model.__dict__.get("generate"), "__self__", None)
    return owner if isinstance(owner, PruneHandle) else None


class PruneHandle:
    """The attachment of one pruner to one model: an instance attribute `generate` and one forward pre-hook.

    `generate` returns the ids that were passed in, followed by new tokens. A plain `model(...)` returns logits of the
    short prompt; `handle.last_inputs.columns` says which original column each belongs to. Calls of inner modules, such
    as `model.model(...)`, are not touched.

    Attributes:
        model, pruner, processor: as given to `prune`.
        last: record of the latest call with images, by whatever thread; None before the first one.
        last_inputs: the short inputs of that call.
    """

    def __init__(self, model: PreTrainedModel, pruner: Pruner, *, processor: Any = None) -> None:
        attached = get_handle(model)
        if attached is not None:
            raise InvalidInputError(
                f"this {type(model).__name__} already prunes with {attached.pruner}; "
                "remove that handle first: get_handle(model).remove()"
            )
        adapter = get_adapter(model)
        rows, cols = adapter.grid()
        adapter.check_stages(pruner.encoder_stages(rows * cols, adapter.num_layers))
        self.model: Any = model
        self.pruner = pruner
        self.processor = processor
        self.last: PruneRecord | None = None
        self.last_inputs: ShortInputs | None = None
        self._prompts: WeakKeyDictionary[Any, _CachedPrompt] = WeakKeyDictionary()
        self._previous = model.__dict__.get("generate")
        # Bound methods: deepcopy of a model binds them to the copy, where a closure would keep calling the original.
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self.model.generate = self._generate

    def remove(self) -> None:
        """Leaves the model as it was; doing it twice does no harm."""
        if get_handle(self.model) is not self:
            return
        self._hook.remove()
        del self.model.__dict__["generate"]
        if self._previous is not None:
            self.model.generate = self._previous

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"PruneHandle({type(self.model).__name__}, {self.pruner})"

    @functools.wraps(vars(GenerationMixin)["generate"])
    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        original = self._previous or functools.partial(type(self.model).generate, self.model)
        call = _by_name(type(self.model).generate, self.model, args, kwargs)
        if call.get("inputs") is not None:
            call["input_ids"] = call.pop("inputs")
        with torch.no_grad():
            short = self._shorten(call, whole_prompt=True)
        if short is None:
            return original(**call)
        output = original(
            **for_short_prompt(short.inputs, call["input_ids"], short.restore, self.model.generation_config)
        )
        if isinstance(output, Tensor):
            self._remember(call.get("past_key_values"), short)
            return short.restore(output)
        self._remember(output.get("past_key_values"), short)
        output.sequences = short.restore(output.sequences)
        return output

    def _before_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _by_name(type(model).forward, model, args, kwargs) if args else kwargs
        if call.get("pixel_values") is None and (torch.compiler.is_compiling() or not self._is_long_step(call)):
            return None
        short = self._shorten(call, whole_prompt=False)
        if short is None:
            return None
        inputs = short.inputs
        config = model.config.get_text_config(decoder=True)
        if inputs.get("past_key_values") is None and inputs.get("use_cache", config.use_cache) and not model.training:
            # The model would make this cache itself; made here, it is recognised when the caller comes back with it.
            inputs["past_key_values"] = DynamicCache(config=config)
        self._remember(inputs.get("past_key_values"), short)
        return (), inputs

    def _is_long_step(self, call: Mapping[str, Any]) -> bool:
        """Whether a plain call continues a pruned prompt with a mask that still counts the dropped tokens."""
        cache, mask, ids = (call.get(name) for name in ("past_key_values", "attention_mask", "input_ids"))
        if cache is None or mask is None or mask.ndim != 2 or ids is None or cache not in self._prompts:
            return False
        return mask.shape[1] > int(cache.get_seq_length()) + ids.shape[1]

    def _shorten(self, call: Mapping[str, Any], *, whole_prompt: bool) -> ShortInputs | None:
        """The short inputs of a call, or None if it goes ahead as it is."""
        cache = call.get("past_key_values")
        cached = None if cache is None else self._prompts.get(cache)
        short = _shorten(
            self.model, call, self.pruner, processor=self.processor, cached=cached, whole_prompt=whole_prompt
        )
        if short.record is not None:
            self.last, self.last_inputs = short.record, short
        return None if short.columns is None else short

    def _remember(self, cache: Any, short: ShortInputs) -> None:
        if cache is not None and short.columns is not None:
            ids = short.original["input_ids"]
            known = ids if ids.shape[1] == short.width else None
            self._prompts[cache] = _CachedPrompt(short.columns, short.width, known)


@dataclass(frozen=True)
class _CachedPrompt:
    """The beginning of a conversation as it is in a key-value cache.

    Attributes:
        columns: of the original prompt, in the order in which they were cached; -1 is padding. `b m`.
        width: columns of the original prompt.
        ids: the original prompt, where all of it is known. `b w`.
    """

    columns: Int[Tensor, "b m"]
    width: int
    ids: Int[Tensor, "b w"] | None


@dataclass(frozen=True)
class _Turn:
    """Where the new part of a conversation begins; without a cache, all of it is new.

    Attributes:
        head: columns of the original conversation before the new part, as far as they are in the cache. `b h`.
        head_width: columns of the original conversation before the new part, dropped ones included.
        start: column of `input_ids` where the new part begins.
    """

    head: Int[Tensor, "b h"]
    head_width: int
    start: int

    @property
    def cut(self) -> int:
        return self.head_width - self.head.shape[1]


@dataclass(frozen=True)
class _Images:
    """The images of a call, encoded already or not yet."""

    adapter: ModelAdapter
    pixels: Float[Tensor, "i c y x"] | None
    encoded: EncodedImages | None

    def __len__(self) -> int:
        if self.encoded is not None:
            return self.encoded.tokens.features.shape[0]
        return 0 if self.pixels is None else self.pixels.shape[0]

    @property
    def num_tokens(self) -> int:
        if self.encoded is not None:
            return self.encoded.tokens.num_original
        rows, cols = self.adapter.grid(self.pixels)
        return rows * cols

    def select(self, images: list[int]) -> _Images:
        pixels = None if self.pixels is None else self.pixels[images]
        return replace(self, pixels=pixels, encoded=self.encoded and self.encoded.select(images))

    def encode(self, pruner: Pruner, lap: Callable[[str], None]) -> EncodedImages:
        if self.encoded is None:
            assert self.pixels is not None
            return _encode(self.adapter, self.pixels, (pruner,), lap)
        stages = self.adapter.check_stages(pruner.encoder_stages(self.num_tokens, self.adapter.num_layers))
        if stages != self.encoded.stages:
            raise InvalidInputError(
                f"these images were encoded with the stages {self.encoded.stages}, but {pruner} wants {stages}; "
                "encode them with encode_images(model, pixel_values, pruner)"
            )
        return self.encoded


def _encode(
    adapter: ModelAdapter,
    pixels: Float[Tensor, "i c y x"],
    pruners: Sequence[Pruner],
    lap: Callable[[str], None] = lambda name: None,
) -> EncodedImages:
    rows, cols = adapter.grid(pixels)
    plans = [adapter.check_stages(pruner.encoder_stages(rows * cols, adapter.num_layers)) for pruner in pruners]
    if any(plan != plans[0] for plan in plans):
        raise InvalidInputError(
            f"these pruners drop different tokens inside the encoder and cannot share a pass: {plans}; "
            "call encode_images once for each of them"
        )
    signals = frozenset().union(*(pruner.requires | pruner.optional for pruner in pruners))
    return adapter.encode(pixels, plans[0] if plans else (), signals & adapter.signals, lap)


def _shorten(
    model: Any,
    inputs: Mapping[str, Any],
    pruner: Pruner,
    *,
    processor: Any = None,
    text: str | Sequence[str] | None = None,
    encoded: EncodedImages | None = None,
    cached: _CachedPrompt | None = None,
    whole_prompt: bool = True,
) -> ShortInputs:
    """`prune_inputs` for a conversation that may have begun; `whole_prompt`: `input_ids` repeat its beginning."""
    adapter = get_adapter(model)
    images = _Images(adapter, None if encoded else inputs.get(adapter.image_inputs[0]), encoded)
    unchanged = ShortInputs(inputs, None, None, 0, inputs, None, adapter)
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    _check_inputs(adapter, model.config, inputs, bool(images))
    if ids is None:
        return unchanged
    turn = _find_turn(ids, mask, inputs.get("past_key_values"), cached, whole_prompt)
    tail = ids[:, turn.start :]
    width = turn.head_width + tail.shape[1]
    if images and turn.head_width:
        images = images.select(_new_images(ids, tail, adapter.image_token_id, images))
    features = record = None
    if images:
        watch = Stopwatch(ids.device)
        n = images.num_tokens
        rows, places = locate_images(tail, adapter.image_token_id, n, len(images))
        if pruner.budget.resolve(n) >= n:
            warnings.warn(
                f"nothing was pruned: {pruner} keeps all {n} visual tokens of an image; lower its budget", stacklevel=3
            )
            if encoded is None and not turn.cut:
                every = torch.arange(n, device=ids.device).expand(len(images), n)
                record = PruneRecord(pruner, n, n, ids.shape[1], ids.shape[1], rows, every, every, {}, (), watch)
                return replace(unchanged, record=record)
        coded = images.encode(pruner, watch.lap)
        watch.lap("encode")
        tokens = coded.tokens
        if Signal.TEXT in pruner.requires | pruner.optional:
            tokens = replace(tokens, **_question(model, ids, mask, adapter.image_token_id, rows, processor, text))
        pruned = pruner(tokens)
        watch.lap("select")
        features = pruned.features
        tail_mask = None if mask is None else mask[:, mask.shape[1] - tail.shape[1] :].bool()
        tail_columns = surviving_columns(tail_mask, tail, rows, places, pruned.indices.to(ids.device))
        record = PruneRecord(
            pruner=pruner,
            tokens_before=n,
            tokens_after=features.shape[1],
            prompt_before=width,
            prompt_after=turn.head.shape[1] + tail_columns.shape[1],
            rows=rows,
            indices=pruned.indices,
            assignment=pruned.assignment,
            stats=pruned.stats,
            stage_stats=coded.stage_stats,
            watch=watch,
        )
    elif turn.cut:
        tail_columns = torch.arange(tail.shape[1], device=ids.device).expand(tail.shape)
    else:
        return unchanged
    columns = torch.cat((turn.head, torch.where(tail_columns < 0, -1, tail_columns + turn.head_width)), dim=1)
    own = tail_columns if turn.start < turn.head_width else columns
    short = _shorten_tensors(inputs, adapter.image_inputs, columns, own, _pad_id(model))
    if record is not None:
        record.watch.lap("prompt")
    return ShortInputs(inputs, record, columns, width, short, features, adapter)


def _find_turn(
    ids: Int[Tensor, "b l"], mask: Tensor | None, cache: Any, cached: _CachedPrompt | None, whole_prompt: bool
) -> _Turn:
    b, length = ids.shape
    filled = 0 if cache is None else int(cache.get_seq_length())
    if filled == 0:
        return _Turn(ids.new_empty(b, 0), 0, 0)
    if cached is None:
        known, width = torch.arange(filled, device=ids.device).expand(b, filled), filled
    else:
        known, width = cached.columns.to(ids.device), cached.width
        known = known.repeat_interleave(b // known.shape[0], dim=0)
    if not whole_prompt or (mask is not None and mask.shape[1] > length):
        # Only the new tokens were passed; tokens generated in between are in the cache as they are.
        between = torch.arange(width, filled + width - known.shape[1], device=ids.device).expand(b, -1)
        head = torch.cat((known, between), dim=1)
        return _Turn(head, width + between.shape[1], 0)
    if cached is not None and cached.ids is not None:
        begin = cached.ids.to(ids.device).repeat_interleave(b // cached.ids.shape[0], dim=0)
        if not torch.equal(ids[:, :width], begin):
            raise InvalidInputError(
                "these input_ids do not begin with the prompt that is in the cache; pass the ids that generate "
                "returned, followed by the new turn, or start with an empty cache"
            )
    return _Turn(known, width, width)


def _new_images(ids: Tensor, tail: Tensor, image_token_id: int, images: _Images) -> list[int]:
    """Which images are not in the cache yet: all, or those of the tail if all of the conversation were passed."""
    n = images.num_tokens
    every = ((ids == image_token_id).sum(dim=1) // n).tolist()
    new = ((tail == image_token_id).sum(dim=1) // n).tolist()
    if len(images) != sum(every):
        return list(range(len(images)))
    ends = torch.tensor(every).cumsum(0).tolist()
    return [image for end, count in zip(ends, new, strict=True) for image in range(end - count, end)]


def _question(
    model: Any,
    ids: Int[Tensor, "b l"],
    mask: Tensor | None,
    image_token_id: int,
    rows: Int[Tensor, " i"],
    processor: Any,
    text: str | Sequence[str] | None,
) -> dict[str, Tensor | None]:
    """`text` and `text_mask` of `VisualTokens`: the question of each image's row as word embeddings, packed."""
    special = _special_ids(model, processor).to(ids.device)
    if text is not None:
        texts = [text] * ids.shape[0] if isinstance(text, str) else list(text)
        if processor is None or len(texts) != ids.shape[0]:
            raise InvalidInputError(
                f"text needs the processor and one question per prompt, got {len(texts)} for {ids.shape[0]} prompts "
                f"and processor={processor}"
            )
        words = [processor.tokenizer(line, add_special_tokens=False)["input_ids"] for line in texts]
        lengths = torch.tensor([len(line) for line in words])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(line, dtype=torch.long) for line in words], True).to(ids)
        chosen = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).to(ids.device) & ~torch.isin(ids, special)
    else:
        mask = None if mask is None else mask[:, mask.shape[1] - ids.shape[1] :].bool()
        chosen = find_question(ids, mask, image_token_id, special)
    longest = int(chosen.sum(dim=1).max().item())
    if longest == 0:
        return {"text": None, "text_mask": None}
    order = torch.argsort(chosen.int(), dim=1, stable=True, descending=True)[rows, :longest]
    embedding = model.get_input_embeddings()
    return {"text": embedding(ids[rows].gather(1, order)), "text_mask": chosen[rows].gather(1, order)}


def _shorten_tensors(
    inputs: Mapping[str, Any],
    image_inputs: Sequence[str],
    columns: Int[Tensor, "b m"],
    own: Int[Tensor, "b s"],
    pad_id: int,
) -> dict[str, Any]:
    """The inputs without images: `columns` of the conversation for the mask, `own` for what is like `input_ids`."""
    shape = inputs["input_ids"].shape
    fills = {"input_ids": pad_id, "labels": -100}
    short = {name: value for name, value in inputs.items() if name not in image_inputs}
    for name, value in short.items():
        if name not in ("attention_mask", "position_ids") and isinstance(value, Tensor) and value.shape == shape:
            short[name] = take_columns(value, own, fills.get(name, 0))
    mask = inputs.get("attention_mask")
    real = columns >= 0
    if mask is not None:
        short["attention_mask"] = take_columns(mask, columns, 0)
        real = short["attention_mask"].bool()
    elif not real.all():
        short["attention_mask"] = real.long()
    if inputs.get("position_ids") is not None:
        # Compact: gaps would make attention kernels believe that several sequences were packed into one.
        short["position_ids"] = compact_positions(real, own.shape[1])
    return short


def _check_inputs(adapter: ModelAdapter, config: Any, inputs: Mapping[str, Any], with_images: bool) -> None:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not with_images:
        in_cache = inputs.get("past_key_values") is not None or inputs.get("mm_encoder_outputs") is not None
        if ids is not None and not in_cache and (ids == adapter.image_token_id).any():
            raise InvalidInputError(
                "the prompt holds image placeholders, but no image came with it; pass pixel_values, "
                "or take the placeholders out of the prompt"
            )
        return
    if ids is None:
        raise InvalidInputError(
            "images can be pruned only together with input_ids, which say where they stand; pass input_ids, not "
            "inputs_embeds"
        )
    if mask is not None and mask.ndim != 2:
        raise InvalidInputError(
            f"attention_mask has {mask.ndim} dimensions, but a prompt can be shortened only with the 2-D mask (rows x "
            "columns) that the processor makes"
        )
    for name in adapter.image_inputs[1:]:
        value = inputs.get(name)
        if value is not None and (not hasattr(config, name) or getattr(config, name) != value):
            raise InvalidInputError(
                f"{name}={value} differs from the model's config and cannot be set per call while pruning; "
                f"set model.config.{name}"
            )


def _special_ids(model: Any, processor: Any) -> Int[Tensor, " s"]:
    """Ids that are no words: of the configs, and of the tokenizer where a processor was given."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "video_token_id")
    configs = (model.config, model.config.get_text_config(), model.generation_config)
    found: set[int] = set() if processor is None else set(processor.tokenizer.all_special_ids)
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            found.update([] if value is None else value if isinstance(value, list | tuple) else [value])
    return torch.tensor(sorted(found), dtype=torch.long)


def _pad_id(model: Any) -> int:
    """What to write into padding columns, which the mask hides; never the placeholder."""
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is not None:
            return config.pad_token_id
    return 0 if model.config.image_token_id != 0 else 1


def _by_name(function: Callable[..., Any], owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a method call as keywords."""
    if not args:
        return dict(kwargs)
    arguments = dict(inspect.signature(function).bind(owner, *args, **kwargs).arguments)
    return {**dict(list(arguments.items())[1:]), **arguments.pop("kwargs", {})}
