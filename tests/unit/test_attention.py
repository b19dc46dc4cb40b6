"""Saliency from queries and keys: equal to what a full attention map would give, without building one."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dcp_prune.functional.attention import cls_attention_row, folded_cls_attention_row, received_attention

B, N, H, C, V = 2, 30, 4, 8, 20


@pytest.fixture
def layer():
    """Hidden states of [CLS] + n tokens, a key projection with bias, and the queries and keys of all tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, 1 + N, V, generator=generator)
    weight, bias = torch.randn(H * C, V, generator=generator), torch.randn(H * C, generator=generator) * 5.0
    keys = (hidden @ weight.T + bias).unflatten(-1, (H, C))
    queries = torch.randn(B, 1 + N, H, C, generator=generator)
    return hidden, weight, queries, keys


def full_attention(queries, keys):
    logits = torch.einsum("bqhc,bshc->bhqs", queries.double(), keys.double()) * C**-0.5
    return logits.softmax(dim=-1).mean(dim=1)


def test_the_cls_row_is_the_row_of_full_attention(layer):
    _, _, queries, keys = layer
    row = cls_attention_row(queries[:, 0], keys)
    torch.testing.assert_close(row.double(), full_attention(queries, keys)[:, 0, 1:], rtol=1e-4, atol=1e-6)
    assert (row.sum(dim=1) < 1.0).all()


def test_the_folded_row_needs_no_keys_and_no_key_bias(layer):
    hidden, weight, queries, keys = layer
    folded = folded_cls_attention_row(hidden, queries[:, 0], weight)
    torch.testing.assert_close(folded, cls_attention_row(queries[:, 0], keys), rtol=1e-3, atol=1e-6)


def test_registers_share_in_the_softmax_and_are_not_returned(layer):
    _, _, queries, keys = layer
    row = cls_attention_row(queries[:, 0], keys, num_prefix_tokens=5)
    torch.testing.assert_close(row, cls_attention_row(queries[:, 0], keys)[:, 4:])
    assert row.shape == (B, N - 4)


def test_the_scale_of_the_logits_can_be_given(layer):
    hidden, weight, queries, keys = layer
    row = cls_attention_row(queries[:, 0], keys, scale=0.01)
    assert row.std() < cls_attention_row(queries[:, 0], keys).std()
    torch.testing.assert_close(
        folded_cls_attention_row(hidden, queries[:, 0], weight, scale=0.01), row, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_received_attention_is_the_column_mean_of_full_attention(layer, block_size):
    _, _, queries, keys = layer
    received = received_attention(queries, keys, block_size=block_size)
    expected = full_attention(queries, keys).mean(dim=1)
    torch.testing.assert_close(received.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(received.sum(dim=1), torch.ones(B))


def test_half_precision_inputs_are_summed_in_float32(layer):
    hidden, weight, queries, keys = layer
    q, k = queries.bfloat16(), keys.bfloat16()
    row = cls_attention_row(q[:, 0], k)
    assert row.dtype == torch.float32
    torch.testing.assert_close(row, cls_attention_row(q[:, 0].float(), k.float()))
    folded = folded_cls_attention_row(hidden.bfloat16(), q[:, 0], weight.bfloat16())
    assert folded.dtype == received_attention(q, k).dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_no_attention_map_is_ever_built(layer):
    hidden, weight, queries, keys = layer
    a_map = B * H * N * N
    with LargestTensor() as largest:
        cls_attention_row(queries[:, 0], keys)
        folded_cls_attention_row(hidden, queries[:, 0], weight)
        received_attention(queries, keys, block_size=4)
    assert 0 < largest.numel < a_map / 2
    with LargestTensor() as largest:
        full_attention(queries, keys)
    assert largest.numel >= a_map, "the check itself must notice a map"
