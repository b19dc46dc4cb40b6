"""What the question says about each visual token, and whether it says anything at all. All of it is ours."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dcp_prune.functional.similarity import cosine_similarity

_TINY = torch.finfo(torch.float32).tiny


def word_similarity(
    features: Float[Tensor, "b n d"],
    text: Float[Tensor, "b t d"],
    *,
    mask: Bool[Tensor, "b n"] | None = None,
    text_mask: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b n t"]:
    """Cosine of each visual token to each word of the question, both in the language model's space; 0 in padding."""
    cosines = cosine_similarity(features, text)
    if mask is not None:
        cosines = cosines.masked_fill(~mask.unsqueeze(-1), 0.0)
    if text_mask is not None:
        cosines = cosines.masked_fill(~text_mask.unsqueeze(1), 0.0)
    return cosines


def word_confidence(
    cosines: Float[Tensor, "b n t"],
    *,
    mask: Bool[Tensor, "b n"] | None = None,
    text_mask: Bool[Tensor, "b t"] | None = None,
    margin: float = 0.0,
    span: float = 4.0,
) -> Float[Tensor, "b t"]:
    """The confidence that each word points at something in the image, in [0, 1]: how far its best token stands out.

    The z-score of the word's best token among all tokens, less sqrt(2 ln n), which is about the best that n tokens
    reach by chance (3.6 of 576), less `margin`, over `span`, clipped. A flat or noisy map gives 0.

    Args:
        cosines: from `word_similarity`. `b n t`.
        mask: False marks padded visual tokens. `b n`.
        text_mask: False marks padded words, whose confidence is 0. `b t`.
        margin: standard deviations beyond chance that a word needs; a negative margin trusts words earlier.
        span: standard deviations from no confidence to full confidence.
    """
    if mask is None:
        mask = torch.ones(cosines.shape[:2], dtype=torch.bool, device=cosines.device)
    real = mask.unsqueeze(-1)
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    centre = cosines.masked_fill(~real, 0.0).sum(dim=1) / count
    offset = (cosines - centre.unsqueeze(1)).masked_fill(~real, 0.0)
    spread = (offset.square().sum(dim=1) / count).sqrt()
    best = cosines.masked_fill(~real, -torch.inf).amax(dim=1)
    # A spread at rounding level is a flat map, not a sharp one.
    z = torch.where(spread > 1e-6, (best - centre) / spread.clamp(min=1e-6), 0.0)
    chance = (2.0 * count.to(z.dtype).log()).sqrt()
    confidence = ((z - chance - margin) / span).clamp(0.0, 1.0)
    return confidence if text_mask is None else confidence.masked_fill(~text_mask, 0.0)


def token_relevance(cosines: Float[Tensor, "b n t"], word_weights: Float[Tensor, "b t"]) -> Float[Tensor, "b n"]:
    """How much the question is about each token, in [0, 1].

    relevance_i = max over words t of word_weights_t * max(0, cosines_it) / (the word's best cosine). `b n`.
    """
    positive = cosines.clamp(min=0.0)
    peak = positive.amax(dim=1, keepdim=True).clamp(min=_TINY)
    return (positive / peak * word_weights.unsqueeze(1)).amax(dim=2)


def question_relevance(
    features: Float[Tensor, "b n d"],
    text: Float[Tensor, "b t d"],
    *,
    mask: Bool[Tensor, "b n"] | None = None,
    text_mask: Bool[Tensor, "b t"] | None = None,
    power: float = 3.0,
    margin: float = -1.5,
    span: float = 4.0,
) -> Float[Tensor, "b n"]:
    """How much each token matters to the question, in [0, 1]: relevance ** power, words gated by their confidence.

    What `DCPPruner` weighs tokens with by default. Arguments as in `word_confidence`. `b n`.
    """
    cosines = word_similarity(features, text, mask=mask, text_mask=text_mask)
    words = word_confidence(cosines, mask=mask, text_mask=text_mask, margin=margin, span=span)
    return token_relevance(cosines, words) ** power
