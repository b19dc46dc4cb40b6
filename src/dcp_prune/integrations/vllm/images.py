"""From pixels and requests to the few tokens that the language model reads: encoders walked and pruners called as for
transformers, in batches that vLLM makes of many prompts."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dcp_prune.errors import InvalidInputError, NonFiniteError
from dcp_prune.integrations.stopwatch import Stopwatch
from dcp_prune.integrations.vllm.cache import LRUCache, tensor_bytes
from dcp_prune.integrations.vllm.metrics import Metrics
from dcp_prune.integrations.vllm.request import ImageRequest
from dcp_prune.integrations.vllm.settings import Settings
from dcp_prune.models import ImageLayout, ModelAdapter
from dcp_prune.models.layout import plain_layout
from dcp_prune.pruners.base import Pruner
from dcp_prune.tokens import Signal, VisualTokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Plan:
    """How images of one size are pruned to one budget.

    Attributes:
        pruner: with that budget.
        stages: what it drops inside the encoder.
        signals: what it wants to know of the encoder.
    """

    pruner: Pruner
    stages: tuple[Any, ...]
    signals: frozenset[Signal]


class ImagePruner:
    """Encodes and prunes the images of a server.

    Attributes:
        cache: encoded images, for the next question about them. Only the pruner's last step reads the question, so an
            image that is asked about again costs no more than that step.
        encoded_images: how many went through the encoder.

    Raises:
        MissingSignalError: the pruner wants what this model does not give.
        InvalidInputError: a stage of the pruner does not fit the encoder.
    """

    def __init__(
        self,
        settings: Settings,
        adapter: ModelAdapter,
        embed: Callable[[Int[Tensor, " t"]], Float[Tensor, "t d"]],
        metrics: Metrics | None,
        hand_over: Callable[[Float[Tensor, "k d"], Int[Tensor, " k"], ImageLayout], Tensor] = lambda kept, *_: kept,
    ) -> None:
        """Args:
        settings: of the server.
        adapter: of the model.
        embed: the language model's word embeddings.
        metrics: where to report; None reports nothing, as on all ranks but the first.
        hand_over: what vLLM gets of an image's kept tokens, made of them, their places in the image and its layout.
        """
        self.hand_over = hand_over
        self.settings, self.adapter, self.embed, self.metrics = settings, adapter, embed, metrics
        self.cache: LRUCache[VisualTokens] = LRUCache(settings.stage1_cache_mb * 10**6 if settings.reads_text else 0)
        self.encoded_images = 0
        self._plans: dict[tuple[int, int, int], _Plan] = {}
        pruner = settings.make_pruner()
        adapter.check_signals(type(pruner).__name__, pruner.requires)
        self._plan(settings.num_tokens, plain_layout(*adapter.grid()))

    def __call__(
        self, images: Mapping[str, Any], layouts: Sequence[ImageLayout], requests: Sequence[ImageRequest]
    ) -> list[Float[Tensor, "k d"]]:
        """The kept tokens of each image, in its order.

        Args:
            images: model inputs as the adapter takes them.
            layouts: one for each image.
            requests: one for each image; all ask for fewer tokens than stock vLLM would give.

        Raises:
            InvalidInputError: the prompt was not made for these images.
        """
        for layout, request in zip(layouts, requests, strict=True):
            check_length(layout, request)
        kept: list[Tensor] = []
        for part in _parts(layouts, self.settings.max_images_per_batch):
            chosen = self.adapter.take(images, layouts, part)
            kept += self._prune_apart(chosen, layouts[part.start : part.stop], requests[part.start : part.stop])
        return kept

    def _prune_apart(
        self, images: Mapping[str, Any], layouts: Sequence[ImageLayout], requests: Sequence[ImageRequest]
    ) -> list[Float[Tensor, "k d"]]:
        """`_prune`, where an image without finite features costs its own request only: an error would end the engine.

        Such an image gets rows of NaN, which is what stock vLLM would read of it. One that vLLM measures itself by when
        it starts is an error still, for then it is the model that is broken.
        """
        try:
            return self._prune(images, layouts, requests)
        except NonFiniteError as error:
            if len(requests) > 1:
                singles = [slice(image, image + 1) for image in range(len(requests))]
                return [
                    self._prune_apart(self.adapter.take(images, layouts, [one.start]), layouts[one], requests[one])[0]
                    for one in singles
                ]
            if not requests[0].is_real:
                raise
            log.warning(
                "%s; this image's request gets NaN in its place, as from stock vLLM, and the rest goes on", error
            )
            if self.metrics is not None:
                self.metrics.count(nonfinite_images=1)
            places = torch.arange(requests[0].num_tokens, device=images[self.adapter.image_inputs[0]][0].device)
            senseless = torch.full_like(self.embed(torch.zeros_like(places)), torch.nan)
            return [self.hand_over(senseless, places, layouts[0])]

    def _plan(self, num_tokens: int, layout: ImageLayout) -> _Plan:
        tile, n = layout.tile_size, sum(layout.tile_lengths)
        if (num_tokens, tile, n) not in self._plans:
            pruner = self.settings.make_pruner(num_tokens)
            signals = frozenset() if num_tokens >= n else (pruner.requires | pruner.optional) & self.adapter.signals
            stages = self.adapter.check_stages(pruner.encoder_stages(tile, self.adapter.num_layers))
            self._plans[num_tokens, tile, n] = _Plan(pruner, stages, signals)
        return self._plans[num_tokens, tile, n]

    def _prune(
        self, images: Mapping[str, Any], layouts: Sequence[ImageLayout], requests: Sequence[ImageRequest]
    ) -> list[Float[Tensor, "k d"]]:
        device = images[self.adapter.image_inputs[0]][0].device
        watch = Stopwatch(device)
        plans = [self._plan(request.num_tokens, layout) for request, layout in zip(requests, layouts, strict=True)]
        encoded = self._encode(images, layouts, requests, plans, watch)
        watch.lap("encode")
        texts = self._embed_words(requests, device)
        kept: list[Any] = [None] * len(requests)
        alike = [
            (request.num_tokens, plan.signals, one.features.shape, one.num_original, one.tiles is None)
            for request, plan, one in zip(requests, plans, encoded, strict=True)
        ]
        for group in _grouped(range(len(requests)), lambda image: alike[image]):
            tokens, k = join([encoded[image] for image in group]), requests[group[0]].num_tokens
            words = [texts[image] for image in group]
            if any(len(text) for text in words):
                text = pad_sequence(words, batch_first=True)
                lengths = torch.tensor([len(text) for text in words], device=text.device).unsqueeze(1)
                mask = torch.arange(text.shape[1], device=text.device) < lengths
                tokens = replace(tokens, text=text, text_mask=mask)
            pruned = plans[group[0]].pruner(tokens)
            for row, image in enumerate(group):
                kept[image] = self.hand_over(pruned.features[row, :k], pruned.indices[row, :k], layouts[image])
            real = [row for row, image in enumerate(group) if requests[image].is_real]
            if self.metrics is not None and real:
                self.metrics.count(pruned_images=len(real))
                watch.lap("select")
                self.metrics.observe({name: value[real] for name, value in pruned.stats.items() if value.ndim}, watch)
                watch = Stopwatch(device)
        return kept

    def _encode(
        self,
        images: Mapping[str, Any],
        layouts: Sequence[ImageLayout],
        requests: Sequence[ImageRequest],
        plans: Sequence[_Plan],
        watch: Stopwatch,
    ) -> list[VisualTokens]:
        """Each image's tokens behind the encoder and the projector, as a batch of one."""
        keys: list[Hashable] = [
            (request.key, plan.stages, plan.signals) if request.is_real else number
            for number, (request, plan) in enumerate(zip(requests, plans, strict=True))
        ]
        found: dict[Hashable, VisualTokens] = {}
        if self.cache.capacity:
            for key, request in zip(keys, requests, strict=True):
                known = self.cache.get(key) if request.is_real else None
                if known is not None:
                    found[key] = known
            if self.metrics is not None:
                real = sum(request.is_real for request in requests)
                self.metrics.count(stage1_lookups=real, stage1_hits=sum(key in found for key in keys))
        first = {key: image for image, key in reversed(list(enumerate(keys))) if key not in found}
        missing = sorted(first.values())
        for group in _grouped(missing, lambda image: (plans[image].stages, plans[image].signals)):
            plan = plans[group[0]]
            # Images that keep different numbers of tokens need a padding mask, which vLLM's attention does not take.
            alone = any(stage.num_tokens is None for stage in plan.stages)
            for part in [[image] for image in group] if alone else [group]:
                chosen = self.adapter.take(images, layouts, part)
                shapes = [layouts[image] for image in part]
                tokens = self.adapter.encode(chosen, plan.stages, plan.signals, watch.lap, shapes).tokens
                self.encoded_images += len(part)
                for row, image in enumerate(part):
                    found[keys[image]] = one = own_tokens(take(tokens, row), layouts[image])
                    if requests[image].is_real:
                        self.cache.put(keys[image], one, tensor_bytes(one))
        return [found[key] for key in keys]

    def _embed_words(self, requests: Sequence[ImageRequest], device: torch.device) -> list[Float[Tensor, "t d"]]:
        """Embeddings of each image's words. Every rank of a tensor-parallel group takes part in the same call."""
        lengths = [len(request.text_ids) for request in requests]
        ids = torch.tensor([token for request in requests for token in request.text_ids], dtype=torch.long)
        if not sum(lengths):
            return [torch.empty(0, device=device)] * len(requests)
        return list(self.embed(ids.to(device, non_blocking=True)).split(lengths))


