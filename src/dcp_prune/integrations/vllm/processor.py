"""vLLM's side of the prompt: every image gets its budget, its words and a cache key that holds both.

vLLM finds processed images, encoded images and blocks of the KV cache by one string per image. It is taken here, before
anything is looked up, from the image, the budget, the pruner and the words that the pruner reads.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing.inputs import ProcessorInputs

from dcp_prune.errors import InvalidInputError, UnsupportedModelError
from dcp_prune.integrations.vllm import check_tower
from dcp_prune.integrations.vllm.metrics import Metrics
from dcp_prune.integrations.vllm.request import FIELD, ImageRequest, to_inputs
from dcp_prune.integrations.vllm.settings import Settings
from dcp_prune.integrations.vllm.words import Words, turn_ends

NUM_TOKENS = "num_tokens"
"""What a request may set in `mm_processor_kwargs`."""
ENCODED = (EmbeddingItems, DictEmbeddingItems)
"""Images that come encoded, from one tensor or with what goes with it."""
REQUESTS = "dcp_requests"
"""Where the requests of a prompt's images stand in the processor's keywords, on their way to its output."""


class ImageHashes(dict[str, list[str]]):
    """Modality -> cache key of each item, as vLLM wants it; remembers the requests of the images."""

    requests: list[ImageRequest]


@dataclass
class PrunedInputs(ProcessorInputs):
    """What vLLM hands to a processor, with cache keys that were made before."""

    hashes: ImageHashes = field(default_factory=ImageHashes)

    def get_mm_hashes(self, *_: Any, **__: Any) -> ImageHashes:
        return self.hashes


class RequestingProcessor:
    """A processor of transformers that adds the requests of the images to its output."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        requests = kwargs.pop(REQUESTS, None)
        kwargs.pop(NUM_TOKENS, None)
        output = self.processor(*args, **kwargs)
        if requests is not None:
            output.update(to_inputs(requests))
        return output


