"""Every family by the same claims: what pruning does to a model is what masking the dropped columns does."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, SIZES, Family, make_picture
from torch import Tensor

from dcp_prune.errors import InvalidInputError, MissingSignalError, UnsupportedModelError
from dcp_prune.integrations.transformers import ShortInputs, prune, prune_inputs
from dcp_prune.registry import list_pruners, make_pruner

PROMPTS = ("USER: <image> what is this ASSISTANT:", "USER: <image> where <image> is the cat", "what is the dog here")
PRUNERS = ("dcp", "dcp_progressive", "visionzip", "holov", "random")
BUDGET = 6


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def skip_stages(family: Family, pruner: str) -> None:
    if pruner == "dcp_progressive" and not family.staged:
        pytest.skip("refused: a test of its own says so")


def pictures(*which: int) -> list[Any]:
    return [make_picture(number, SIZES[number % len(SIZES)]) for number in which]


@pytest.fixture
def inputs(family: Family) -> dict[str, Any]:
    """Three prompts with one, two and no images, all of different shapes."""
    return family.make_inputs(PROMPTS, pictures(0, 1, 2))


def run_with_dropped_columns_masked(family: Family, inputs: dict[str, Any], short: ShortInputs) -> Tensor:
    """Logits of the model's own prompt, separators included, where no token may attend to a dropped placeholder and the
    kept ones hold the pruned features; at the columns that are left."""
    record, columns = short.record, short.columns
    assert columns is not None
    assert record is not None
    assert short.features is not None

    def lay_out(kept: Tensor) -> list[Tensor]:
        laid = []
        for layout, indices, features in zip(record.layouts, record.indices, kept, strict=True):
            real = indices >= 0
            laid.append(torch.zeros(len(layout), features.shape[1]).index_copy(0, indices[real], features[real]))
        return laid

    mask = torch.zeros_like(inputs["attention_mask"])
    mask = mask.scatter_add(1, columns.clamp(min=0), (columns >= 0).long()).clamp(max=1) * inputs["attention_mask"]
    deepstack = [lay_out(layer) for layer in short.deepstack]
    logits = family.model(**family.oracle_inputs(inputs, mask, lay_out(short.features), deepstack)).logits
    return logits.gather(1, columns.clamp(min=0).unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


@pytest.mark.crossed("family", "name", "scope", every=3)
@pytest.mark.parametrize("scope", ["image", "tile"])
@pytest.mark.parametrize("name", PRUNERS)
def test_logits_equal_the_unpruned_run_with_the_dropped_columns_masked(
    family: Family, inputs: dict[str, Any], name: str, scope: str
) -> None:
    skip_stages(family, name)
    short = prune_inputs(family.model, inputs, make_pruner(name, num_tokens=BUDGET, scope=scope))
    with torch.no_grad():
        logits = family.model(**short.inputs).logits
        oracle = run_with_dropped_columns_masked(family, inputs, short)
    real = short.tensors["attention_mask"].bool()
    assert logits.shape[1] < inputs["input_ids"].shape[1]
    torch.testing.assert_close(logits[real], oracle[real], rtol=1e-5, atol=1e-5)


def test_images_that_keep_different_numbers_of_tokens_run_together(family: Family, inputs: dict[str, Any]) -> None:
    bounds = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
    pruners = (make_pruner("dcp", max_distance=bound, num_tokens=(2, 14)) for bound in bounds)
    shorts = (prune_inputs(family.model, inputs, pruner) for pruner in pruners)
    short = next(each for each in shorts if each.record and len({kept for _, kept in each.record.tokens_per_image}) > 1)
    with torch.no_grad():
        logits = family.model(**short.inputs).logits
        oracle = run_with_dropped_columns_masked(family, inputs, short)
    real = short.tensors["attention_mask"].bool()
    torch.testing.assert_close(logits[real], oracle[real], rtol=1e-5, atol=1e-5)
    answers = family.model.generate(**short.inputs, num_beams=2, max_new_tokens=2)
    assert torch.equal(short.restore(answers)[:, : short.width], inputs["input_ids"])


def test_the_oracle_can_fail(family: Family, inputs: dict[str, Any]) -> None:
    short = prune_inputs(family.model, inputs, make_pruner("random", num_tokens=BUDGET))
    assert short.features is not None
    other = replace(short, features=short.features.flip(1))
    with torch.no_grad():
        right, wrong = (run_with_dropped_columns_masked(family, inputs, each) for each in (short, other))
    assert (right - wrong)[short.tensors["attention_mask"].bool()].abs().max() > 1e-3


def test_kept_features_are_those_that_the_model_puts_at_these_placeholders(
    family: Family, inputs: dict[str, Any]
) -> None:
    short = prune_inputs(family.model, inputs, make_pruner("random", num_tokens=BUDGET))
    assert short.record is not None
    assert short.features is not None
    for own, indices, features in zip(family.own_features(inputs), short.record.indices, short.features, strict=True):
        torch.testing.assert_close(own[indices], features, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("budget", [{"num_tokens": 10_000}, {"keep_ratio": 1.0}])
def test_a_budget_of_all_tokens_changes_no_bit(family: Family, inputs: dict[str, Any], budget: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="nothing was pruned"):
        short = prune_inputs(family.model, inputs, make_pruner("dcp", **budget))
    assert all(short.inputs[name] is inputs[name] for name in inputs)


@pytest.mark.crossed("family", "name", every=4, always=["dcp", "flowcut"])
@pytest.mark.parametrize("name", list_pruners())
def test_every_pruner_keeps_exactly_its_budget_or_is_refused_with_the_reason(
    family: Family, inputs: dict[str, Any], name: str
) -> None:
    pruner = make_pruner(name, num_tokens=BUDGET)
    missing = pruner.requires - family.adapter.signals - {"text"}
    if missing:
        with pytest.raises(MissingSignalError, match=r"does not give \(.+\)"):
            prune_inputs(family.model, inputs, pruner)
        return
    if pruner.encoder_stages(576, 24) and not family.adapter.prunes_in_encoder:
        with pytest.raises(InvalidInputError, match=r"cannot drop visual tokens inside its encoder, .+; use a pruner"):
            prune_inputs(family.model, inputs, pruner)
        return
    skip_stages(family, name)
    first = family.model.get_decoder().layers[0].self_attn
    if pruner.text_space == "lookup" and (hasattr(first, "q_norm") or not hasattr(first, "q_proj")):
        with pytest.raises(UnsupportedModelError, match="has no plain query and key projections; use text_space="):
            prune_inputs(family.model, inputs, pruner)
        return
    short = prune_inputs(family.model, inputs, pruner)
    assert short.record is not None
    assert [after for _, after in short.record.tokens_per_image] == [BUDGET] * 3
    placeholders = short.tensors["input_ids"] == family.adapter.image_token_id
    assert placeholders.sum(dim=1).tolist() == [BUDGET, 2 * BUDGET, 0]


def test_a_share_is_of_each_images_own_tokens(family: Family, inputs: dict[str, Any]) -> None:
    record = prune_inputs(family.model, inputs, make_pruner("dcp", keep_ratio=0.25)).record
    assert record is not None
    sizes = [sum(layout.tile_lengths) for layout in record.layouts]
    assert [after for _, after in record.tokens_per_image] == [int(0.25 * size + 0.5) for size in sizes]


def test_a_budget_per_tile_keeps_so_many_of_every_tile(family: Family, inputs: dict[str, Any]) -> None:
    record = prune_inputs(family.model, inputs, make_pruner("dcp", num_tokens=3, scope="tile")).record
    assert record is not None
    for layout, indices in zip(record.layouts, record.indices, strict=True):
        tiles = layout.source[indices[indices >= 0]] // layout.tile_size
        assert torch.bincount(tiles, minlength=layout.num_tiles).tolist() == [min(3, n) for n in layout.tile_lengths]


@pytest.mark.crossed("family", "name", "scope", every=3)
@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("scope", ["image", "tile"])
def test_a_padded_batch_equals_single_rows(family: Family, inputs: dict[str, Any], name: str, scope: str) -> None:
    skip_stages(family, name)
    pruner = make_pruner(name, num_tokens=BUDGET, scope=scope)
    batch = prune_inputs(family.model, inputs, pruner)
    singles = [
        prune_inputs(family.model, family.make_inputs([prompt], pictures(*which)), pruner)
        for prompt, which in zip(PROMPTS, ((0,), (1, 2), ()), strict=True)
    ]
    assert batch.record is not None
    alone = [row[row >= 0].tolist() for single in singles if single.record for row in single.record.indices]
    assert [row[row >= 0].tolist() for row in batch.record.indices] == alone
    absorbed = [row[row >= 0].tolist() for single in singles if single.record for row in single.record.assignment]
    assert [row[row >= 0].tolist() for row in batch.record.assignment] == absorbed
    with torch.no_grad():
        together = family.model(**batch.inputs).logits[:, -1]
        one_by_one = torch.cat([family.model(**single.inputs).logits[:, -1] for single in singles])
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-4)


@pytest.mark.crossed("family", "ways", every=2)
@pytest.mark.parametrize("ways", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_generate_with_a_handle_equals_generate_with_short_inputs_and_leaves_no_trace(
    family: Family, ways: dict[str, Any]
) -> None:
    inputs = family.make_inputs(PROMPTS[1:2], pictures(1, 2))
    model = copy.deepcopy(family.model)
    staged = family.adapter.prunes_in_encoder
    pruner = make_pruner("dcp_progressive" if staged else "dcp", num_tokens=BUDGET)
    short = prune_inputs(model, inputs, pruner)
    torch.manual_seed(0)
    expected = short.restore(model.generate(**short.inputs, max_new_tokens=4, **ways))
    before = set(model.__dict__)
    with prune(model, pruner) as handle:
        torch.manual_seed(0)
        answer = model.generate(**inputs, max_new_tokens=4, **ways)
        assert handle.last is not None
        assert handle.last.tokens_after == BUDGET
    assert torch.equal(answer, expected)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 4
    assert set(model.__dict__) == before
    assert not model._forward_pre_hooks
    torch.manual_seed(0)
    again = model.generate(**inputs, max_new_tokens=4, **ways)
    torch.manual_seed(0)
    assert torch.equal(again, family.model.generate(**inputs, max_new_tokens=4, **ways))


def test_placeholders_that_do_not_fit_the_images_are_refused(family: Family, inputs: dict[str, Any]) -> None:
    broken = inputs | {"input_ids": inputs["input_ids"][:, :-12], "attention_mask": inputs["attention_mask"][:, :-12]}
    with pytest.raises(ValueError, match="placeholders"):
        prune_inputs(family.model, broken, make_pruner("random", num_tokens=BUDGET))
