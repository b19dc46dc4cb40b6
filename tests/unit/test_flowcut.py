"""FlowCut's stages, worked out by hand: the score, its memory, and how many tokens a layer drops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dcp_prune import EncoderTokens, InvalidInputError, MissingSignalError, make_pruner
from dcp_prune.pruners.flowcut import FlowCutPruner, FlowCutStage, attention_entropy, flow_score


def stages(k: int, n: int = 16, num_layers: int = 8, **options) -> tuple[FlowCutStage, ...]:
    return FlowCutPruner(num_tokens=k, **options).encoder_stages(n, num_layers)  # type: ignore[return-value]


def make_tokens(attention: torch.Tensor, values: torch.Tensor | None = None) -> EncoderTokens:
    """Tokens with this [CLS] attention, `b n`; value affinities are even."""
    b, n = attention.shape
    values = torch.ones(b, n, 1) if values is None else values
    return EncoderTokens(
        features=torch.arange(n).expand(b, n).unsqueeze(-1).float(),
        positions=torch.zeros(b, n, 2),
        indices=torch.arange(n).expand(b, n),
        cls_attention=attention,
        cls_value_affinity=torch.full((b, n), 1.0 / n),
        values=values,
    )


def peaked(n: int, tokens: int) -> torch.Tensor:
    """Attention spread evenly over the last few tokens, all others next to nothing. `n`."""
    return torch.full((n,), 1e-6).index_fill(0, torch.arange(n - tokens, n), 0.9 / tokens)


def test_the_score_is_the_sum_of_two_shares_times_the_value_norm():
    attention, affinity = torch.tensor([[0.1, 0.3]]), torch.tensor([[0.5, 0.25]])
    values = torch.tensor([[[1.0, -2.0], [0.0, 0.5]]])
    score = flow_score(attention, affinity, values)
    torch.testing.assert_close(score, torch.tensor([[(0.25 + 2 / 3) * 3.0, (0.75 + 1 / 3) * 0.5]]))


def test_attention_that_is_zero_adds_nothing_to_the_entropy():
    entropy = attention_entropy(torch.tensor([[0.2, 0.0, 0.2, 0.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), math.log(4), 0.0]))


def test_every_layer_before_the_feature_layer_scores_and_every_other_one_drops():
    found = stages(4)
    assert [stage.layer for stage in found] == [0, 1, 2, 3, 4, 5, 6]
    assert [stage.remaining for stage in found] == [6, 5, 4, 3, 2, 1, 0]
    assert [stage.num_tokens for stage in found] == [None] * 6 + [4]
    attention = peaked(16, 3).unsqueeze(0)
    assert [stage.reduce(make_tokens(attention)).kept.shape[1] < 16 for stage in found] == [True, False] * 3 + [True]


@pytest.mark.parametrize("num_layers", [1, 2])
def test_an_encoder_without_a_layer_to_prune_at_is_cut_behind_it(num_layers):
    assert len(stages(4, num_layers=num_layers)) == num_layers - 1


def test_even_attention_drops_nothing_before_the_last_layer():
    first, *_, last = stages(4)
    even = make_tokens(torch.full((1, 16), 1 / 17))
    assert first.reduce(even).kept.shape == (1, 16)
    assert last.reduce(even).kept.tolist() == [[0, 1, 2, 3]], "all scores are equal, so earlier tokens win"


def test_the_number_dropped_follows_from_the_entropy():
    attention = torch.tensor([[0.02, 0.3, 0.05, 0.1, 0.01, 0.2, 0.05, 0.04]])
    share = (attention / attention.sum()).double()
    evenness = float(-(share * share.log()).sum() / math.log(8))
    stage = stages(2, n=8)[0]
    expected = round((8 - 2) / math.sqrt(6) * (1 - evenness**2))
    assert expected > 0
    done = stage.reduce(make_tokens(attention))
    assert done.stats["num_tokens"].tolist() == [8 - expected]
    assert done.kept.shape == (1, 8 - expected)
    assert 1 in done.kept[0].tolist()


def test_the_running_score_halves_what_was_before():
    first, second = stages(4)[:2]
    done = first.reduce(make_tokens(torch.full((1, 16), 1 / 17)))
    later = make_tokens(peaked(16, 2).unsqueeze(0))
    state = second.reduce(replace(later, state=done.state)).state["score"]
    torch.testing.assert_close(state, 0.5 * done.state["score"] + 0.5 * second.reduce(later).state["score"])
    forgetful = stages(4, memory=0.0)[1]
    assert torch.equal(
        forgetful.reduce(replace(later, state=done.state)).state["score"], forgetful.reduce(later).state["score"]
    )


def test_images_drop_as_many_as_they_would_alone_or_as_released_as_many_as_the_one_that_drops_most():
    attention = torch.stack((peaked(16, 2), torch.full((16,), 1 / 17)))
    own = stages(4)[0].reduce(make_tokens(attention))
    alone = [stages(4)[0].reduce(make_tokens(row.unsqueeze(0))) for row in attention]
    assert own.mask is not None
    assert own.stats["num_tokens"].tolist() == [each.kept.shape[1] for each in alone]
    assert own.mask.sum(dim=1).tolist() == own.stats["num_tokens"].tolist()
    for row, single in enumerate(alone):
        assert own.kept[row][own.mask[row]].tolist() == single.kept[0].tolist()
        assert (own.assignment[row] >= 0).sum() == single.kept.shape[1]
    largest = stages(4, batch_drop="largest")[0].reduce(make_tokens(attention))
    assert largest.mask is None
    assert largest.stats["num_tokens"].tolist() == [alone[0].kept.shape[1]] * 2


def test_padding_of_an_earlier_stage_is_never_kept():
    stage = stages(4)[6]
    attention = peaked(16, 8).unsqueeze(0)
    mask = torch.arange(16).expand(1, 16) < 10
    tokens = make_tokens(attention.masked_fill(~mask, 0.0), torch.arange(16.0).view(1, 16, 1))
    assert stage.reduce(replace(tokens, mask=mask)).kept.tolist() == [[6, 7, 8, 9]]


def test_attention_that_is_no_number_is_refused_at_its_layer():
    attention = torch.full((1, 16), 1 / 17)
    attention[0, 3] = float("nan")
    with pytest.raises(InvalidInputError, match="attention at encoder layer 0 holds NaN or inf"):
        stages(4)[0].reduce(make_tokens(attention))


def test_a_stage_says_which_signals_it_needs():
    tokens = replace(make_tokens(torch.full((1, 16), 1 / 17)), values=None)
    with pytest.raises(MissingSignalError, match=r"FlowCutStage needs .*encoder\.values"):
        stages(4)[0].reduce(tokens)


@pytest.mark.parametrize("option", [{"memory": 1.0}, {"memory": -0.1}, {"batch_drop": "smallest"}])
def test_a_senseless_option_is_refused_by_name(option):
    with pytest.raises(InvalidInputError, match=next(iter(option))):
        make_pruner("flowcut", num_tokens=4, **option)
