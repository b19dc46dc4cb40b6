"""What the question says about the image, and when it says nothing."""

from __future__ import annotations

import math

import pytest
import torch

from dcp_prune.functional.relevance import token_relevance, word_confidence, word_similarity


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cosines_to_padding_are_zero_on_both_sides():
    mask, text_mask = torch.tensor([[True, False, True]]), torch.tensor([[True, False]])
    cosines = word_similarity(noise(1, 3, 8), noise(1, 2, 8, seed=1), mask=mask, text_mask=text_mask)
    assert cosines[0, 1].tolist() == [0.0, 0.0]
    assert cosines[0, :, 1].tolist() == [0.0] * 3
    assert float(cosines[0, 0, 0]) == pytest.approx(
        float(torch.cosine_similarity(noise(1, 3, 8)[0, 0], noise(1, 2, 8, seed=1)[0, 0], dim=0))
    )


@pytest.mark.parametrize("n", [64, 144, 576])
def test_noise_inspires_little_confidence_whatever_the_number_of_tokens(n):
    assert float(word_confidence(noise(200, n, 1), span=1.0).mean()) < 0.15


def test_a_word_with_a_clear_counterpart_inspires_full_confidence():
    cosines = noise(1, 576, 2) * 0.01
    cosines[0, 40, 1] = 0.5
    confidence = word_confidence(cosines)[0]
    assert confidence[1] == 1.0
    assert confidence[0] < 0.3


def test_confidence_is_the_z_score_beyond_chance_over_the_span():
    cosines = noise(1, 100, 1)
    cosines[0, 3] = 8.0
    values = cosines[0, :, 0].double()
    z = (values.max() - values.mean()) / values.std(correction=0)
    expected = (z - math.sqrt(2 * math.log(100)) - 0.5) / 10.0
    assert float(word_confidence(cosines, margin=0.5, span=10.0)) == pytest.approx(float(expected), rel=1e-4)


def test_a_flat_map_inspires_none():
    assert word_confidence(torch.full((1, 50, 3), 0.4)).tolist() == [[0.0, 0.0, 0.0]]


def test_padding_changes_no_confidence():
    cosines = noise(1, 60, 2)
    cosines[0, 7, 0] = 9.0
    padded = torch.cat((cosines, torch.full((1, 40, 2), 50.0)), dim=1)
    mask = torch.arange(100).expand(1, 100) < 60
    torch.testing.assert_close(word_confidence(padded, mask=mask), word_confidence(cosines))
    text_mask = torch.tensor([[False, True]])
    assert word_confidence(cosines, text_mask=text_mask)[0, 0] == 0.0


def test_relevance_is_each_tokens_share_in_its_best_words_peak():
    cosines = torch.tensor([[[0.2, 0.0], [0.1, 0.4], [-0.3, 0.1]]])
    assert token_relevance(cosines, torch.tensor([[1.0, 1.0]]))[0].tolist() == pytest.approx([1.0, 1.0, 0.25])
    assert token_relevance(cosines, torch.tensor([[1.0, 0.5]]))[0].tolist() == pytest.approx([1.0, 0.5, 0.125])
    assert token_relevance(cosines, torch.zeros(1, 2)).tolist() == [[0.0, 0.0, 0.0]]
