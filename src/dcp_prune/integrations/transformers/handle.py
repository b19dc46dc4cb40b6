"""`prune`: a pruner attached to a model, in every call until it is removed."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from dcp_prune.budget import DEFAULT_NUM_TOKENS
from dcp_prune.errors import InvalidInputError, UnsupportedModelError
from dcp_prune.integrations.transformers.cache import CachedPrompt, forget, is_pruned, knows_position, recall, remember
from dcp_prune.integrations.transformers.generation import for_short_prompt, setting
from dcp_prune.integrations.transformers.inputs import ShortInputs, shorten
from dcp_prune.integrations.transformers.positions import Positions, check_positions
from dcp_prune.integrations.transformers.question import FindWords, Question, Text, TextScope
from dcp_prune.integrations.transformers.record import PruneRecord, warn_if_nothing_was_pruned
from dcp_prune.models import base_model, get_adapter
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import make_pruner
from dcp_prune.tokens import TextSpace

_running: ContextVar[ShortInputs | None] = ContextVar("running", default=None)
"""The short inputs of the plain call that is under way, for what is to be done behind it."""


def prune(
    model: PreTrainedModel,
    pruner: Pruner | str,
    *,
    processor: Any = None,
    text_scope: TextScope | FindWords = "after_image",
    text_space: TextSpace | None = None,
    keep_markers: bool = False,
    positions: Positions = "compact",
    on_record: Callable[[PruneRecord], object] | None = None,
    **options: Any,
) -> PruneHandle:
    """Prunes in every `model.generate(...)` and `model(...)` from now on; a context manager, or `remove()` it.

        with prune(model, "dcp", num_tokens=16) as handle:
            ids = model.generate(**inputs)
            handle.last.indices

    Args:
        model: a model with an adapter, or a `PeftModel` around one.
        pruner: which tokens to keep, and how many; a `Pruner`, or the name of one with its options behind.
        processor: the model's processor; its tokenizer knows more special tokens than the model's config.
        text_scope, text_space, keep_markers, positions: as for `prune_inputs`.
        on_record: told of every call with images as soon as they are pruned, in the thread of the call.
        options: of a pruner that is given by name, as for `make_pruner`; 16 tokens if they do not say how many.

    Raises:
        UnknownPrunerError: no pruner of that name.
        UnsupportedModelError: see `get_adapter`; or the model's class overrides `generate`.
        UnsupportedVersionError: see `get_adapter`.
        InvalidInputError: the model has a handle already, or an encoder stage does not fit the encoder.
        MissingSignalError: the pruner requires a signal that the model does not give.
    """
    return PruneHandle(
        model,
        _as_pruner(pruner, options),
        processor=processor,
        text_scope=text_scope,
        text_space=text_space,
        keep_markers=keep_markers,
        positions=positions,
        on_record=on_record,
    )


def _as_pruner(pruner: Any, options: Mapping[str, Any]) -> Pruner:
    if isinstance(pruner, str):
        if not {"num_tokens", "keep_ratio"} & options.keys():
            options = {**options, "num_tokens": DEFAULT_NUM_TOKENS}
        return make_pruner(pruner, **options)
    if options:
        raise InvalidInputError(
            f"{', '.join(options)}: options are for a pruner that is given by name; give them to the pruner itself"
        )
    if not isinstance(pruner, Pruner):
        made = pruner.__name__ if isinstance(pruner, type) else type(pruner).__name__
        what = f"the class {made}" if isinstance(pruner, type) else f"a {made}"
        raise InvalidInputError(
            f'prune needs a pruner or its name, got {what}; write DCPPruner(num_tokens=16), or "dcp", num_tokens=16'
        )
    return pruner


def get_handle(model: PreTrainedModel) -> PruneHandle | None:
    """The handle that prunes this model's calls, e.g. on a `deepcopy` of an attached model; None if there is none."""
    # The hook is asked, since others may wrap `generate`, for timing or tracing, while the handle is there.
    owners = (getattr(hook, "__self__", None) for hook in base_model(model)._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, PruneHandle)), None)


