"""Ways to run that meet what is special about a family: its caches, masks, positions and parameters of its own."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from families import FAMILIES, SIZES, Family, Qwen2VL, make_picture
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import prune, prune_inputs
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


def answers(model: Any, inputs: dict[str, Any], budget: int = 5, **options: Any) -> tuple[Tensor, Tensor]:
    """Ids of prompt and answer, and the tokens that were kept."""
    with prune(model, make_pruner("dcp", num_tokens=budget)) as handle:
        ids = generate(model, inputs, **options)
        assert handle.last is not None
        return ids, handle.last.indices


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    # A placeholder in the answer, which a trained model does not give, would ask for an image.
    silent = {"suppress_tokens": [model.config.image_token_id], "do_sample": False}
    return model.generate(**inputs, **silent, max_new_tokens=5, **options)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.crossed("family", "way", every=2)
@pytest.mark.parametrize("way", ["static cache", "no cache", "prompt lookup", "assistant"])
def test_a_way_to_generate_changes_no_answer(family: Family, way: str) -> None:
    inputs = family.make_inputs(["where <image> is the cat and where is the"], [make_picture(0, SIZES[0])])
    options = {
        "static cache": {"cache_implementation": "static"},
        "no cache": {"use_cache": False},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
        "assistant": {"assistant_model": copy.deepcopy(family.model)},
    }
    model = copy.deepcopy(family.model)
    if way in ("prompt lookup", "assistant") and not family.adapter.checks_candidates:
        with pytest.raises(InvalidInputError, match="leave out prompt_lookup_num_tokens and assistant_model"):
            answers(model, inputs, **options[way])
        return
    assert_same(answers(model, inputs, **options[way]), answers(model, inputs))


@pytest.mark.crossed("family", every=2, offset=1)
def test_questions_on_copies_of_one_cache_equal_each_from_scratch(family: Family) -> None:
    if family.name == "paligemma":
        pytest.skip("its images see the whole prompt, so no question can come later")
    model, picture = copy.deepcopy(family.model), make_picture(0, SIZES[0])
    prefix, *turns = (
        family.make_inputs([f"where <image> is {words}".strip()], [picture])
        for words in ("", "the cat", "this two dog")
    )
    with prune(model, make_pruner("uniform", num_tokens=5)) as handle, torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**prefix, past_key_values=cache)
        for turn in turns:
            expected = generate(model, turn)
            record = handle.last
            text = {name: value for name, value in turn.items() if name not in family.adapter.image_inputs}
            assert torch.equal(generate(model, text, past_key_values=copy.deepcopy(cache)), expected)
            assert handle.last is record, "no image was pruned again"


@pytest.mark.crossed("family", every=2, offset=0)
def test_rows_of_a_reordered_cache_go_on_as_they_do_unedited(family: Family, inputs: dict[str, Any]) -> None:
    model = copy.deepcopy(family.model)
    counted = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    placed = {} if isinstance(family, Qwen2VL) else counted  # which lays tokens along three axes by itself
    placeholders = [model.config.image_token_id, getattr(model.config, "video_token_id", model.config.image_token_id)]

    def greedy(rows: list[int]) -> Tensor:
        output = model(**inputs, **placed, use_cache=True)
        cache, mask, scores = output.past_key_values, inputs["attention_mask"][rows], output.logits[rows, -1]
        cache.reorder_cache(torch.tensor(rows))
        found = []
        for _ in range(3):
            scores[:, placeholders] = -torch.inf  # in an answer, one would ask for an image
            found.append(scores.argmax(dim=-1, keepdim=True))
            mask = torch.cat((mask, torch.ones_like(found[-1])), dim=1)
            extra = {"token_type_ids": torch.zeros_like(found[-1])} if "token_type_ids" in inputs else {}
            scores = model(input_ids=found[-1], past_key_values=cache, attention_mask=mask, **extra).logits[:, -1]
        return torch.cat(found, dim=1)

    with prune(model, make_pruner("uniform", num_tokens=5)), torch.no_grad():
        plain = greedy([0, 1])
        for rows in ([1, 0], [1], [0, 0, 1]):
            assert torch.equal(greedy(rows), plain[rows])


@pytest.mark.crossed("family", every=2, offset=0)
def test_hooks_on_the_whole_tower_see_what_they_see_unpruned(family: Family, inputs: dict[str, Any]) -> None:
    model = copy.deepcopy(family.model)
    expected = answers(model, inputs)
    attentive = make_pruner("cls_attention", num_tokens=5)
    by_attention = prune_inputs(model, inputs, attentive).record
    seen: list[tuple[Any, ...]] = []

    def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        pixels = given[0] if given else named["pixel_values"]
        seen.append((len(given), pixels, output.last_hidden_state))

    tower: Any = family.adapter.tower.module
    names = {module: name for name, module in family.model.named_modules()}
    model.get_submodule(names[tower]).register_forward_hook(look, with_kwargs=True)
    assert_same(answers(model, inputs), expected)
    pruned, seen = seen, []
    found = prune_inputs(model, inputs, attentive).record
    assert found is not None
    assert by_attention is not None
    assert torch.equal(found.indices, by_attention.indices)
    if family.modality == "video":
        return  # whose frames the model itself takes in other batches
    seen.clear()
    with torch.no_grad():
        model(**inputs)
    assert len(pruned) == len(seen) == 1
    assert pruned[0][0] == seen[0][0], "by place or by name, as the model does it"
    for one, other in zip(pruned[0][1:], seen[0][1:], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.crossed("family", every=2, offset=0)
def test_three_threads_do_not_disturb_each_other(family: Family) -> None:
    batches = [
        family.make_inputs([f"where <image> is the {word}"], [make_picture(number, SIZES[number])])
        for number, word in enumerate(("cat", "dog", "colour"))
    ]
    model = copy.deepcopy(family.model)
    with prune(model, make_pruner("dcp", num_tokens=5)):
        expected = [generate(model, inputs) for inputs in batches]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda number: generate(model, batches[number % 3]), range(9)))
    assert all(torch.equal(ids, expected[number % 3]) for number, ids in enumerate(found))


@pytest.mark.crossed("family", every=2, offset=1)
def test_gradient_checkpointing_changes_no_loss(family: Family, inputs: dict[str, Any]) -> None:
    model = copy.deepcopy(family.model).train()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    with prune(model, make_pruner("dcp", num_tokens=5)):
        loss = model(**inputs, labels=labels).loss
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        checkpointed = model(**inputs, labels=labels).loss
        checkpointed.backward()
    torch.testing.assert_close(checkpointed, loss)
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.crossed("family", every=2, offset=0)
def test_adapters_of_peft_answer_like_the_merged_model(family: Family, inputs: dict[str, Any]) -> None:
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted: Any = get_peft_model(copy.deepcopy(family.model), config)
    found = answers(adapted, inputs)
    assert_same(answers(adapted.merge_and_unload(), inputs), found)


@pytest.mark.crossed("family", every=2, offset=1)
def test_offloaded_weights_give_the_same_answers(family: Family, inputs: dict[str, Any]) -> None:
    lengths = sorted(len(layout) for layout in family.adapter.layouts(inputs))
    offloaded = cpu_offload(copy.deepcopy(family.model), execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    if family.name == "idefics3":
        with pytest.raises(RuntimeError, match="meta tensor"):
            generate(offloaded, inputs)  # nor without a pruner: it moves embeddings to where its first weight is
        return
    # The larger budget keeps the smaller picture whole, with the separators that are a parameter of the model.
    for budget in {5, lengths[0] if lengths[0] < lengths[-1] else 5}:
        assert_same(answers(offloaded, inputs, budget), answers(copy.deepcopy(family.model), inputs, budget))


@pytest.mark.crossed("family", every=2, offset=0)
def test_quantised_linears_give_the_answers_of_the_same_weights_in_full(family: Family, inputs: dict[str, Any]) -> None:
    model = copy.deepcopy(family.model)
    assert replace_linears(model, nn.Linear, QuantisedLinear)
    found = answers(model, inputs)
    replace_linears(model, QuantisedLinear, lambda quantised: quantised.plain())
    assert_same(found, answers(model, inputs))
