"""The question in the terms of the language model's first attention layer."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from dcp_prune.errors import InvalidInputError, UnsupportedModelError
from dcp_prune.integrations.transformers.question import Question
from dcp_prune.models import lookup_vectors


class Decoder(nn.Module):
    """A model whose decoder is this."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def get_decoder(self) -> Any:
        return self.decoder


def small(kind: Any, config: Any, **options: Any) -> Decoder:
    torch.manual_seed(0)
    made = config(
        vocab_size=11,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=6,
        **options,
    )
    decoder = kind(made)
    nn.init.uniform_(decoder.layers[0].input_layernorm.weight, 0.5, 1.5)
    return Decoder(decoder)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_cosines_to_the_vectors_order_tokens_as_queries_and_keys_of_the_first_layer_do(key_heads: int) -> None:
    model = small(LlamaModel, LlamaConfig, num_key_value_heads=key_heads)
    layer = model.get_decoder().layers[0]
    words, visual = torch.randn(2, 3, 24), torch.randn(2, 50, 24)
    query = layer.self_attn.q_proj(layer.input_layernorm(words)).unflatten(-1, (4, 6))
    key = layer.self_attn.k_proj(layer.input_layernorm(visual)).unflatten(-1, (key_heads, 6))
    scores = torch.einsum("bthc,bnhc->bnt", query, key.repeat_interleave(4 // key_heads, dim=2))
    cosines = cosine_similarity(visual.unsqueeze(2), lookup_vectors(model, words).unsqueeze(1), dim=-1)
    for own, looked in zip(scores.movedim(2, 1).flatten(0, 1), cosines.movedim(2, 1).flatten(0, 1), strict=True):
        assert torch.corrcoef(torch.stack((own, looked)))[0, 1] > 0.9999


def test_a_first_layer_that_norms_its_queries_is_refused() -> None:
    model = small(Qwen3Model, Qwen3Config, num_key_value_heads=2)
    with pytest.raises(UnsupportedModelError, match="use text_space='embeddings'"):
        lookup_vectors(model, torch.randn(1, 1, 24))


def test_an_unknown_space_is_refused_by_name() -> None:
    with pytest.raises(InvalidInputError, match="text_space must be one of embeddings, lookup"):
        Question(space="somewhere")  # type: ignore[arg-type]
