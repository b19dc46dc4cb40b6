"""Caches that were copied, edited or rebuilt: each row goes on as the same prompt does from scratch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import prune, prune_inputs
from dcp_prune.registry import make_pruner

MakeInputs = Callable[..., dict[str, Any]]
# Rows of different lengths, padded on the left, so that their dropped columns lie at different places.
PROMPTS = ["USER: <image> what is the colour of this", "<image> where is it"]
QUESTIONS = [[5, 6, 7, 8], [11, 12, 9, 10]]


@pytest.fixture
def pruned(model: Any) -> Any:
    with prune(model, make_pruner("uniform", num_tokens=8)), torch.no_grad():
        yield model


def prefill(model: Any, inputs: dict[str, Any], cache: Any = None) -> Any:
    cache = DynamicCache() if cache is None else cache
    # `generate` counts no padding, so neither may the prefill.
    model(**inputs, past_key_values=cache, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0))
    return cache


def ask(model: Any, inputs: dict[str, Any], question: list[int], cache: Any = None, rows: Any = slice(None)) -> Tensor:
    """New tokens for the prompt with a question behind it; from scratch if there is no cache."""
    ids, mask = inputs["input_ids"][rows], inputs["attention_mask"][rows]
    more = torch.tensor([question] * len(ids))
    turn = {
        "input_ids": torch.cat((ids, more), dim=1),
        "attention_mask": torch.cat((mask, torch.ones_like(more)), dim=1),
    }
    pixels = {"pixel_values": inputs["pixel_values"][rows]} if cache is None and "pixel_values" in inputs else {}
    answer = model.generate(**turn, **pixels, past_key_values=cache, max_new_tokens=4, do_sample=False)
    return answer[:, turn["input_ids"].shape[1] :]


def rebuilt(cache: Any) -> DynamicCache:
    """A cache of one's own that holds the same tensors."""
    made = DynamicCache()
    for number, layer in enumerate(cache.layers):
        made.update(layer.keys.clone(), layer.values.clone(), number)
    return made


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "rebuilt": rebuilt,
}


@pytest.mark.parametrize("way", COPIES)
def test_many_questions_on_copies_of_one_cache_equal_each_from_scratch(
    pruned: Any, make_inputs: MakeInputs, way: str
) -> None:
    inputs = make_inputs(*PROMPTS)
    cache = prefill(pruned, inputs)
    for question in QUESTIONS:
        found = ask(pruned, inputs, question, COPIES[way](cache))
        assert torch.equal(found, ask(pruned, inputs, question))
    assert cache.get_seq_length() < inputs["input_ids"].shape[1], "the copies grew, not this one"


