"""The toy model that every test shares."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest

# Tiny models gain nothing by threads, and on a busy machine each parallel operator waits for the slowest of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for processes that tests start

from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tiny_llava import build_model, build_processor, make_image


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a claim about all pairs of families and pruners, or of families and ways to run, `make test` takes every n-th
    pair, so that each of both sides meets several of the other; the rest is slow."""
    seen: dict[tuple[Any, str], list[Any]] = {}
    for item in items:
        marker = item.get_closest_marker("crossed")
        if marker is None:
            continue
        given: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
        place = marker.kwargs.get("offset", 0)
        for name in marker.args:
            values = seen.setdefault((item.function, name), [])  # type: ignore[attr-defined]
            if given[name] not in values:
                values.append(given[name])
            place += values.index(given[name])
        if place % marker.kwargs["every"] and not any(given[name] in marker.kwargs.get("always", ()) for name in given):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def pristine_model() -> LlavaForConditionalGeneration:
    """Shared by the whole session: never change it, take `model` to do so."""
    return build_model()


@pytest.fixture
def model(pristine_model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    return copy.deepcopy(pristine_model)


@pytest.fixture(scope="session")
def deep_model() -> LlavaForConditionalGeneration:
    """With 10 layers in the vision tower, whose attention is far from even; shared by the session: never change it."""
    model = build_model(vision_layers=10)
    tower: Any = model.model.vision_tower
    for layer in tower.encoder.layers:
        layer.self_attn.q_proj.weight.data.mul_(20.0)
    return model


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    return build_processor()


@pytest.fixture(scope="session")
def make_inputs(processor: Any) -> Callable[..., dict[str, Any]]:
    """`make_inputs("<image> what is this", ...)`: one prompt per argument; images are numbered through the batch."""

    def make(*prompts: str, padding_side: str = "left", seeds: Sequence[int] | None = None) -> dict[str, Any]:
        count = sum(prompt.count("<image>") for prompt in prompts)
        images = [make_image(seed) for seed in (range(count) if seeds is None else seeds)]
        batch = processor(
            text=list(prompts), images=images or None, return_tensors="pt", padding=True, padding_side=padding_side
        )
        return dict(batch)

    return make
