"""Logits that are counted from the end, or asked for by column, are those of the caller's columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import prune, prune_inputs
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import make_pruner

MakeInputs = Callable[..., dict[str, Any]]
PROMPTS = [
    "USER: <image> what is the colour of this dog ASSISTANT:",
    "<image> where is the cat ASSISTANT:",
    "what is it",
]


def padded_on_both_sides(prompt: dict[str, Any]) -> dict[str, Any]:
    """Prompts padded on the left with answers padded on the right, as trainers by reward lay them out."""
    answers = torch.tensor([[5, 6, 7, 8], [11, 12, 0, 0], [9, 0, 0, 0]])
    return prompt | {
        "input_ids": torch.cat((prompt["input_ids"], answers), dim=1),
        "attention_mask": torch.cat((prompt["attention_mask"], (answers > 0).long()), dim=1),
    }


def alone(model: Any, inputs: dict[str, Any], row: int, image: int | None) -> Tensor:
    """Logits of one row without padding."""
    ids = inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]
    pixels = {} if image is None else {"pixel_values": inputs["pixel_values"][image : image + 1]}
    return model(input_ids=ids, **pixels).logits[0]


@pytest.mark.parametrize("last", [3, 5])
def test_the_last_k_logits_of_rows_padded_on_both_sides_are_those_of_each_row_alone(
    model: Any, make_inputs: MakeInputs, pruner: Pruner, last: int
) -> None:
    inputs = padded_on_both_sides(make_inputs(*PROMPTS))
    with prune(model, pruner), torch.no_grad():
        kept = model(**inputs, logits_to_keep=last)
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -last:]
        for row, image in enumerate((0, 1, None)):
            real = inputs["attention_mask"][row, -last:].bool()
            own = alone(model, inputs, row, image)
            expected = own[len(own) - int(real.sum()) :]
            torch.testing.assert_close(kept.logits[row, real], expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(model.lm_head(hidden[row, real]), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "which", [[-2, -1], [-1, -2], [2], [1, -3]], ids=["the last two", "in another order", "in front", "on both sides"]
)
def test_logits_by_column_are_those_of_these_columns(model: Any, make_inputs: MakeInputs, which: list[int]) -> None:
    inputs = make_inputs("USER: what is <image> two cat and dog")
    chosen = torch.tensor(which)
    with prune(model, make_pruner("uniform", num_tokens=8)) as handle, torch.no_grad():
        short = model(**inputs).logits[0]
        places = [handle.last.columns[0].tolist().index(column % 43) for column in which]
        assert inputs["input_ids"].shape[1] == 43
        as_mask = torch.zeros(43, dtype=torch.bool).index_fill(0, chosen % 43, True)
        torch.testing.assert_close(model(**inputs, logits_to_keep=chosen).logits[0], short[places])
        torch.testing.assert_close(model(**inputs, logits_to_keep=chosen % 43).logits[0], short[places])
        torch.testing.assert_close(model(**inputs, logits_to_keep=as_mask).logits[0], short[sorted(places)])


def test_logits_of_kept_visual_tokens_can_be_asked_for(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs("USER: what is <image> two cat and dog")
    with prune(model, make_pruner("uniform", num_tokens=8)) as handle, torch.no_grad():
        short = model(**inputs).logits[0]
        column = 3 + handle.last.indices[0, 3]
        torch.testing.assert_close(model(**inputs, logits_to_keep=column[None]).logits[0], short[3 + 3][None])


@pytest.mark.parametrize("wanted", [20, torch.tensor([5, 6, 7])], ids=["the last 20", "columns"])
def test_logits_of_dropped_tokens_are_refused(model: Any, make_inputs: MakeInputs, wanted: Any) -> None:
    inputs = make_inputs("USER: what is <image> two cat and dog")
    sentence = r"asks for column \d+ of the prompt, which was dropped"
    with (
        prune(model, make_pruner("cls_attention", num_tokens=2)),
        pytest.raises(InvalidInputError, match=sentence),
    ):
        model(**inputs, logits_to_keep=wanted)


def test_columns_that_do_not_exist_are_refused(model: Any, make_inputs: MakeInputs) -> None:
    with (
        prune(model, make_pruner("uniform", num_tokens=8)),
        pytest.raises(InvalidInputError, match="names columns of a prompt of 38 that do not exist"),
    ):
        model(**make_inputs("<image> two cat"), logits_to_keep=torch.tensor([38]))


def test_columns_at_different_places_in_the_short_rows_are_refused(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs("<image> two cat", " ".join(["what"] * 38), "what", padding_side="right")
    with (
        prune(model, make_pruner("uniform", num_tokens=8)),
        pytest.raises(InvalidInputError, match="different places in the rows of the short prompt"),
    ):
        model(**inputs, logits_to_keep=torch.tensor([36, 37]))


def test_the_pure_function_maps_columns_as_well(pristine_model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs("USER: what is <image> two cat") | {"logits_to_keep": torch.tensor([40, 2])}
    short = prune_inputs(pristine_model, inputs, make_pruner("uniform", num_tokens=8))
    assert short.inputs["logits_to_keep"].tolist() == [12, 2]