class PruneHandle:
    """The attachment of one pruner to one model: instance attributes `generate` and `init_continuous_batching`, and a
    forward hook before and behind the call.

    `generate` returns the ids that were passed in, followed by new tokens. A plain `model(...)` returns logits of the
    short prompt; `handle.last.columns` says which original column each belongs to. With `labels`, logits have the
    columns of the labels, and are 0 where a token was dropped. Calls of inner modules, such as `model.model(...)`, are
    not touched.

    Attributes:
        model, pruner, processor, text_scope, text_space, keep_markers, positions, on_record: as given to `prune`.
        text: what text-aware pruners read instead of the prompt, in every call until it is None again; see
            `prune_inputs`.
        last: record of the latest call with images, by whatever thread; None before the first one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pruner: Pruner,
        *,
        processor: Any = None,
        text_scope: TextScope | FindWords = "after_image",
        text_space: TextSpace | None = None,
        keep_markers: bool = False,
        positions: Positions = "compact",
        on_record: Callable[[PruneRecord], object] | None = None,
    ) -> None:
        attached = get_handle(model)
        if attached is not None:
            raise InvalidInputError(
                f"this {type(model).__name__} already prunes with {attached.pruner}; "
                "remove that handle first: get_handle(model).remove()"
            )
        adapter = get_adapter(model)
        model = base_model(model)
        _check_generate(type(model))
        adapter.check_signals(type(pruner).__name__, pruner.requires)
        rows, cols = adapter.grid()
        adapter.check_stages(pruner.encoder_stages(rows * cols, adapter.num_layers))
        self.model: Any = model
        self.pruner = pruner
        self.processor = processor
        self.text: Text | None = None
        self.text_scope: TextScope | FindWords = text_scope
        self.text_space: TextSpace | None = text_space
        Question(
            text_scope, processor=processor, space=text_space or pruner.text_space
        )  # refuses what cannot work before any call
        self.keep_markers = keep_markers
        check_positions(model, positions)
        self.positions: Positions = positions
        self.on_record = on_record
        self.last: PruneRecord | None = None
        videos = (adapter.video.image_inputs[0],) if adapter.video else ()
        self._visual = (adapter.image_inputs[0], *videos, *adapter.unpruned_inputs)
        self._recent: deque[CachedPrompt] = deque(maxlen=8)
        self._previous = model.__dict__.get("generate")
        # Bound methods: deepcopy of a model binds them to the copy, where a closure would keep calling the original.
        self._hooks = (
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        )
        self.model.generate = self._generate
        self.model.init_continuous_batching = self._refuse_continuous_batching

    def remove(self) -> None:
        """Leaves the model as it was; doing it twice does no harm.

        Where someone wrapped `generate` meanwhile, the wrapper stays, and what it calls prunes no more.
        """
        if get_handle(self.model) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        for name, ours in (
            ("generate", self._generate),
            ("init_continuous_batching", self._refuse_continuous_batching),
        ):
            if self.model.__dict__.get(name) == ours:
                del self.model.__dict__[name]
                if name == "generate" and self._previous is not None:
                    self.model.generate = self._previous

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"PruneHandle({type(self.model).__name__}, {self.pruner})"

    # All but the name, by which pickle finds a method.
    @functools.wraps(vars(GenerationMixin)["generate"], assigned=("__doc__", "__annotations__"))
    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        original = self._previous or functools.partial(type(self.model).generate, self.model)
        if get_handle(self.model) is not self:  # removed, but called by a wrapper that outlived it
            return original(*args, **kwargs)
        call = _by_name(type(self.model).generate, self.model, args, kwargs)
        if call.get("inputs") is not None:
            call["input_ids"] = call.pop("inputs")
        with torch.no_grad():
            short = self._shorten(call, whole_prompt=True)
        warn_if_nothing_was_pruned(short.record)
        if short.columns is None:
            return original(**call)
        self._refuse_candidates(call)
        output = original(
            **for_short_prompt(short.inputs, call["input_ids"], short.restore, self.model.generation_config)
        )
        # Beams are sorted at the end, and the rows of the cache are not.
        beams = (setting("num_beams", call, self.model.generation_config) or 1) > 1
        if isinstance(output, Tensor):
            self._remember(call.get("past_key_values"), short, None if beams else output)
            return short.restore(output)
        self._remember(output.get("past_key_values"), short, None if beams else output.sequences)
        output.sequences = short.restore(output.sequences)
        return output

    def _refuse_candidates(self, call: dict[str, Any]) -> None:
        """Prompt lookup and assistants make the model check several tokens at once; not every family does it right."""
        defaults = self.model.generation_config
        asked = call.get("assistant_model") is not None or setting("prompt_lookup_num_tokens", call, defaults)
        if asked and not get_adapter(self.model).checks_candidates:
            raise InvalidInputError(
                f"with a pruned prompt, {type(self.model).__name__} gives other answers when candidate tokens are "
                "checked together; leave out prompt_lookup_num_tokens and assistant_model"
            )

    def _before_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _by_name(type(model).forward, model, args, kwargs) if args else kwargs
        if all(call.get(name) is None for name in self._visual) and (
            torch.compiler.is_compiling() or not self._is_long_step(call)
        ):
            return None if torch.compiler.is_compiling() else self._place_step(call)
        return self._shorten_call(model, call)  # type: ignore[attr-defined]

    @torch.compiler.disable  # a compiled model begins behind it: what is chosen depends on data
    def _shorten_call(self, model: Any, call: Mapping[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        short = self._shorten(call, whole_prompt=False)
        warn_if_nothing_was_pruned(short.record)
        if short.columns is None:
            return None
        inputs = short.inputs
        config = model.config.get_text_config(decoder=True)
        if inputs.get("past_key_values") is None and inputs.get("use_cache", config.use_cache) and not model.training:
            # The model would make this cache itself; made here, it is recognised when the caller comes back with it.
            inputs["past_key_values"] = DynamicCache(config=config)
        if short.next_position is not None and inputs["position_ids"].ndim == 3:
            real = inputs.get("attention_mask", short.columns >= 0)
            get_adapter(model).rope_offset = short.next_position - real.sum(dim=1, keepdim=True)
        _running.set(short)
        return (), inputs

    def _place_step(self, call: Mapping[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        """Positions of a plain call behind a short prompt, where they do more than count what is in the cache."""
        cache, ids = call.get("past_key_values"), call.get("input_ids")
        if call.get("position_ids") is not None or ids is None or cache is None or not knows_position(cache):
            return None
        cached = recall(cache, len(ids), self._recent)
        if cached is None or cached.next_position is None:
            return None
        behind = int(cache.get_seq_length()) - cached.columns.shape[1]
        steps = cached.next_position.to(ids.device) + torch.arange(behind, behind + ids.shape[1], device=ids.device)
        if get_adapter(self.model).rope_offset is not None:  # of several axes, along which text lies side by side
            steps = steps.expand(3, *ids.shape)
        return (), {**call, "position_ids": steps}

    def _after_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if torch.compiler.is_compiling() and kwargs.get("mm_encoder_outputs") is None:
            return None
        return self._finish_call(kwargs, output)  # type: ignore[attr-defined]

    @torch.compiler.disable
    def _finish_call(self, kwargs: Mapping[str, Any], output: Any) -> Any:
        """Writes on the cache what is in it; beside labels, logits go back to the columns that the labels have."""
        short = _running.get()
        if short is None or short.tensors["input_ids"] is not kwargs.get("input_ids"):
            return None
        _running.set(None)
        self._remember(kwargs.get("past_key_values"), short)
        return None if kwargs.get("labels") is None else _with_long_logits(output, short, kwargs)

    def _refuse_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        if get_handle(self.model) is not self:
            return type(self.model).init_continuous_batching(self.model, *args, **kwargs)
        raise InvalidInputError(
            "continuous batching (generate_batch, cache_implementation='paged') takes token ids without images and "
            "would answer without seeing them; call generate, or remove the handle for prompts that have no image"
        )

    def _is_long_step(self, call: Mapping[str, Any]) -> bool:
        """Whether a plain call continues a pruned prompt, and its mask or positions still count the dropped tokens."""
        cache, mask, ids = (call.get(name) for name in ("past_key_values", "attention_mask", "input_ids"))
        # `generate` makes masks of its own for some caches: 4-D, or a dictionary of them for kinds of layers.
        if cache is None or ids is None or not (is_pruned(cache) or self._recent):
            return False
        filled = int(cache.get_seq_length())
        if filled == 0:
            forget(cache)
            return False
        end = filled + ids.shape[1]
        if mask is not None:
            return isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > end
        positions = call.get("position_ids")
        return positions is not None and positions.ndim == 2 and int(positions.max()) >= end

    def _shorten(self, call: Mapping[str, Any], *, whole_prompt: bool) -> ShortInputs:
        cache, ids = call.get("past_key_values"), call.get("input_ids")
        cached = None if ids is None else recall(cache, len(ids), self._recent)
        short = shorten(
            self.model,
            call,
            self.pruner,
            question=Question(self.text_scope, self.text, self.processor, self.text_space or self.pruner.text_space),
            keep_markers=self.keep_markers,
            positions=self.positions,
            cached=cached,
            whole_prompt=whole_prompt,
        )
        if short.record is not None:
            self.last = short.record
            if self.on_record is not None:
                self.on_record(short.record)
        return short

    def _remember(self, cache: Any, short: ShortInputs, sequences: Int[Tensor, "r s"] | None = None) -> None:
        """Writes on a cache what is in it.

        Args:
            cache: behind the call; None if there is none.
            short: the call.
            sequences: the short prompt with what was generated, in the rows of the cache.
        """
        if cache is None or short.columns is None:
            return
        ids = short.original["input_ids"]
        known = ids if ids.shape[1] == short.width else None
        prompt = CachedPrompt(short.columns, short.width, known, short.next_position)
        if sequences is not None and known is not None:
            prompt = prompt.repeat(len(sequences) // len(known))
            behind = sequences[:, short.tensors["input_ids"].shape[1] :]
            prompt = prompt.followed_by(behind[:, : int(cache.get_seq_length()) - prompt.columns.shape[1]])
        prompt = remember(cache, prompt)
        if short.record is not None:
            self._recent.append(prompt)


def _with_long_logits(output: Any, short: ShortInputs, call: Mapping[str, Any]) -> Any:
    """Logits in the columns of the labels that the caller gave."""
    wanted = call.get("logits_to_keep")
    logits = output[1] if isinstance(output, tuple) else output.get("logits")
    if logits is None or not (wanted is None or (isinstance(wanted, int) and wanted == 0)):
        return None
    if isinstance(output, tuple):
        return (output[0], short.restore_logits(logits), *output[2:])
    output.logits = short.restore_logits(logits)
    return output


def _check_generate(cls: type) -> None:
    """Refuses a model whose class does something else in `generate` than transformers."""
    owner = next((parent for parent in cls.__mro__ if "generate" in vars(parent)), cls)
    if owner is not GenerationMixin:
        raise UnsupportedModelError(
            f"{owner.__name__} overrides generate, and what it does with a shorter prompt is unknown; load the class "
            "of transformers without trust_remote_code, or call prune_inputs and hand its inputs on yourself"
        )


def _by_name(function: Callable[..., Any], owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a method call as keywords."""
    if not args:
        return dict(kwargs)
    arguments = dict(inspect.signature(function).bind(owner, *args, **kwargs).arguments)
    return {**dict(list(arguments.items())[1:]), **arguments.pop("kwargs", {})}