class PrunedProcessingInfo:
    """What vLLM asks about a model's images, in front of the stock class.

    Raises (at construction):
        UnsupportedModelError: settings that cannot be, in one sentence.
        UnknownPrunerError: no such pruner.
    """

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)  # type: ignore[call-arg]
        check_tower(ctx.get_hf_config().vision_config.model_type)
        try:
            _ = self.settings  # refused when the server starts, not with the first image
        except InvalidInputError as error:
            # A ValueError would make vLLM believe that the model reads no images, and serve it without.
            raise UnsupportedModelError(str(error)) from error

    @cached_property
    def settings(self: Any) -> Settings:
        given = self.ctx.get_mm_config().mm_processor_kwargs or {}
        if NUM_TOKENS in given:
            raise InvalidInputError(
                "--mm-processor-kwargs sets num_tokens for the whole server; set it as num_tokens of dcp_prune in "
                "--hf-overrides"
            )
        return Settings.of(self.get_hf_config())

    def get_hf_processor(self, **kwargs: Any) -> RequestingProcessor:
        for name in (NUM_TOKENS, REQUESTS):
            kwargs.pop(name, None)
        return RequestingProcessor(super().get_hf_processor(**kwargs))  # type: ignore[misc]

    def count_tokens(self: Any, size: Any, mm_kwargs: Mapping[str, object]) -> tuple[int, int]:
        """Visual tokens of an image in stock vLLM, and how many of them a pruner may choose from, which separators
        between rows are not; as many as the adapter's layout of the image says.

        Args:
            size: `width` and `height` of the image in pixels.
            mm_kwargs: what the request says about the processing of images.
        """
        n = self.get_num_image_tokens(image_width=size.width, image_height=size.height)
        return n, n

    def get_mm_max_tokens_per_item(self: Any, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": min(self.settings.num_tokens, self.get_max_image_tokens())}


class PrunedProcessor:
    """Puts budgets and words into the cache keys and the model's inputs, and shortens the prompt."""

    info: Any

    @cached_property
    def words(self) -> Words:
        settings, config, tokenizer = self.info.settings, self.info.get_hf_config(), self.info.get_tokenizer()
        return Words(
            scope=settings.text_scope if settings.reads_text else "none",
            image_token_id=self.image_token_id,
            special_ids=frozenset(tokenizer.all_special_ids) | _special_ids(config),
            turn_ends=turn_ends(tokenizer, settings.turn_end),
        )

    @property
    def image_token_id(self) -> int:
        config = self.info.get_hf_config()
        return next(getattr(config, name) for name in ("image_token_id", "image_token_index") if hasattr(config, name))

    @cached_property
    def metrics(self) -> Metrics:
        return Metrics.of_process()

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Processes a prompt, with a request for each of its images.

        Raises:
            InvalidInputError: a budget above the server's, a pruner that needs words and finds none, or encoded images
                of another length than the budget.
        """
        settings: Settings = self.info.settings
        others = {name: value for name, value in inputs.hf_processor_mm_kwargs.items() if name != NUM_TOKENS}
        budget = settings.budget_of(inputs.hf_processor_mm_kwargs.get(NUM_TOKENS))
        mm_config = self.info.ctx.get_mm_config()
        plain = replace(inputs, hf_processor_mm_kwargs=others)
        found = plain.get_mm_hashes(self.info.model_id, mm_config.mm_hasher_algorithm)
        images = found.get("image", [])
        hashes = ImageHashes(found)
        counts = self._counts(inputs.mm_data_items.get("image", ()), budget, others)
        hashes.requests = self._requests(inputs.prompt, images, counts)
        hashes["image"] = [
            cache_key(image, settings.fingerprint, request)
            for image, request in zip(images, hashes.requests, strict=True)
        ]
        given = {each.name: getattr(inputs, each.name) for each in fields(inputs)}
        given["hf_processor_mm_kwargs"] = {**others, NUM_TOKENS: budget, REQUESTS: hashes.requests}
        requests = list(hashes.requests)
        output = super().apply(PrunedInputs(**given, hashes=hashes), *args, **kwargs)  # type: ignore[misc]
        if any(request.is_real for request in requests):
            kept = sum(place.length for place in output["mm_placeholders"]["image"])
            self.metrics.count(visual_tokens_before=sum(n for n, _ in counts), visual_tokens_after=kept)
        return output

    def _counts(self, images: Any, budget: int, mm_kwargs: Mapping[str, object]) -> list[tuple[int, int]]:
        """Of each image, its visual tokens without pruning and those of them that the prompt will hold; encoded images,
        and those known by name only, count as large ones."""
        counts = []
        for image in range(len(images)):
            if isinstance(images, ENCODED) or images.get(image) is None:
                n = patches = self.info.get_max_image_tokens()
            else:
                n, patches = self.info.count_tokens(images.get_image_size(image), mm_kwargs)
            counts.append((n, tokens_left(budget, n, patches)))
        return counts

    def _requests(
        self, prompt: Sequence[int], images: Sequence[str], counts: Sequence[tuple[int, int]]
    ) -> list[ImageRequest]:
        """What is asked of each image: the words only where something is left out of it."""
        settings: Settings = self.info.settings
        cut = [left < n for n, left in counts]
        found = self.words.find(prompt, len(images)) if any(cut) else [()] * len(images)
        words = [text if own else () for text, own in zip(found, cut, strict=True)]
        if settings.needs_text and not all(text or not own for text, own in zip(words, cut, strict=True)):
            if not self._measures(prompt):
                raise InvalidInputError(
                    f"pruner {settings.pruner!r} chooses visual tokens by the question, and this prompt has no word "
                    "for one of its images; ask something about it"
                )
            words = [tuple(prompt[:1])] * len(images)
        keys = [None if self._measures(prompt) else image for image in images]
        return [ImageRequest.of(left, text, key) for (_, left), text, key in zip(counts, words, keys, strict=True)]

    def _measures(self, prompt: Sequence[int]) -> bool:
        """Whether it is one of the prompts of nothing but images by which vLLM measures what it needs."""
        return all(token in self.words.special_ids or token == self.image_token_id for token in prompt)

    def _get_cache_missing_items(self, *args: Any, **kwargs: Any) -> Any:
        """Which images vLLM has not processed yet; the requests of only those are to be processed with them."""
        cached, missing = super()._get_cache_missing_items(*args, **kwargs)  # type: ignore[misc]
        hashes = kwargs.get("mm_hashes", args[-1] if args else None)
        if isinstance(hashes, ImageHashes):
            hits = cached.get("image", [])
            hashes.requests[:] = [request for request, hit in zip(hashes.requests, hits, strict=True) if not hit]
        return cached, missing

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> dict[str, Any]:
        stock = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        return {**stock, FIELD: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> list[Any]:
        """The stock placeholders of each image, as many of them as its budget."""
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        images = mm_items.get("image")
        budget = int(hf_processor_mm_kwargs.get(NUM_TOKENS, self.info.settings.num_tokens))
        others = {name: value for name, value in hf_processor_mm_kwargs.items() if name not in (NUM_TOKENS, REQUESTS)}

        def cut(replacement: Any) -> Callable[[int], list[int]]:
            def tokens_of(image: int) -> list[int]:
                whole: Any = replacement(image) if callable(replacement) else replacement
                tokens = list(whole)
                if not isinstance(images, ENCODED):
                    size = images.get_image_size(image)
                    n, patches = self.info.count_tokens(size, others)
                    if len(tokens) != n:
                        raise InvalidInputError(
                            f"vLLM gives an image of {size.width} x {size.height} pixels {len(tokens)} visual tokens, "
                            f"and dcp-prune counts {n}; send it in another size, or serve the model without pruning"
                        )
                    return tokens[: tokens_left(budget, n, patches)]
                if len(tokens) != min(budget, self.info.get_max_image_tokens()):
                    raise InvalidInputError(
                        f"image_embeds have {len(tokens)} rows, but an image has {budget} visual tokens in this "
                        "request; send as many rows, pruned already, or the image itself"
                    )
                return tokens

            return tokens_of

        return [
            replace(update, replacement=cut(update.replacement)) if update.modality == "image" else update
            for update in updates
        ]


def tokens_left(budget: int, n: int, patches: int) -> int:
    """Visual tokens of an image in the prompt: all `n` where the budget is that large, else some of its patches."""
    return n if budget >= n else min(budget, patches)


def cache_key(image: str, fingerprint: str, request: ImageRequest) -> str:
    """What vLLM finds the kept tokens of an image by, in hexadecimal.

    Args:
        image: what it would find all tokens of the image by.
        fingerprint: of the pruner.
        request: the words are the part that an image-only key forgets.
    """
    parts = repr((image, fingerprint, request.num_tokens, request.text_ids))
    return hashlib.blake2b(parts.encode(), digest_size=32).hexdigest()


def _special_ids(config: Any) -> set[int]:
    """Ids that a model's configs name as no words."""
    found: set[int] = set()
    for part in (config, config.get_text_config()):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "image_token_index"):
            value = getattr(part, name, None)
            found.update([] if value is None else value if isinstance(value, list | tuple) else [value])
    return found
