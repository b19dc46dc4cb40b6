"""Arguments that have the length of the prompt in them: packed samples, positions, and whatever else counts columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import prune, prune_inputs
from dcp_prune.integrations.transformers.prompt import close_gaps, split_samples
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import make_pruner

MakeInputs = Callable[..., dict[str, Any]]
PROMPTS = ["USER: <image> what is the colour ASSISTANT: red", "<image> where is the cat ASSISTANT: there two"]


def pack(*samples: dict[str, Any]) -> dict[str, Any]:
    """Samples of one row each, in one row; positions begin again with each."""
    return {
        "input_ids": torch.cat([each["input_ids"] for each in samples], dim=1),
        "position_ids": torch.cat([torch.arange(each["input_ids"].shape[1]) for each in samples])[None],
        "pixel_values": torch.cat([each["pixel_values"] for each in samples]),
    }


@pytest.fixture
def samples(make_inputs: MakeInputs) -> list[dict[str, Any]]:
    return [make_inputs(prompt, seeds=[seed]) for seed, prompt in enumerate(PROMPTS)]


def test_packed_samples_do_not_see_each_other(model: Any, samples: list[dict[str, Any]], pruner: Pruner) -> None:
    with prune(model, pruner), torch.no_grad():
        packed = model(**pack(*samples), use_cache=False).logits
        alone = torch.cat([model(**each, use_cache=False).logits for each in samples], dim=1)
    # One question is padded beside the other, which moves kappa and the like by rounding.
    torch.testing.assert_close(packed, alone, rtol=1e-3, atol=1e-3)


def test_packed_labels_give_the_loss_of_the_samples_alone(model: Any, samples: list[dict[str, Any]]) -> None:
    for each in samples:
        each["labels"] = each["input_ids"].masked_fill(each["input_ids"] == model.config.image_token_id, -100)
        each["labels"][:, 0] = -100  # nobody predicts the first token of a sample
    packed = pack(*samples) | {"labels": torch.cat([each["labels"] for each in samples], dim=1)}
    with prune(model, make_pruner("uniform", num_tokens=8)), torch.no_grad():
        alone = [model(**each, use_cache=False).loss * (each["labels"] != -100).sum() for each in samples]
        together = model(**packed, use_cache=False).loss
    torch.testing.assert_close(together, sum(alone) / (packed["labels"] != -100).sum())


def test_cumulative_lengths_of_samples_are_counted_anew(pristine_model: Any, samples: list[dict[str, Any]]) -> None:
    lengths = [each["input_ids"].shape[1] for each in samples]
    borders = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    packed = pack(*samples) | {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": max(lengths)}
    packed["seq_idx"] = torch.tensor([0] * lengths[0] + [1] * lengths[1], dtype=torch.int32)[None]
    short = prune_inputs(pristine_model, packed, make_pruner("uniform", num_tokens=8)).tensors
    ends = [0, lengths[0] - 28, sum(lengths) - 56]
    for side in ("q", "k"):
        assert short[f"cu_seq_lens_{side}"].tolist() == ends
        assert short[f"cu_seq_lens_{side}"].dtype == torch.int32
    assert short["max_length_q"] == max(lengths) - 28
    assert short["seq_idx"][0].tolist() == [0] * ends[1] + [1] * (ends[2] - ends[1])
    assert short["position_ids"][0].tolist() == [*range(ends[1]), *range(ends[2] - ends[1])]


def test_cumulative_lengths_over_several_rows_are_refused(pristine_model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    borders = torch.arange(3, dtype=torch.int32) * inputs["input_ids"].shape[1]
    with pytest.raises(InvalidInputError, match="cu_seq_lens_q can be shortened for one row without a cache only"):
        prune_inputs(pristine_model, inputs | {"cu_seq_lens_q": borders}, make_pruner("uniform", num_tokens=8))


def test_packed_rows_that_keep_different_numbers_are_refused(
    pristine_model: Any, samples: list[dict[str, Any]]
) -> None:
    one, two = (each["input_ids"] for each in samples)
    ids = torch.cat((torch.cat((one, two), dim=1), torch.full((1, one.shape[1] + two.shape[1]), 5)))
    restarting = pack(*samples)["position_ids"].expand(ids.shape)
    inputs = {"input_ids": ids, "position_ids": restarting, "pixel_values": pack(*samples)["pixel_values"]}
    with pytest.raises(InvalidInputError, match="hold several samples each and keep different numbers of tokens"):
        prune_inputs(pristine_model, inputs, make_pruner("uniform", num_tokens=8))


def test_positions_without_a_mask_keep_where_they_began(pristine_model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(PROMPTS[0])
    length = inputs["input_ids"].shape[1]
    del inputs["attention_mask"]
    short = prune_inputs(
        pristine_model, inputs | {"position_ids": 7 + torch.arange(length)[None]}, make_pruner("uniform", num_tokens=8)
    )
    assert short.tensors["position_ids"][0].tolist() == list(range(7, 7 + length - 28))


def test_positions_of_one_row_hold_for_all_rows(pristine_model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs("<image> what is", "<image> where is")
    one = torch.arange(inputs["input_ids"].shape[1])[None]
    pruner = make_pruner("random", num_tokens=8)
    given, expanded = (
        prune_inputs(pristine_model, inputs | {"position_ids": positions}, pruner).tensors["position_ids"]
        for positions in (one, one.expand(2, -1))
    )
    assert torch.equal(given, expanded)


@pytest.mark.parametrize("shape", [(12,), (1, 3), (2, 12)], ids=str)
def test_positions_that_do_not_fit_the_ids_are_refused(
    pristine_model: Any, make_inputs: MakeInputs, shape: tuple[int, ...]
) -> None:
    inputs = make_inputs(PROMPTS[0]) | {"position_ids": torch.zeros(shape, dtype=torch.long)}
    with pytest.raises(InvalidInputError, match=r"position_ids of shape .* do not fit input_ids"):
        prune_inputs(pristine_model, inputs, make_pruner("uniform", num_tokens=8))


def test_what_has_more_values_for_each_column_is_shortened_along(pristine_model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(PROMPTS[0])
    columns = torch.arange(inputs["input_ids"].shape[1])[None]
    extra = {"biases": torch.stack((columns, -columns), dim=2), "shift_labels": columns}
    short = prune_inputs(pristine_model, inputs | extra, make_pruner("uniform", num_tokens=8))
    assert short.columns is not None
    assert torch.equal(short.tensors["biases"], torch.stack((short.columns, -short.columns), dim=2))
    assert torch.equal(short.tensors["shift_labels"], short.columns)


@pytest.mark.parametrize("form", ["rows x heads x columns x columns", "columns"])
def test_what_counts_columns_in_another_form_is_refused(
    pristine_model: Any, make_inputs: MakeInputs, form: str
) -> None:
    inputs = make_inputs(PROMPTS[0])
    length = inputs["input_ids"].shape[1]
    extra = torch.zeros(length) if form == "columns" else torch.zeros(1, 1, length, length)
    with pytest.raises(InvalidInputError, match=r"biases of shape .* seems to be about the 43 columns of the prompt"):
        prune_inputs(pristine_model, inputs | {"biases": extra}, make_pruner("uniform", num_tokens=8))


def test_gaps_close_within_a_sample_only() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 0, 0, 1, 2, 3, 4, 5]])
    real = torch.tensor([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1]]).bool()
    columns = torch.tensor([[0, 2, 3, 4, 6, 7], [-1, 2, 3, 5, 6, 7]])
    found = close_gaps(positions, real, columns, torch.zeros(2, 1, dtype=torch.long))
    assert found.tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]]


def test_samples_come_apart_with_their_images() -> None:
    ids: Tensor = torch.tensor([[1, 4, 9, 4, 8, 8], [5, 4, 7, 7, 7, 7]])
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[0, 3] = True
    rows, columns = torch.tensor([0, 0, 1]), torch.tensor([[1], [3], [1]])
    apart, real, own, places = split_samples(starts, ids, torch.ones_like(starts), rows, columns)
    assert apart.tolist() == [[1, 4, 9, 0, 0, 0], [4, 8, 8, 0, 0, 0], [5, 4, 7, 7, 7, 7]]
    assert real.sum(dim=1).tolist() == [3, 3, 6]
    assert own.tolist() == [0, 1, 2]
    assert places.tolist() == [[1], [0], [1]]
