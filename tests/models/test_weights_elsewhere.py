"""Every family with weights that cannot be read where they are: offloaded by accelerate, or quantised."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from families import FAMILIES, SIZES, Family, make_picture
from torch import Tensor, nn

from dcp_prune.integrations.transformers import prune
from dcp_prune.models import get_adapter
from dcp_prune.registry import make_pruner
from quantised import QuantisedLinear, replace_linears


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def inputs(family: Family) -> dict[str, Any]:
    """Two images of different sizes."""
    pictures = [make_picture(number, SIZES[number]) for number in range(2)]
    return family.make_inputs(["what <image> is this", "where <image> is the cat"], pictures)


def answers(model: Any, inputs: dict[str, Any], budget: int) -> tuple[Tensor, Tensor]:
    """New ids, and the tokens that were kept."""
    with prune(model, make_pruner("dcp", num_tokens=budget)) as handle:
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert handle.last is not None
        return ids, handle.last.indices


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_offloaded_weights_give_the_same_answers(family: Family, inputs: dict[str, Any]) -> None:
    lengths = sorted(len(layout) for layout in get_adapter(family.model).layouts(inputs))
    offloaded = cpu_offload(copy.deepcopy(family.model), execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    # The larger budget keeps the smaller picture whole, with the separators that are a parameter of the model.
    for budget in {5, lengths[0] if lengths[0] < lengths[-1] else 5}:
        assert_same(answers(offloaded, inputs, budget), answers(copy.deepcopy(family.model), inputs, budget))


def test_quantised_linears_give_the_answers_of_the_same_weights_in_full(family: Family, inputs: dict[str, Any]) -> None:
    model = copy.deepcopy(family.model)
    assert replace_linears(model, nn.Linear, QuantisedLinear)
    found = answers(model, inputs, 5)
    replace_linears(model, QuantisedLinear, lambda quantised: quantised.plain())
    assert_same(found, answers(model, inputs, 5))