def take(tokens: Any, row: int) -> Any:
    """One row of a batch of tokens, as a batch of one with storage of its own."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[row : row + 1].clone()
        if is_dataclass(value):
            return take(value, row)
        return (value[row],) if isinstance(value, tuple) else value

    return replace(tokens, **{each.name: cut(getattr(tokens, each.name)) for each in fields(tokens)})


def own_tokens(tokens: VisualTokens, layout: ImageLayout) -> VisualTokens:
    """The tokens of one image as if it had been encoded alone: without the padding of larger ones beside it."""
    n, most = len(layout), sum(layout.tile_lengths)
    encoder = tokens.encoder
    if encoder is not None:
        cut = {name: value[:, :most] for name, value in vars(encoder).items() if isinstance(value, Tensor)}
        encoder = replace(encoder, **cut)
    return replace(
        tokens,
        features=tokens.features[:, :most],
        mask=tokens.mask[:, :most],
        positions=tokens.positions[:, :most],
        indices=tokens.indices[:, :most],
        num_original=n,
        assignment=tokens.assignment[:, :n],
        encoder=encoder,
        tiles=None if tokens.tiles is None or len(layout) == layout.tile_size else tokens.tiles[:, :most],
        tile_lengths=None if len(layout) == layout.tile_size else (layout.tile_lengths,),
    )


def check_length(layout: ImageLayout, request: ImageRequest) -> None:
    """Whether the prompt has as many tokens for an image as the image can fill: all of them, or some of those that are
    no separators.

    Raises:
        InvalidInputError: it has more.
    """
    n, patches = len(layout), sum(layout.tile_lengths)
    if request.num_tokens != n and request.num_tokens > patches:
        raise InvalidInputError(
            f"the prompt holds {request.num_tokens} visual tokens for an image that has {n}, of which {patches} can be "
            "kept; send the size and the pixels that the model's own processor makes of one image"
        )


def _parts(layouts: Sequence[ImageLayout], size: int) -> list[range]:
    """Images that follow each other, together: at most `size` tiles, but at least one image."""
    starts, tiles = [0], 0
    for image, layout in enumerate(layouts):
        tiles += layout.num_tiles
        if tiles > size and image > starts[-1]:
            starts.append(image)
            tiles = layout.num_tiles
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(layouts)], strict=True)]


def join(parts: Sequence[Any]) -> Any:
    """A batch of tokens from batches that have as many tokens per image and the same signals."""
    if len(parts) == 1:
        return parts[0]

    def glue(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(list(values))
        if is_dataclass(values[0]):
            return join(values)
        return sum(values, ()) if isinstance(values[0], tuple) else values[0]

    names = [each.name for each in fields(parts[0])]
    return replace(parts[0], **{name: glue([getattr(part, name) for part in parts]) for name in names})


def _grouped(images: Sequence[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """The images of equal keys together, in the order of their first."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for image in images:
        groups[key(image)].append(image)
    return list(groups.values())
