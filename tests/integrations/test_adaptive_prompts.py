"""Images that keep different numbers of tokens: every way to call the model still sees consistent prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dcp_prune import DCPPruner
from dcp_prune.integrations.transformers import ShortInputs, prune, prune_inputs

IMAGE_ID, N = 4, 36
MakeInputs = Callable[..., dict[str, Any]]
PROMPTS = ("USER: <image> what is this ASSISTANT:", "USER: <image> <image> where is the cat", "what is the dog here")


@pytest.fixture(scope="module")
def ragged(pristine_model: Any, make_inputs: MakeInputs) -> DCPPruner:
    """A bound that gives the three images of `PROMPTS` different numbers of tokens."""
    fixed = DCPPruner(num_tokens=(10, 10), max_distance=0.0)
    record = prune_inputs(pristine_model, make_inputs(*PROMPTS), fixed).record
    assert record is not None
    bound = 1.001 * float(record.stats["reached"].median())
    return DCPPruner(num_tokens=(2, 30), max_distance=bound)


def counts(short: ShortInputs) -> list[int]:
    assert short.record is not None
    return [after for _, after in short.record.tokens_per_image]


def test_the_record_tells_how_many_each_image_keeps(
    pristine_model: Any, make_inputs: MakeInputs, ragged: DCPPruner
) -> None:
    short = prune_inputs(pristine_model, make_inputs(*PROMPTS), ragged)
    record = short.record
    assert record is not None
    assert len(set(counts(short))) > 1
    assert record.tokens_after == max(counts(short))
    placeholders = (short.tensors["input_ids"] == IMAGE_ID).sum(dim=1).tolist()
    assert placeholders == [counts(short)[0], sum(counts(short)[1:]), 0]
    assert list(short.lengths) == counts(short)
    assert record.stats["reached"].shape == (3,)
    assert ragged.max_distance is not None
    assert (record.stats["reached"] < ragged.max_distance).all()


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_logits_equal_a_full_run_with_the_dropped_columns_masked(
    pristine_model: Any, make_inputs: MakeInputs, ragged: DCPPruner, padding_side: str
) -> None:
    inputs = make_inputs(*PROMPTS, padding_side=padding_side)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    short = prune_inputs(pristine_model, inputs, ragged)
    assert short.columns is not None
    assert short.record is not None
    assert short.features is not None
    features = torch.zeros(3, N, short.features.shape[-1])
    for image, length in enumerate(counts(short)):
        features[image, short.record.indices[image, :length]] = short.features[image, :length]
    columns = short.columns.clamp(min=0)
    mask = torch.zeros_like(inputs["attention_mask"]).scatter_add(1, columns, (short.columns >= 0).long()).clamp(max=1)
    embeddings = pristine_model.get_input_embeddings()(inputs["input_ids"])
    places = (inputs["input_ids"] == IMAGE_ID).unsqueeze(-1)
    with torch.no_grad():
        logits = pristine_model(**short.inputs).logits
        oracle = pristine_model(
            inputs_embeds=embeddings.masked_scatter(places, features),
            attention_mask=mask * inputs["attention_mask"],
            position_ids=((mask * inputs["attention_mask"]).cumsum(1) - 1).clamp(min=0),
        ).logits
    oracle = oracle.gather(1, columns.unsqueeze(-1).expand(-1, -1, oracle.shape[-1]))
    real = short.tensors["attention_mask"].bool()
    torch.testing.assert_close(logits[real], oracle[real], rtol=1e-4, atol=2e-5)


def test_a_row_equals_the_fixed_budget_of_its_number(
    pristine_model: Any, make_inputs: MakeInputs, ragged: DCPPruner
) -> None:
    for seed in range(3):
        inputs = make_inputs(PROMPTS[0], seeds=[seed])
        short = prune_inputs(pristine_model, inputs, ragged)
        fixed = prune_inputs(pristine_model, inputs, DCPPruner(num_tokens=counts(short)[0]))
        assert torch.equal(short.tensors["input_ids"], fixed.tensors["input_ids"])
        assert short.features is not None
        assert fixed.features is not None
        torch.testing.assert_close(short.features, fixed.features)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_a_batch_generates_what_its_rows_do_alone(
    model: Any, make_inputs: MakeInputs, ragged: DCPPruner, options: dict[str, Any]
) -> None:
    rows = options.get("num_return_sequences", 1)
    with prune(model, ragged) as handle:
        together = model.generate(**make_inputs(*PROMPTS), max_new_tokens=5, **options)[:, -5:]
        assert handle.last is not None
        assert len({after for _, after in handle.last.tokens_per_image}) > 1
        for row, (prompt, seeds) in enumerate(zip(PROMPTS, ([0], [1, 2], []), strict=True)):
            alone = model.generate(**make_inputs(prompt, seeds=seeds), max_new_tokens=5, **options)[:, -5:]
            assert torch.equal(together[row * rows : (row + 1) * rows], alone)


def test_a_range_that_reaches_all_tokens_only_warns_where_all_are_kept(
    pristine_model: Any, make_inputs: MakeInputs, ragged: DCPPruner
) -> None:
    inputs = make_inputs(PROMPTS[0])
    some = DCPPruner(num_tokens=(2, 10 * N), max_distance=ragged.max_distance)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = prune_inputs(pristine_model, inputs, some)
    assert counts(short) == counts(prune_inputs(pristine_model, inputs, ragged))
    with pytest.warns(UserWarning, match="nothing was pruned"):
        whole = prune_inputs(pristine_model, inputs, DCPPruner(num_tokens=(N, 10 * N), max_distance=0.1))
    assert whole.columns is None
