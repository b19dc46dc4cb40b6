"""`positions="original"`: kept tokens stay where they lay, in the prompt, while decoding and in later turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import ShortInputs, prune, prune_inputs
from dcp_prune.integrations.transformers.positions import Positions
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import make_pruner

MakeInputs = Callable[..., dict[str, Any]]
PROMPTS = ["USER: <image> what is the colour of this", "<image> where <image> is it"]
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def masked_run(model: Any, inputs: dict[str, Any], short: ShortInputs, positions: Positions, behind: Tensor) -> Tensor:
    """Logits of the unpruned prompt and the tokens behind it, with the dropped columns masked out."""
    assert short.columns is not None
    assert short.features is not None
    assert short.record is not None
    ids = torch.cat((inputs["input_ids"], behind), dim=1)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    laid = torch.stack(tuple(features)).scatter(
        1, short.record.indices.unsqueeze(-1).expand_as(short.features), short.features
    )
    kept = torch.zeros_like(inputs["attention_mask"]).scatter(1, short.columns.clamp(min=0), 1)
    given = torch.cat((inputs["attention_mask"], torch.ones_like(behind)), dim=1)
    mask = torch.cat((kept * inputs["attention_mask"], torch.ones_like(behind)), dim=1)
    counted = given if positions == "original" else mask
    embeddings = model.get_input_embeddings()(ids)
    places = (ids == model.config.image_token_id).unsqueeze(-1)
    return model(
        inputs_embeds=embeddings.masked_scatter(places, laid.flatten(0, 1)),
        attention_mask=mask,
        position_ids=(counted.cumsum(1) - 1).clamp(min=0),
    ).logits


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_logits_equal_a_full_run_with_the_dropped_columns_masked(
    pristine_model: Any, make_inputs: MakeInputs, pruner: Pruner, positions: Positions
) -> None:
    inputs = make_inputs(*PROMPTS)
    given = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    short = prune_inputs(pristine_model, inputs | {"position_ids": given}, pruner, positions=positions)
    other: Positions = "original" if positions == "compact" else "compact"
    none = torch.empty(2, 0, dtype=torch.long)
    with torch.no_grad():
        logits = pristine_model(**short.inputs).logits
        right, wrong = (masked_run(pristine_model, inputs, short, each, none) for each in (positions, other))
    assert short.columns is not None
    columns = short.columns.clamp(min=0).unsqueeze(-1).expand_as(logits)
    real = short.tensors["attention_mask"].bool()
    torch.testing.assert_close(logits[real], right.gather(1, columns)[real], rtol=1e-3, atol=1e-4)
    assert (logits - wrong.gather(1, columns))[real].abs().max() > 1e-2, "the other positions give other logits"


def test_answers_are_those_of_a_full_run_with_the_dropped_columns_masked(model: Any, make_inputs: MakeInputs) -> None:
    inputs, pruner = make_inputs(*PROMPTS), make_pruner("cls_attention", num_tokens=8)
    short = prune_inputs(model, inputs, pruner, positions="original")
    with prune(model, pruner, positions="original"):
        answer = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    with torch.no_grad():
        logits = masked_run(model, inputs, short, "original", answer)
    assert torch.equal(logits[:, -5:-1].argmax(dim=-1), answer)


@pytest.mark.parametrize("masks", ["long", "none"])
def test_a_loop_of_ones_own_answers_like_generate(model: Any, make_inputs: MakeInputs, masks: str) -> None:
    inputs = make_inputs(*PROMPTS) if masks == "long" else make_inputs(PROMPTS[0])
    with prune(model, make_pruner("uniform", num_tokens=8), positions="original"), torch.no_grad():
        expected = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        output, mask, found = model(**inputs), inputs["attention_mask"], []
        for _ in range(4):
            found.append(output.logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.cat((mask, torch.ones_like(found[-1])), dim=1)
            more = {"attention_mask": mask} if masks == "long" else {}
            output = model(input_ids=found[-1], past_key_values=output.past_key_values, **more)
    assert torch.equal(torch.cat(found, dim=1), expected)


def test_a_second_turn_with_an_image_equals_both_turns_from_scratch(model: Any, make_inputs: MakeInputs) -> None:
    first, later = make_inputs(PROMPTS[0], seeds=[1]), make_inputs("where <image> is it", seeds=[2])
    cache = DynamicCache()
    with prune(model, make_pruner("uniform", num_tokens=8), positions="original"):
        answer = model.generate(**first, **GREEDY, past_key_values=cache)
        ids = torch.cat((answer, later["input_ids"]), dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        pixels = torch.cat((first["pixel_values"], later["pixel_values"]))
        continued = model.generate(**turn, pixel_values=later["pixel_values"], **GREEDY, past_key_values=cache)
        assert torch.equal(continued, model.generate(**turn, pixel_values=pixels, **GREEDY))


@pytest.mark.parametrize("began", ["compact", "original"])
def test_a_conversation_does_not_change_its_positions(model: Any, make_inputs: MakeInputs, began: Positions) -> None:
    inputs, cache = make_inputs(PROMPTS[0]), DynamicCache()
    other: Positions = "original" if began == "compact" else "compact"
    with prune(model, make_pruner("uniform", num_tokens=8), positions=began):
        answer = model.generate(**inputs, **GREEDY, past_key_values=cache)
    with (
        prune(model, make_pruner("uniform", num_tokens=8), positions=other),
        pytest.raises(InvalidInputError, match=f"in this cache was pruned with positions='{began}'"),
    ):
        model.generate(input_ids=answer, **GREEDY, past_key_values=cache)


def test_packed_rows_with_gaps_are_refused(pristine_model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs("<image> what is this")
    length = inputs["input_ids"].shape[1]
    packed = {
        "input_ids": inputs["input_ids"].repeat(1, 2),
        "position_ids": torch.arange(length).repeat(2)[None],
        "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1),
    }
    with pytest.raises(InvalidInputError, match="use positions='compact' for packed rows"):
        prune_inputs(pristine_model, packed, make_pruner("uniform", num_tokens=8), positions="original")


def test_positions_by_another_name_are_refused(model: Any) -> None:
    with pytest.raises(InvalidInputError, match="positions is 'gapped'; use one of: compact, original"):
        prune(model, "uniform", positions="gapped")  # type: ignore[arg-type]


def test_flash_attention_takes_no_gaps(model: Any) -> None:
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(InvalidInputError, match="flash attention takes gaps between positions"):
        prune(model, "uniform", positions="original")
