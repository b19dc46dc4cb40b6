"""How much attention a visual token gets, from queries and keys alone: no n x n map, so fast attention kernels stay on.

Everything is computed in float32, whatever the dtype of the inputs, since the ranking of 576 small numbers needs it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def cls_attention_row(
    query: Float[Tensor, "b h c"],
    keys: Float[Tensor, "b s h c"],
    *,
    scale: float | None = None,
    num_prefix_tokens: int = 1,
    mask: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b n"]:
    """Attention that [CLS] pays to each visual token, averaged over heads: one row of softmax(q K^T), O(n v).

    Args:
        query: of [CLS]. `b h c`.
        keys: of all s = num_prefix_tokens + n tokens, [CLS] (and registers) first. `b s h c`.
        scale: of the logits; default 1 / sqrt(c).
        num_prefix_tokens: leading keys that share in the softmax but are not returned.
        mask: False marks padding, which gets 0. `b n`.

    Returns:
        The row without its prefix, not renormalised: it sums to less than 1, as in full attention. `b n`.
    """
    logits = torch.einsum("bhc,bshc->bhs", query.float(), keys.float())
    return _mean_row(logits, query.shape[-1] ** -0.5 if scale is None else scale, num_prefix_tokens, mask)


def folded_cls_attention_row(
    hidden: Float[Tensor, "b s v"],
    query: Float[Tensor, "b h c"],
    key_weight: Float[Tensor, "w v"],
    *,
    scale: float | None = None,
    num_prefix_tokens: int = 1,
    mask: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b n"]:
    """`cls_attention_row` without computing any key: K q = x (W_k^T q), h vectors instead of s x v keys.

    The key bias needs no place here: q . b_k is the same for every key of a head, and softmax does not see constants.

    Args:
        hidden: input of the key projection (after the layer norm). `b s v`.
        query: of [CLS]. `b h c`.
        key_weight: weight of the key projection, w = h * c rows. `w v`.
        scale: of the logits; default 1 / sqrt(c).
        num_prefix_tokens: leading tokens that share in the softmax but are not returned.
        mask: False marks padding, which gets 0. `b n`.
    """
    _, heads, c = query.shape
    folded = torch.einsum("bhc,hcv->bhv", query.float(), key_weight.float().unflatten(0, (heads, c)))
    logits = folded @ hidden.float().mT
    return _mean_row(logits, c**-0.5 if scale is None else scale, num_prefix_tokens, mask)


def received_attention(
    queries: Float[Tensor, "b n h c"],
    keys: Float[Tensor, "b n h c"],
    *,
    scale: float | None = None,
    mask: Bool[Tensor, "b n"] | None = None,
    block_size: int = 64,
) -> Float[Tensor, "b n"]:
    """Attention that each token receives, averaged over heads and all queries: saliency for encoders without [CLS].

    Works through the queries in blocks, so that at most `b h block_size n` logits exist at once. Padding, where `mask`
    is False, neither attends nor is attended to.
    """
    b, n, _, c = queries.shape
    total = torch.zeros(b, n, dtype=torch.float32, device=queries.device)
    keys = keys.float()
    for start in range(0, n, block_size):
        block = queries[:, start : start + block_size].float()
        logits = torch.einsum("bqhc,bnhc->bhqn", block, keys) * (c**-0.5 if scale is None else scale)
        if mask is None:
            total = total + logits.softmax(dim=-1).mean(dim=1).sum(dim=1)
            continue
        rows = logits.masked_fill_(~mask[:, None, None], -torch.inf).softmax(dim=-1).mean(dim=1)
        total = total + rows.masked_fill(~mask[:, start : start + block_size].unsqueeze(2), 0.0).sum(dim=1)
    return total / (n if mask is None else mask.sum(dim=1, keepdim=True).clamp(min=1))


def _mean_row(
    logits: Float[Tensor, "b h s"], scale: float, num_prefix_tokens: int, mask: Bool[Tensor, "b n"] | None
) -> Float[Tensor, "b n"]:
    if mask is not None:
        logits[..., num_prefix_tokens:].masked_fill_(~mask.unsqueeze(1), -torch.inf)
    return (logits * scale).softmax(dim=-1).mean(dim=1)[:, num_prefix_tokens:]
