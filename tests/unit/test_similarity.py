"""Cosines and inner products, however they are computed."""

from __future__ import annotations

import pytest
import torch

from dcp_prune.functional import similarity
from dcp_prune.functional.similarity import cosine_similarity, gram
from dcp_prune.pruners.cdpruner import CDPruner
from dcp_prune.tokens import VisualTokens


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 21])
@pytest.mark.parametrize("width", [similarity._WORTH_STRIPS - 1, similarity._WORTH_STRIPS])
def test_inner_products_in_strips_are_those_of_the_whole(n, width):
    vectors = draw(2, n, width).double()
    torch.testing.assert_close(gram(vectors), vectors @ vectors.mT)


def test_gradients_flow_through_inner_products_in_strips():
    vectors = draw(1, 6, similarity._WORTH_STRIPS).requires_grad_()
    weights = draw(1, 6, 6, seed=1)
    (gram(vectors) * weights).sum().backward()
    torch.testing.assert_close(vectors.grad, ((weights + weights.mT) @ vectors).detach(), rtol=1e-4, atol=1e-3)


def test_cosines_between_two_sets_and_within_one_agree_and_a_zero_vector_has_none():
    tokens = draw(2, 7, 9)
    tokens[1, 3] = 0.0
    within, between = cosine_similarity(tokens), cosine_similarity(tokens, tokens)
    torch.testing.assert_close(within, between)
    assert not between[1, 3].any()
    assert not within[1, :, 3].any()
    expected = torch.cosine_similarity(tokens[0].unsqueeze(1), tokens[0].unsqueeze(0), dim=-1)
    torch.testing.assert_close(between[0], expected)


def test_cdpruner_with_one_extent_for_the_batch_sees_the_whole_batch_on_a_cpu_too():
    tokens = VisualTokens.from_features(
        draw(2, 16, 8), clip_similarity=draw(2, 16, seed=1) * torch.tensor([[1.0], [9.0]])
    )
    pruner = CDPruner(num_tokens=4, relevance_extent="batch")
    expected = pruner.prune(tokens, 4).kept
    assert not torch.equal(expected, CDPruner(num_tokens=4).prune(tokens, 4).kept), "the extents must differ here"
    assert torch.equal(pruner(tokens).indices, expected)
