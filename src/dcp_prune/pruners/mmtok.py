"""MMTok (arXiv 2508.18264): what covers the question's words and the image at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dcp_prune.functional.clustering import max_coverage
from dcp_prune.functional.similarity import cosine_similarity
from dcp_prune.pruners.base import SelectionPruner
from dcp_prune.pruners.options import Positive, Weight
from dcp_prune.tokens import Signal, VisualTokens


@dataclass(frozen=True, kw_only=True)
class MMTokPruner(SelectionPruner):
    """Greedy maximum coverage of words and visual tokens by k visual tokens.

    Each word spreads a mass of 1 / (number of words) over the tokens, by a softmax of cosines in the language model's
    space. Each visual token spreads a mass of alpha / n, by a softmax of cosines before the projector. A set of tokens
    covers the largest share of each word and each token that one of its members got. Without words, only the coverage
    of the image counts.

    Attributes:
        alpha: weight of covering the image, against covering the question.
        text_temperature: temperature of the words' softmax.
        vision_temperature: temperature of the visual tokens' softmax.

    Raises:
        InvalidInputError: alpha is negative, or a temperature not above 0.
    """

    requires: ClassVar[frozenset[Signal]] = frozenset({Signal.ENCODER_FEATURES, Signal.TEXT})
    matrices: ClassVar[int] = 4

    alpha: Weight = 0.5
    text_temperature: Positive = 0.02
    vision_temperature: Positive = 0.2

    def select(self, tokens: VisualTokens, k: int) -> Int[Tensor, "b k"]:
        return self.select_among(tokens, k, tokens.mask)

    @torch.no_grad()
    def select_among(self, tokens: VisualTokens, k: int, candidates: Bool[Tensor, "b n"]) -> Int[Tensor, "b k"]:
        """`select` with only some tokens to choose from, of which every row needs k; all real ones are to be covered.

        The authors leave out patches on the border that makes a picture square, which no other method does.
        """
        encoded, text = self.read(tokens, Signal.ENCODER_FEATURES), self.read(tokens, Signal.TEXT)
        closed = torch.zeros_like(encoded[..., 0]).masked_fill_(~tokens.mask, -torch.inf).unsqueeze(1)
        words = torch.ones_like(text[..., 0]) if tokens.text_mask is None else tokens.text_mask.to(text.dtype)
        text = text.masked_fill(words.unsqueeze(-1) == 0, 0.0)
        of_words = cosine_similarity(text, tokens.features).div_(self.text_temperature)
        of_tokens = cosine_similarity(encoded).div_(self.vision_temperature)
        affinities = [each.add_(closed).softmax(dim=2) for each in (of_words, of_tokens)]
        real = tokens.mask.to(of_tokens.dtype)
        demands = [
            words / words.sum(dim=1, keepdim=True).clamp(min=1.0),
            self.alpha * real / real.sum(dim=1, keepdim=True),
        ]
        return max_coverage(affinities, demands, k, mask=candidates)
