"""The context-to-anchor graph: what the removed tokens pass on to the kept ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dcp_prune.functional.similarity import cosine_similarity, gather_tokens


@dataclass(frozen=True)
class ContextGraph:
    """A bipartite graph from c context tokens to m anchors, each context tied to its r strongest anchors.

    Attributes:
        anchors: positions of the anchors, ascending. `b m`.
        contexts: positions of all other tokens, ascending. `b c`, with c = n - m.
        slots: the anchors that get the mass of each context, as slots in 0..m-1, strongest first. `b c r`.
        weights: the share that each of them gets; they sum to 1 over r. `b c r`.
    """

    anchors: Int[Tensor, "b m"]
    contexts: Int[Tensor, "b c"]
    slots: Int[Tensor, "b c r"]
    weights: Float[Tensor, "b c r"]

    def assignment(self) -> Int[Tensor, "b n"]:
        """For each of the n tokens the slot of its strongest anchor; an anchor's own slot for itself. `b n`."""
        b, m = self.anchors.shape
        own = torch.arange(m, device=self.anchors.device).expand(b, m)
        # With NaN features an anchor is chosen twice; what is then nobody's must still be a slot, not stale memory.
        absorbed = own.new_zeros(b, m + self.contexts.shape[1]).scatter(1, self.anchors, own)
        return absorbed.scatter(1, self.contexts, self.slots[..., 0])


def complement(kept: Int[Tensor, "b m"], n: int) -> Int[Tensor, "b c"]:
    """Ascending positions among n of the tokens that are not in `kept`. `b c`, with c = n - m."""
    b, m = kept.shape
    taken = torch.zeros(b, n, dtype=torch.uint8, device=kept.device).scatter(1, kept, 1)
    return taken.argsort(dim=1, stable=True)[:, : n - m]


@torch.no_grad()
def context_to_anchor_graph(
    features: Float[Tensor, "b n v"],
    positions: Float[Tensor, "b n p"],
    anchors: Int[Tensor, "b m"],
    *,
    neighbours: int = 4,
    temperature: float = 0.1,
    sigma: float | None = 4.0,
) -> ContextGraph:
    """Ties every context token to the anchors that are similar and near.

    w_ca ~ exp(cos(x_c, x_a) / temperature - |p_c - p_a|^2 / (2 sigma^2)), cut to each context's strongest anchors and
    normalised over them. The largest tensor is c x m, without a heads axis. (Our reading of the paper's "semantic and
    spatial similarity".)

    Args:
        features: hidden states of all tokens. `b n v`.
        positions: (row, col), or (row, col, time), in patch units. `b n p`.
        anchors: positions of the anchors among the n, ascending. `b m`.
        neighbours: anchors per context, r; at most m are used.
        temperature: of the cosines; smaller concentrates the mass on the most similar anchor.
        sigma: reach of the spatial term in patches; None leaves it out.
    """
    contexts = complement(anchors, features.shape[1])
    logits = cosine_similarity(gather_tokens(features, contexts), gather_tokens(features, anchors)) / temperature
    if sigma is not None:
        where = positions.float()
        offset = gather_tokens(where, contexts).unsqueeze(2) - gather_tokens(where, anchors).unsqueeze(1)
        logits = logits - offset.square().sum(dim=-1) / (2.0 * sigma**2)
    strongest = logits.topk(min(neighbours, anchors.shape[1]), dim=2)
    return ContextGraph(anchors, contexts, strongest.indices, strongest.values.softmax(dim=2))


def propagate(
    features: Float[Tensor, "b n v"],
    graph: ContextGraph,
    *,
    strength: float,
    importance: Float[Tensor, "b n"] | None = None,
    rescale: bool = True,
) -> Float[Tensor, "b m v"]:
    """The anchors after their contexts were added to them along the graph ("recover").

    x_a <- (x_a + strength * sum_c w_ca g_c x_c) / (1 + strength * sum_c w_ca g_c), then optionally back to x_a's norm.
    Sums in float32, returned in the features' dtype. (Ours.)

    Args:
        features: hidden states of all tokens. `b n v`.
        graph: from `context_to_anchor_graph`.
        strength: lambda; 0 returns the anchors unchanged, bit for bit.
        importance: saliency; g is a context's saliency relative to the mean of all n tokens. None means g = 1. `b n`.
        rescale: keep each anchor's norm.
    """
    anchors = gather_tokens(features, graph.anchors)
    if strength == 0.0:
        return anchors
    b, c, _ = graph.slots.shape
    # One dense c x m matrix and a product: deterministic on every device, unlike atomic scatter-adds of features.
    mass = graph.weights.new_zeros(b, c, anchors.shape[1]).scatter(2, graph.slots, graph.weights)
    if importance is not None:
        relative = importance.float() / importance.float().mean(dim=1, keepdim=True).clamp(min=1e-12)
        mass = mass * relative.gather(1, graph.contexts).unsqueeze(-1)
    mass = strength * mass.mT  # b m c
    old = anchors.float()
    new = (old + mass @ gather_tokens(features, graph.contexts).float()) / (1.0 + mass.sum(dim=2, keepdim=True))
    if rescale:
        new = new * (old.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    return new.to(features.dtype)
