"""The arithmetic of a LLaVA prefill, counted from the configuration alone.

One multiply-add counts as two operations. Matrix products, the patch convolution and the two products of attention are
counted; norms, activations and softmax are not, which is what `torch.utils.flop_counter` counts as well. Attention is
counted in full, without the half that a causal kernel may skip. Operations are no time: see `latency`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import LlavaConfig


@dataclass(frozen=True)
class PrefillFlops:
    """Operations of one image's prefill, by part of the model."""

    vision: int
    projector: int
    language: int

    @property
    def total(self) -> int:
        return self.vision + self.projector + self.language


def llava_prefill_flops(
    config: LlavaConfig,
    *,
    text_tokens: int,
    visual_tokens: int,
    stages: Sequence[tuple[int, int]] = (),
    encoder_layers: int | None = None,
) -> PrefillFlops:
    """Operations up to the first new token of one prompt with one image; the cost of selecting is left out.

    Args:
        config: a CLIP-like vision tower with [CLS] and a Llama-like language model.
        text_tokens: tokens of the prompt that are no visual tokens.
        visual_tokens: visual tokens that the language model reads.
        stages: in-encoder reductions as (layer, kept tokens), ascending; a stage acts on the output of its layer.
        encoder_layers: layers of the encoder that run; default: all of them, also those behind the feature layer.
    """
    # transformers types its sub-configurations too loosely to name their attributes.
    vision, text = cast(Any, config.vision_config), cast(Any, config.text_config)
    patches: int = (vision.image_size // vision.patch_size) ** 2
    reductions = dict(stages)

    width = vision.hidden_size
    encoder = 2 * patches * width * vision.num_channels * vision.patch_size**2
    kept = patches
    for layer in range(vision.num_hidden_layers if encoder_layers is None else encoder_layers):
        n = kept + 1
        encoder += 2 * n * (4 * width * width + 2 * width * vision.intermediate_size) + 4 * n * n * width
        kept = reductions.get(layer, kept)

    head = text.head_dim or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    weights = 2 * text.hidden_size * (queries + keys) + 3 * text.hidden_size * text.intermediate_size
    n = text_tokens + visual_tokens
    # Only the last position asks for the next token.
    decoder = text.num_hidden_layers * (2 * n * weights + 4 * n * n * queries)
    decoder += 2 * text.hidden_size * text.vocab_size

    # The projector reads what the encoder hands over, before the last selection.
    projector = 2 * kept * text.hidden_size * (width + text.hidden_size)
    return PrefillFlops(vision=encoder, projector=projector, language=decoder)
