"""SCoRe: its picks against the definition, written as a loop."""

from __future__ import annotations

import pytest
import torch

from dcp_prune import InvalidInputError, VisualTokens, make_pruner
from dcp_prune.functional.similarity import cosine_similarity
from dcp_prune.pruners.score import SCoRePruner


def make_tokens(n: int = 30, d: int = 6) -> VisualTokens:
    generator = torch.Generator().manual_seed(3)
    return VisualTokens.from_features(
        torch.randn(1, n, d, generator=generator),
        encoder_features=torch.randn(1, n, d, generator=generator),
        cls_attention=torch.randn(1, n, generator=generator).softmax(dim=1),
    )


@pytest.mark.parametrize("alpha", [0.0, 0.8, 2.0])
def test_each_pick_is_the_farthest_one_times_its_attention_and_the_first_is_the_most_attended(alpha):
    tokens = make_tokens()
    assert tokens.encoder is not None
    assert tokens.encoder.cls_attention is not None
    distance = 1.0 - cosine_similarity(tokens.encoder.features)[0]
    salience = tokens.encoder.cls_attention[0] ** alpha
    picks = [int(salience.argmax())]
    while len(picks) < 9:
        worth = salience * distance[:, picks].amin(dim=1)
        worth[picks] = -1.0
        picks.append(int(worth.argmax()))
    assert SCoRePruner(num_tokens=9, alpha=alpha).select(tokens, 9)[0].tolist() == picks
    assert make_pruner("score", num_tokens=9, alpha=alpha)(tokens).indices[0].tolist() == sorted(picks)


def test_a_negative_exponent_is_refused():
    with pytest.raises(InvalidInputError, match="SCoRePruner: alpha must be a number of at least 0, got -1"):
        SCoRePruner(num_tokens=4, alpha=-1)
