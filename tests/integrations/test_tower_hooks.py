"""Hooks that others hung on the vision tower: called as without pruning, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import prune_inputs
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import make_pruner

MakeInputs = Callable[..., dict[str, Any]]


def own_features(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(tuple(model.get_image_features(inputs["pixel_values"]).pooler_output))


def brighten(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (given[0] * 3, *given[1:])


def steer(module: Any, given: Any, output: Any) -> Any:
    output.hidden_states = tuple(states.flip(1) for states in output.hidden_states)
    return output


@pytest.mark.parametrize("change", ["pixels", "hidden states"])
def test_a_hook_that_changes_something_changes_the_pruned_features(
    model: Any, make_inputs: MakeInputs, change: str
) -> None:
    inputs, pruner = make_inputs("<image> what is this"), make_pruner("uniform", num_tokens=8)
    plain = prune_inputs(model, inputs, pruner)
    tower = model.model.vision_tower
    if change == "pixels":
        tower.register_forward_pre_hook(brighten)
    else:
        tower.register_forward_hook(steer)
    hooked = prune_inputs(model, inputs, pruner)
    assert hooked.features is not None
    assert plain.features is not None
    assert hooked.record is not None
    kept = hooked.record.indices.unsqueeze(-1).expand_as(hooked.features)
    assert torch.equal(hooked.features, own_features(model, inputs).gather(1, kept))
    assert not torch.allclose(hooked.features, plain.features)


@pytest.mark.parametrize("where", ["", "encoder", "encoder.layers.2"])
def test_a_hook_is_called_once(model: Any, make_inputs: MakeInputs, where: str) -> None:
    inputs, pruner = make_inputs("<image> what is this"), make_pruner("cls_attention", num_tokens=8)
    plain = prune_inputs(model, inputs, pruner)
    calls: list[Any] = []
    model.model.vision_tower.get_submodule(where).register_forward_hook(lambda *given: calls.append(given))
    hooked = prune_inputs(model, inputs, pruner)
    assert len(calls) == 1
    assert plain.record is not None
    assert hooked.record is not None
    assert torch.equal(hooked.record.indices, plain.record.indices)
    assert torch.equal(hooked.features, plain.features)  # type: ignore[arg-type]


def test_tokens_dropped_inside_a_tower_that_has_to_run_as_a_whole_are_refused(
    model: Any, make_inputs: MakeInputs
) -> None:
    model.model.vision_tower.encoder.register_forward_pre_hook(lambda *given: None)
    with pytest.raises(InvalidInputError, match="hooks on its encoder, which run only where it runs as a whole"):
        prune_inputs(model, make_inputs("<image> what"), make_pruner("dcp_progressive", num_tokens=8))


def test_what_transformers_hangs_on_layers_to_collect_outputs_is_no_hook(
    model: Any, make_inputs: MakeInputs, pruner: Pruner
) -> None:
    inputs = make_inputs("<image> what is this")
    plain = prune_inputs(model, inputs, pruner)
    with torch.no_grad():
        model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in model.model.vision_tower.modules()), "this test needs such hooks"
    assert torch.equal(prune_inputs(model, inputs, pruner).features, plain.features)  # type: ignore[arg-type]
