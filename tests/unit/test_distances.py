"""Measured for many methods at once, distances are the numbers of their own functions."""

from __future__ import annotations

import pytest
import torch

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.asking.distances import DISTANCE_NAMES, FLOOR, WEIGHTS, Reference, check_distances
from dcp_prune.functional.distribution import DISTANCES
from dcp_prune.functional.relevance import question_relevance
from dcp_prune.functional.similarity import scale_to_peak
from dcp_prune.tokens import VisualTokens

INDEX = torch.tensor([0, 0, 0, 1, 1])


def _tokens(*, attention: bool = True, padded: bool = False) -> VisualTokens:
    torch.manual_seed(0)
    features = torch.randn(2, 40, 24) * torch.linspace(0.2, 3, 24) + 1.0
    mask = torch.ones(2, 40, dtype=torch.bool)
    if padded:
        mask[1, 33:] = False
        features[1, 33:] = 0.0
    scores = torch.rand(2, 40).masked_fill(~mask, 0.0) if attention else None
    return VisualTokens.from_features(features, grid=(5, 8), mask=mask, cls_attention=scores)


def _question() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    words = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    return torch.randn(5, 3, 24), words


def _expected(name: str, tokens: VisualTokens, kept: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    base = next(base for base in DISTANCES if name in (base, *(f"{base}_{weights}" for weights in WEIGHTS)))
    suffix = name.removeprefix(base).removeprefix("_")
    text, words = _question()
    features, real = tokens.features[INDEX], tokens.mask[INDEX]
    relevance = question_relevance(features, text, mask=real, text_mask=words)
    assert tokens.encoder is not None
    assert tokens.encoder.cls_attention is not None
    saliency = scale_to_peak(tokens.encoder.cls_attention, tokens.mask)[INDEX]
    weights = {"": None, "saliency": saliency, "relevance": relevance, "both": relevance + saliency + FLOOR}[suffix]
    return DISTANCES[base](kept, features, kept_mask=mask, full_mask=real, weights=weights)


@pytest.mark.parametrize("name", DISTANCE_NAMES)
@pytest.mark.parametrize("padded", [False, True])
def test_shared_work_changes_no_distance(name: str, padded: bool) -> None:
    tokens = _tokens(padded=padded)
    reference = Reference(tokens, INDEX, *_question())
    by_image, by_question = tokens.features[:, 3:30:4], torch.stack([tokens.features[i, i : i + 7] for i in INDEX])
    by_question = by_question + 0.1 * torch.randn(by_question.shape)
    for kept, rows in ((by_image, INDEX), (by_question, torch.arange(5))):
        mask = torch.ones(kept.shape[:2], dtype=torch.bool)
        if padded:
            mask[-1, -2:] = False
        found = reference.distances([name], kept, mask, by_question=kept is by_question)
        torch.testing.assert_close(found[name], _expected(name, tokens, kept[rows], mask[rows]), rtol=2e-4, atol=2e-5)


def test_without_a_question_its_weights_are_even() -> None:
    tokens = _tokens()
    kept, mask = tokens.features[:, ::5], torch.ones(2, 8, dtype=torch.bool)
    found = Reference(tokens, INDEX, None, None).distances(
        ["coverage", "coverage_relevance"], kept, mask, by_question=False
    )
    torch.testing.assert_close(found["coverage"], found["coverage_relevance"])


def test_weights_by_an_attention_that_nobody_measured_are_left_out() -> None:
    tokens = _tokens(attention=False)
    kept, mask = tokens.features[:, ::5], torch.ones(2, 8, dtype=torch.bool)
    found = Reference(tokens, INDEX, *_question()).distances(
        ["mmd", "mmd_saliency", "mmd_both", "mmd_relevance"], kept, mask, by_question=False
    )
    assert set(found) == {"mmd", "mmd_relevance"}


def test_an_unknown_distance_is_refused_with_a_near_name() -> None:
    with pytest.raises(InvalidInputError, match="did you mean kappa_relevance"):
        check_distances(["kappa_relevanc"])
    assert check_distances(["mmd", "kappa", "mmd"]) == ("mmd", "kappa")
