"""The context-to-anchor graph: its weights, its mass, and what recovery does to anchors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_prune.functional.graph import complement, context_to_anchor_graph, propagate
from dcp_prune.functional.similarity import cosine_similarity, gather_tokens

quick = settings(max_examples=30, deadline=None)


def scene(seed: int, b: int = 2, side: int = 5, v: int = 6, m: int = 7):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(b, side * side, v, generator=generator)
    order = torch.arange(side * side)
    positions = torch.stack((order // side, order % side), dim=-1).float().expand(b, -1, -1)
    anchors = torch.rand(b, side * side, generator=generator).argsort(dim=1)[:, :m].sort(dim=1).values
    return features, positions, anchors


def test_contexts_are_all_tokens_but_the_anchors():
    assert complement(torch.tensor([[0, 3], [1, 2]]), 5).tolist() == [[1, 2, 4], [0, 3, 4]]


@quick
@given(seed=st.integers(0, 2**31 - 1), m=st.integers(1, 25), neighbours=st.integers(1, 9))
def test_each_context_hands_out_one_unit_of_mass_to_distinct_anchors(seed, m, neighbours):
    features, positions, anchors = scene(seed, m=m)
    graph = context_to_anchor_graph(features, positions, anchors, neighbours=neighbours)
    assert graph.weights.shape == (2, 25 - m, min(neighbours, m))
    torch.testing.assert_close(graph.weights.sum(dim=2), torch.ones(2, 25 - m))
    assert all(len(set(row)) == len(row) for image in graph.slots.tolist() for row in image)
    assert (graph.weights.diff(dim=2) <= 0).all(), "strongest first"


def test_weights_follow_the_formula():
    features, positions, anchors = scene(0)
    graph = context_to_anchor_graph(features, positions, anchors, neighbours=7, temperature=0.5, sigma=2.0)
    context, anchor = graph.contexts[1, 4], anchors[1, 3]
    difference = positions[1, context] - positions[1, anchor]
    cosine = cosine_similarity(features)[1, context, anchor]
    expected = (cosine / 0.5 - difference.square().sum() / 8.0).exp()
    row = dict(zip(graph.slots[1, 4].tolist(), graph.weights[1, 4].tolist(), strict=True))
    total = sum(
        float(
            (
                cosine_similarity(features)[1, context, anchors[1, slot]] / 0.5
                - (positions[1, context] - positions[1, anchors[1, slot]]).square().sum() / 8.0
            ).exp()
        )
        for slot in range(7)
    )
    assert row[3] == pytest.approx(float(expected) / total, rel=1e-4)


def test_a_small_sigma_ties_contexts_to_their_nearest_anchor_and_none_ignores_space():
    features, positions, anchors = scene(1)
    near = context_to_anchor_graph(features, positions, anchors, neighbours=1, sigma=0.05)
    offset = gather_tokens(positions, near.contexts).unsqueeze(2) - gather_tokens(positions, anchors).unsqueeze(1)
    chosen = offset.norm(dim=-1).gather(2, near.slots).squeeze(2)
    torch.testing.assert_close(chosen, offset.norm(dim=-1).amin(dim=2))
    alike = context_to_anchor_graph(features, positions, anchors, neighbours=1, sigma=None)
    moved = context_to_anchor_graph(features, positions.flip(1), anchors, neighbours=1, sigma=None)
    assert torch.equal(alike.slots, moved.slots)


def test_assignment_sends_anchors_to_themselves_and_contexts_to_their_strongest_anchor():
    features, positions, anchors = scene(2)
    graph = context_to_anchor_graph(features, positions, anchors)
    assignment = graph.assignment()
    assert assignment.gather(1, anchors).tolist() == [[*range(7)]] * 2
    assert torch.equal(assignment.gather(1, graph.contexts), graph.slots[..., 0])


def test_recovery_of_strength_zero_is_bit_exact():
    features, positions, anchors = scene(3)
    graph = context_to_anchor_graph(features, positions, anchors)
    assert torch.equal(propagate(features, graph, strength=0.0), gather_tokens(features, anchors))


def test_recovery_equals_the_formula_written_as_a_loop():
    features, positions, anchors = scene(4)
    importance = torch.rand(2, 25, generator=torch.Generator().manual_seed(5))
    graph = context_to_anchor_graph(features, positions, anchors, neighbours=3)
    new = propagate(features, graph, strength=0.7, importance=importance, rescale=False)
    for image in range(2):
        g = importance[image] / importance[image].mean()
        for slot in range(7):
            total, mass = features[image, anchors[image, slot]].clone(), 1.0
            for c, context in enumerate(graph.contexts[image].tolist()):
                for target, weight in zip(
                    graph.slots[image, c].tolist(), graph.weights[image, c].tolist(), strict=True
                ):
                    if target == slot:
                        total += 0.7 * weight * g[context] * features[image, context]
                        mass += 0.7 * weight * float(g[context])
            torch.testing.assert_close(new[image, slot], total / mass, rtol=1e-4, atol=1e-5)


@quick
@given(seed=st.integers(0, 2**31 - 1), strength=st.floats(0.01, 10.0))
def test_recovery_conserves_a_feature_that_all_tokens_share(seed, strength):
    features, positions, anchors = scene(seed)
    features[..., 0] = 2.5
    graph = context_to_anchor_graph(features, positions, anchors)
    new = propagate(features, graph, strength=strength, rescale=False)
    torch.testing.assert_close(new[..., 0], torch.full((2, 7), 2.5))


def test_rescaling_keeps_the_anchors_norms():
    features, positions, anchors = scene(6)
    graph = context_to_anchor_graph(features, positions, anchors)
    new, old = propagate(features, graph, strength=1.0), gather_tokens(features, anchors)
    torch.testing.assert_close(new.norm(dim=-1), old.norm(dim=-1))
    assert not torch.allclose(new, old, atol=1e-2)


def test_recovery_keeps_the_dtype_and_passes_gradients_to_contexts():
    features, positions, anchors = scene(7)
    features = features.bfloat16().requires_grad_()
    graph = context_to_anchor_graph(features, positions, anchors)
    new = propagate(features, graph, strength=0.5)
    assert new.dtype == torch.bfloat16
    new.float().square().sum().backward()
    assert features.grad is not None
    assert gather_tokens(features.grad, graph.contexts).abs().sum() > 0


def test_with_every_token_an_anchor_nothing_is_left_to_recover():
    features, positions, _ = scene(8)
    graph = context_to_anchor_graph(features, positions, torch.arange(25).expand(2, 25))
    torch.testing.assert_close(propagate(features, graph, strength=1.0), features)
