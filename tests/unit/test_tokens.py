"""What `VisualTokens` may be made of: first mistakes get one sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dcp_prune import InvalidInputError, UniformPruner, VisualTokens


def make(**changed: Any) -> VisualTokens:
    given: dict[str, Any] = {"features": torch.ones(2, 9, 4), "text": torch.ones(2, 3, 4), **changed}
    return VisualTokens.from_features(given.pop("features"), **given)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"features": torch.ones(9, 4)}, r"features must be .* \(images, tokens, width\), got one of shape \(9, 4\)"),
        ({"features": torch.ones(2, 9, 4, dtype=torch.long)}, "floating-point tensor .* and torch.int64"),
        ({"features": torch.ones(2, 9, 4).numpy()}, "got ndarray; torch.from_numpy makes a tensor of it"),
        ({"features": [[1.0]]}, "got list"),
        ({"mask": torch.ones(2, 9)}, r"mask must be of dtype bool, .* got torch.float32; write mask.bool\(\)"),
        (
            {"mask": torch.ones(2, 8, dtype=torch.bool)},
            r"mask must be .* \(2 images, 9 tokens\), got one of shape \(2, 8\)",
        ),
        ({"cls_attention": torch.ones(2, 9, 1)}, r"cls_attention must be .* \(2 images, 9 tokens\)"),
        ({"encoder_features": torch.ones(2, 9)}, r"encoder_features must be .* \(2 images, 9 tokens, width\)"),
        ({"keys": torch.ones(1, 9, 4)}, r"keys must be .* \(2 images, 9 tokens, width\), got one of shape \(1, 9, 4\)"),
        ({"text": torch.ones(2, 3, 5)}, r"text must be .* \(2 images, words, 4 wide, as the features\)"),
        ({"text_mask": torch.ones(2, 4, dtype=torch.bool)}, r"text_mask must be .* \(2 images, 3 words\)"),
        ({"text_mask": torch.ones(2, 3)}, "text_mask must be of dtype bool"),
        ({"grid": (2, 4)}, "a grid of 2 x 4 patches does not hold 9 visual tokens"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changed, says):
    with pytest.raises(InvalidInputError, match=says):
        make(**changed)


def test_tokens_that_were_put_together_by_hand_are_checked_when_they_are_pruned():
    with pytest.raises(InvalidInputError, match="mask must be of dtype bool"):
        UniformPruner(num_tokens=4)(replace(make(), mask=torch.ones(2, 9)))
