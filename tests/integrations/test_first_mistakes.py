"""First steps in Python: what people write at first works, or is refused in one sentence that shows the way."""

from __future__ import annotations

from typing import Any

import pytest

import dcp_prune
from dcp_prune import DCPPruner, InvalidInputError, UniformPruner, UnknownPrunerError, get_handle, make_pruner, prune
from tiny_llava import build_model, build_processor, make_image


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model()


def test_a_pruner_can_be_given_by_name_with_its_options(model):
    with prune(model, "dcp") as handle:
        assert handle.pruner == make_pruner("dcp", num_tokens=16)
    with prune(model, "dcp", num_tokens=4, text_weight=0.5) as handle:
        assert handle.pruner == make_pruner("dcp", num_tokens=4, text_weight=0.5)
        assert dcp_prune.get_handle(model) is handle
    assert get_handle(model) is None


@pytest.mark.parametrize(
    ("pruner", "options", "error", "said"),
    [
        ("dpc", {}, UnknownPrunerError, "did you mean dcp"),
        (DCPPruner, {}, InvalidInputError, r"got the class DCPPruner; write DCPPruner\(num_tokens=16\)"),
        (16, {}, InvalidInputError, "got a int"),
        (UniformPruner(num_tokens=4), {"num_tokens": 8}, InvalidInputError, "num_tokens: options are for a pruner"),
    ],
)
def test_what_is_no_pruner_is_refused_and_nothing_is_attached(model, pruner, options, error, said):
    with pytest.raises(error, match=said):
        prune(model, pruner, **options)
    assert get_handle(model) is None


def test_a_part_of_the_processor_in_its_place_is_refused_when_it_is_given(model):
    processor: Any = build_processor()
    for part in (processor.tokenizer, processor.image_processor, "llava-hf/llava-1.5-7b-hf"):
        with pytest.raises(InvalidInputError, match="wants the model's processor"):
            prune(model, "dcp", processor=part)
    assert get_handle(model) is None
    inputs = processor(images=[make_image(1)], text=["<s> USER: <image> what is"], return_tensors="pt")
    with prune(model, "dcp", num_tokens=8, processor=processor):
        model.generate(**inputs, max_new_tokens=1)


def test_a_record_is_printed_in_five_lines_that_say_what_happened(model):
    processor: Any = build_processor()
    inputs = processor(images=[make_image(1)], text=["<s> USER: <image> what is"], return_tensors="pt")
    with prune(model, "dcp", num_tokens=8) as handle:
        model.generate(**inputs, max_new_tokens=1)
        said = repr(handle.last).splitlines()
        assert handle.last is not None
    assert len(said) == 5
    assert said[0] == "PruneRecord of 1 image(s)"
    assert (
        f"8 of {handle.last.tokens_before}; prompt: {handle.last.prompt_after} of {handle.last.prompt_before}"
        in said[2]
    )
    assert f"{float(handle.last.kappa[0]):.3g}" in said[3]


def test_a_generate_that_others_wrapped_prunes_no_more_once_the_handle_is_gone():
    model: Any = build_model()
    processor: Any = build_processor()
    inputs = processor(images=[make_image(1)], text=["<s> USER: <image> what is"], return_tensors="pt")
    ids, logits = model.generate(**inputs, max_new_tokens=4), model(**inputs).logits
    calls = []
    with prune(model, "uniform", num_tokens=4) as handle:
        inner = model.generate

        def traced(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return inner(*args, **kwargs)

        model.generate = traced
        model.generate(**inputs, max_new_tokens=4)
        assert handle.last is not None
        with pytest.raises(InvalidInputError, match="already prunes"):
            prune(model, "uniform", num_tokens=8)
    assert get_handle(model) is None
    assert model.generate is traced
    handle.last = None
    assert (model.generate(**inputs, max_new_tokens=4) == ids).all()
    assert (model(**inputs).logits == logits).all()
    assert handle.last is None
    assert len(calls) == 2
