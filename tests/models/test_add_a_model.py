"""The adapter that docs/how-to/add-a-model.md shows works as it stands there, brought by another package."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Gemma3, make_picture
from transformers import Gemma3ForConditionalGeneration

from dcp_prune.errors import MissingSignalError, UnsupportedModelError
from dcp_prune.integrations.transformers import prune, prune_inputs
from dcp_prune.models import adapter_class, base, get_adapter, supported_architectures
from dcp_prune.models.gemma3 import Gemma3Adapter
from dcp_prune.registry import make_pruner

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "add-a-model.md"
PROMPTS = ("USER: <image> what is this ASSISTANT:", "USER: <image> where <image> is the cat")
FAMILY = Gemma3()


class FooForConditionalGeneration(Gemma3ForConditionalGeneration):
    """A model that the project does not know."""


@pytest.fixture(autouse=True)
def foreign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[EntryPoint]]:
    """Entry points as if another package were installed; what the page shows is its module `foo_pruning`."""
    points: list[EntryPoint] = []
    monkeypatch.setattr(base, "entry_points", lambda **chosen: EntryPoints(points).select(**chosen))
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)[0]
    (tmp_path / "foo_pruning.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "foo_pruning", raising=False)
    base._foreign_adapters.cache_clear()
    yield points
    base._foreign_adapters.cache_clear()


@pytest.fixture
def foo() -> Any:
    model = copy.deepcopy(FAMILY.model)
    model.__class__ = FooForConditionalGeneration
    return model


def register(points: list[EntryPoint], name: str, target: str) -> None:
    points.append(EntryPoint(name, target, base.ENTRY_POINT_GROUP))
    base._foreign_adapters.cache_clear()


def page_entry_point() -> tuple[str, str]:
    """Name and target that the page registers."""
    found = re.search(r'adapters"\]\n(\w+) = "([\w:]+)"', PAGE.read_text())
    assert found is not None
    return found[1], found[2]


def test_the_adapter_of_the_page_prunes_as_that_of_the_project(foreign: list[EntryPoint], foo: Any) -> None:
    register(foreign, *page_entry_point())
    inputs = FAMILY.make_inputs(PROMPTS, [make_picture(seed, (90, 110)) for seed in range(3)])
    assert type(get_adapter(foo)).__name__ == "FooAdapter"
    for name in ("dcp", "visionzip"):
        pruner = make_pruner(name, num_tokens=6)
        found, expected = prune_inputs(foo, inputs, pruner), prune_inputs(FAMILY.model, inputs, pruner)
        assert found.features is not None
        assert expected.features is not None
        assert torch.equal(found.features, expected.features)
        assert torch.equal(found.tensors["input_ids"], expected.tensors["input_ids"])
    with prune(foo, make_pruner("dcp", num_tokens=6)):
        assert foo.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    with pytest.raises(MissingSignalError, match="its encoder has no"):
        prune_inputs(foo, inputs, make_pruner("flowcut", num_tokens=6))


def test_an_adapter_of_another_package_is_listed_and_imported_only_when_asked_for(foreign: list[EntryPoint]) -> None:
    name, target = page_entry_point()
    register(foreign, name, target)
    assert name in supported_architectures()
    assert "foo_pruning" not in sys.modules
    assert adapter_class(name).architecture == name


def test_without_an_entry_point_a_subclass_is_found_by_its_parent(foo: Any) -> None:
    assert type(get_adapter(foo)) is Gemma3Adapter


def test_a_tower_in_brackets_goes_before_the_class_alone(foreign: list[EntryPoint], foo: Any) -> None:
    name, target = page_entry_point()
    register(foreign, name, "foo_pruning:Gone")
    register(foreign, f"{name}({foo.config.vision_config.model_type})", target)
    assert type(get_adapter(foo)).__name__ == "FooAdapter"


def test_built_in_names_cannot_be_replaced(foreign: list[EntryPoint]) -> None:
    register(foreign, "Gemma3ForConditionalGeneration", page_entry_point()[1])
    assert type(get_adapter(FAMILY.model)) is Gemma3Adapter


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("foo_gone:FooAdapter", r"'foo_gone:FooAdapter', which cannot be imported: No module named"),
        ("foo_pruning:Gone", r"'foo_pruning:Gone', which cannot be imported: .+ has no attribute"),
        ("foo_pruning:Tower", r"'foo_pruning:Tower', which is not a subclass of ModelAdapter; correct"),
    ],
)
def test_an_entry_point_that_leads_to_no_adapter_is_named(
    foreign: list[EntryPoint], foo: Any, target: str, sentence: str
) -> None:
    register(foreign, "FooForConditionalGeneration", target)
    with pytest.raises(
        UnsupportedModelError, match=f"the adapter of FooForConditionalGeneration is registered as {sentence}"
    ):
        get_adapter(foo)
