"""The question in the terms of the language model's first attention layer, which looks words up among visual tokens."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dcp_prune.errors import UnsupportedModelError


@torch.no_grad()
def lookup_vectors(model: Any, words: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
    """For each word the vector that its query is in the space of visual tokens.

    The first layer matches a word w with a visual token x by the sum over heads of (W_q n(w)) . (W_k n(x)), where n is
    the layer's RMS norm, a scale g per channel over the token's own size. That is x . (g * W_k^T W_q n(w)) over the
    size of x, so the cosine of x to the vector in brackets orders visual tokens as this attention does. Rotary
    positions and biases of keys are left out. It costs two products per word and nothing per visual token. (Ours.)

    Args:
        model: a model with an adapter.
        words: word embeddings.

    Raises:
        UnsupportedModelError: the first layer has no such form: fused projections, or norms of queries and keys.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    layer = None if layers is None else layers[0]
    attention, norm = getattr(layer, "self_attn", None), getattr(layer, "input_layernorm", None)
    query, key = getattr(attention, "q_proj", None), getattr(attention, "k_proj", None)
    if attention is None or norm is None or query is None or key is None or hasattr(attention, "q_norm"):
        raise UnsupportedModelError(
            f"text_space='lookup' reads the first attention layer, and that of {type(model).__name__} has no plain "
            "query and key projections; use text_space='embeddings'"
        )
    scale = norm(torch.ones_like(words[:1, :1]))
    width = key.weight.shape[0]
    asked = query(norm(words))
    # Query heads that share a key head add up: their inner products with that key do.
    head = attention.head_dim
    asked = asked.unflatten(-1, (width // head, -1, head)).sum(dim=-2).flatten(-2)
    return (asked @ key.weight.to(asked.dtype)) * scale
