"""What a call costs, counted without weights and before anything runs: operations, and bytes of keys and values.

The architecture runs on tensors that have a shape and no content, and torch's own counter looks on. One multiply-add
counts as two operations. Operations are no time: see `latency`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedFakeTensorException
from torch.utils.flop_counter import FlopCounterMode

from dcp_prune.integrations.transformers import get_adapter
from dcp_prune.profiling.memory import kv_cache_bytes
from dcp_prune.tokens import EncoderReduction, EncoderTokens, Signal

_NO_CONTENT = (NotImplementedError, RuntimeError, UnsupportedFakeTensorException)
"""What is raised where a model asks for the content of a tensor that has none."""


@dataclass(frozen=True)
class Prefill:
    """What a language model needs for the prompts of one call.

    Attributes:
        flops: up to the logits behind the last token.
        cache_bytes: keys and values of all prompts.
    """

    flops: int
    cache_bytes: int


class Hollow:
    """A model whose tensors have shapes and no content.

    Args:
        kind: class of the model.
        config: of the model.
        dtype: of the weights.
    """

    def __init__(self, kind: Any, config: Any, dtype: torch.dtype = torch.float32) -> None:
        # The counter knows the products of eager attention; those of some fused kernels escape it.
        def build() -> Any:
            return kind._from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="eager").eval()

        with torch.device("meta"):
            self.model = build()
        self._build = build

    @property
    def weight_bytes(self) -> int:
        """Of all weights, each counted once."""
        return sum(tensor.nbytes for tensor in self.model.parameters())

    @torch.no_grad()
    def prefill(self, prompts: int, length: int) -> Prefill:
        """Counts the language model alone.

        Args:
            prompts: read at once.
            length: tokens of each, visual tokens included.
        """
        width = self.model.config.get_text_config(decoder=True).hidden_size
        inputs = torch.empty(prompts, length, width, dtype=self.model.dtype, device="meta")
        with FlopCounterMode(display=False) as counter:
            out = _language_model(self.model)(inputs_embeds=inputs, use_cache=True)
            self.model.lm_head(out.last_hidden_state[:, -1:])
        return Prefill(counter.get_total_flops(), kv_cache_bytes(out.past_key_values))

    @torch.no_grad()
    def encoder_flops(self, images: Mapping[str, Any], stages: Sequence[tuple[int, int]] = ()) -> int | None:
        """Operations of the encoder up to the layer whose features are read, and of the projector.

        Args:
            images: model inputs that describe them; of the pixels only the shape counts.
            stages: in-encoder reductions as (layer, kept tokens of a tile), ascending.

        Returns:
            None where this family looks into the pixels before it encodes them.
        """
        pixels = get_adapter(self.model).image_inputs[0]
        images = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in images.items()}
        cuts = tuple(_Cut(layer, kept) for layer, kept in stages)
        # Towers that plan by numbers they compute (windows, packed sequences) need real tensors beside the hollow ones,
        # which fake tensors allow; others look at what they have computed, which the meta device leaves undecided.
        for hollow in (self._on_meta, self._on_fakes):
            try:
                model, empty = hollow()
                given = {**images, pixels: _each(empty, images[pixels])}
                adapter = get_adapter(model)
                layouts = adapter.layouts(images)
                with FlopCounterMode(display=False) as counter:
                    adapter.encode(given, adapter.check_stages(cuts), frozenset(), layouts=layouts)
            except _NO_CONTENT:
                continue
            return counter.get_total_flops()
        return None

    def _on_meta(self) -> tuple[Any, Callable[[Tensor], Tensor]]:
        return self.model, lambda tensor: tensor.to("meta", self.model.dtype)

    def _on_fakes(self) -> tuple[Any, Callable[[Tensor], Tensor]]:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            model = self._build()
        return model, lambda tensor: mode.from_tensor(tensor.cpu().to(self.model.dtype))


@dataclass(frozen=True)
class _Cut:
    """A stage that keeps the first tokens and computes nothing."""

    layer: int
    num_tokens: int
    requires: ClassVar[frozenset[Signal]] = frozenset()

    def reduce(self, tokens: EncoderTokens) -> EncoderReduction:
        b, n, _ = tokens.features.shape
        kept = torch.arange(self.num_tokens).expand(b, -1)
        assignment = torch.arange(n).clamp(max=self.num_tokens - 1).expand(b, -1)
        device = tokens.features.device
        return EncoderReduction(tokens.features[:, : self.num_tokens], kept.to(device), assignment.to(device))


def _language_model(model: Any) -> Any:
    inner = model.model
    return inner.language_model if hasattr(inner, "language_model") else inner.text_model


def _each(change: Callable[[Tensor], Tensor], pixels: Any) -> Any:
    return change(pixels) if isinstance(pixels, Tensor) else [_each(change, each) for each in pixels]