def test_a_copy_goes_on_under_another_handle(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    with prune(model, make_pruner("uniform", num_tokens=8)), torch.no_grad():
        cache, expected = prefill(model, inputs), ask(model, inputs, QUESTIONS[0])
    with prune(model, make_pruner("uniform", num_tokens=20)):
        assert torch.equal(ask(model, inputs, QUESTIONS[0], copy.deepcopy(cache)), expected)


def test_the_pure_function_reads_what_a_handle_wrote_on_a_cache(model: Any, make_inputs: MakeInputs) -> None:
    inputs, pruner = make_inputs(PROMPTS[0]), make_pruner("uniform", num_tokens=8)
    more = torch.tensor([QUESTIONS[0]])
    ids = torch.cat((inputs["input_ids"], more), dim=1)
    with prune(model, pruner), torch.no_grad():
        cache, expected = prefill(model, inputs), ask(model, inputs, QUESTIONS[0])
    short = prune_inputs(model, {"input_ids": ids, "past_key_values": cache}, pruner)
    answer = short.restore(model.generate(**short.inputs, max_new_tokens=4, do_sample=False))
    assert torch.equal(answer, torch.cat((ids, expected), dim=1))


def greedy(model: Any, inputs: dict[str, Any], rows: list[int], edit: Callable[[Any], Any], **told: Any) -> Tensor:
    """Four tokens by a loop of one's own that edits the cache behind the prompt."""
    output = model(**inputs, use_cache=True)
    cache = output.past_key_values
    cache = edit(cache) or cache
    mask, found = inputs["attention_mask"][rows], [output.logits[:, -1].argmax(-1, keepdim=True)[rows]]
    for _ in range(3):
        mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1)
        positions = {name: (mask.cumsum(1) - 1)[:, -1:] for name in told.get("with_positions", ())}
        output = model(input_ids=found[-1], past_key_values=cache, attention_mask=mask, **positions)
        found.append(output.logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(found, dim=1)


def index_by_hand(cache: Any, rows: list[int]) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[rows], layer.values[rows]


EDITS: dict[str, Callable[[Any, list[int]], Any]] = {
    "reorder_cache": lambda cache, rows: cache.reorder_cache(torch.tensor(rows)),
    "batch_select_indices": lambda cache, rows: cache.batch_select_indices(torch.tensor(rows)),
    "by hand": index_by_hand,
    "copied, then edited": lambda cache, rows: (twin := copy.deepcopy(cache)).reorder_cache(torch.tensor(rows)) or twin,
}


@pytest.mark.parametrize("positions", [(), ("position_ids",)], ids=["", "with positions"])
@pytest.mark.parametrize("rows", [[1, 0], [1], [1, 1, 0]], ids=str)
@pytest.mark.parametrize("edit", EDITS)
def test_rows_of_an_edited_cache_go_on_as_they_do_unedited(
    pruned: Any, make_inputs: MakeInputs, edit: str, rows: list[int], positions: tuple[str, ...]
) -> None:
    inputs = make_inputs(*PROMPTS)
    plain = greedy(pruned, inputs, [0, 1], lambda cache: None, with_positions=positions)
    assert not torch.equal(plain[0], plain[1]), "this test needs rows that differ"
    found = greedy(pruned, inputs, rows, lambda cache: EDITS[edit](cache, rows), with_positions=positions)
    assert torch.equal(found, plain[rows])


def test_a_repeated_cache_serves_several_samples_of_each_prompt(pruned: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    cache = prefill(pruned, inputs)
    cache.batch_repeat_interleave(2)
    twice = [0, 0, 1, 1]
    found = ask(pruned, inputs, QUESTIONS[0], cache, twice)
    assert torch.equal(found, ask(pruned, inputs, QUESTIONS[0])[twice])


def test_a_cache_cropped_to_its_prompt_takes_the_next_question(pruned: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    cache = prefill(pruned, inputs)
    length = cache.get_seq_length()
    for question in QUESTIONS:
        expected = ask(pruned, inputs, question)
        assert torch.equal(ask(pruned, inputs, question, cache), expected)
        cache.crop(length - cache.get_seq_length())


def test_a_crop_that_counts_dropped_columns_and_so_removes_nothing_is_noticed(
    pruned: Any, make_inputs: MakeInputs
) -> None:
    inputs = make_inputs(*PROMPTS)
    cache = prefill(pruned, inputs)
    ask(pruned, inputs, QUESTIONS[0], cache)
    cache.crop(inputs["input_ids"].shape[1])  # the length that it was given, not the one that it has
    with pytest.raises(InvalidInputError, match=r"which holds \d+ columns of it, dropped ones not counted"):
        ask(pruned, inputs, QUESTIONS[1], cache)


def test_samples_of_one_prompt_go_on_each_by_itself(pruned: Any, make_inputs: MakeInputs) -> None:
    inputs, cache = make_inputs(PROMPTS[0]), DynamicCache()
    torch.manual_seed(0)
    options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3}
    samples = pruned.generate(**inputs, **options, past_key_values=cache)
    turn = torch.cat((samples, torch.tensor([QUESTIONS[0]] * 3)), dim=1)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    scratch = pruned.generate(input_ids=turn, pixel_values=inputs["pixel_values"].repeat(3, 1, 1, 1), **greedy)
    assert torch.equal(pruned.generate(input_ids=turn, past_key_values=cache, **greedy), scratch)


def test_a_cache_cropped_into_the_text_goes_on_as_the_shorter_prompt(pruned: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    cache = prefill(pruned, inputs)
    cache.crop(-2)
    shorter = inputs | {name: inputs[name][:, :-2] for name in ("input_ids", "attention_mask")}
    assert torch.equal(ask(pruned, shorter, QUESTIONS[1], cache), ask(pruned, shorter, QUESTIONS[1]))


def test_a_cache_cropped_into_the_image_is_refused(pruned: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    cache = prefill(pruned, inputs)
    cache.crop(-6)
    with pytest.raises(InvalidInputError, match="6 columns were cropped off the prompt in this cache, more than the"):
        ask(pruned, inputs, QUESTIONS[0], cache)


def test_a_cache_whose_keys_are_not_those_of_the_prompt_is_refused(pruned: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    cache = prefill(pruned, inputs)
    for layer in cache.layers:
        layer.keys = layer.keys + 1.0
    with pytest.raises(InvalidInputError, match="holds another prompt than the one that was pruned into it"):
        ask(pruned, inputs, QUESTIONS[0], cache)


def test_rows_that_are_not_those_of_the_prompt_are_refused(pruned: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    cache = prefill(pruned, inputs)
    cache.reorder_cache(torch.tensor([0, 1, 1, 0]))
    with pytest.raises(InvalidInputError, match="holds 4 rows, which are not those of a prompt of 2"):
        ask(pruned, inputs, QUESTIONS[0], cache)


def test_a_mask_of_another_length_than_the_conversation_is_refused(pruned: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(PROMPTS[0])
    cache, width = prefill(pruned, inputs), inputs["input_ids"].shape[1]
    with pytest.raises(InvalidInputError, match=f"pass a mask of {width + 1}"):
        pruned(input_ids=torch.tensor([[5]]), past_key_values=cache, attention_mask=torch.ones(1, width + 3))


def test_a_step_with_positions_but_no_mask_lies_behind_the_short_prompt(pruned: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(PROMPTS[0])
    token, width = torch.tensor([[5]]), inputs["input_ids"].shape[1]
    plain = pruned(input_ids=token, past_key_values=prefill(pruned, inputs)).logits
    placed = pruned(input_ids=token, past_key_values=prefill(pruned, inputs), position_ids=torch.tensor([[width]]))
    torch.testing.assert_close(placed.logits, plain)


def test_a_static_cache_that_text_filled_anew_holds_no_image_any_more(model: Any, make_inputs: MakeInputs) -> None:
    inputs, text = make_inputs(PROMPTS[0]), make_inputs("where is the cat")
    cache: Any = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    expected = ask(model, text, QUESTIONS[0])
    with prune(model, make_pruner("uniform", num_tokens=8)), torch.no_grad():
        prefill(model, inputs, cache)
        cache.reset()
        model(**text, past_key_values=cache)
        assert torch.equal(ask(model, text, QUESTIONS[0], cache), expected)


def test_a_cache_that_does_not_show_its_keys_goes_on_where_no_row_can_be_taken_for_another(
    pruned: Any, make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcp_prune.integrations.transformers.cache._first_keys", lambda *given: None)
    one = make_inputs(PROMPTS[0])
    found = ask(pruned, one, QUESTIONS[0], copy.deepcopy(prefill(pruned, one)))
    assert torch.equal(found, ask(pruned, one, QUESTIONS[0]))
    two = make_inputs(*PROMPTS)
    cache = prefill(pruned, two)
    with pytest.raises(InvalidInputError, match="or rows that nobody can tell apart"):
        ask(pruned, two, QUESTIONS[0], cache)
