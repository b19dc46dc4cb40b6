"""Turns of a conversation on one cache: equal to the same turns from scratch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import prune
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import make_pruner

N = 36
MakeInputs = Callable[..., dict[str, Any]]
OPTIONS = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(params=["dcp", "cls_attention", "random"])
def pruner(request: pytest.FixtureRequest) -> Pruner:
    """Pruners that do not listen to the question, which is another one once the conversation goes on."""
    deaf = {"text_weight": 0.0, "text_affinity": 0.0, "member_relevance": 0.0} if request.param == "dcp" else {}
    return make_pruner(request.param, num_tokens=8, **deaf)


def text_ids(processor: Any, text: str, rows: int = 1) -> Tensor:
    return torch.tensor([processor.tokenizer(text, add_special_tokens=False)["input_ids"]] * rows)


def second_turn(inputs: dict[str, Any], answer: Tensor, more: Tensor) -> dict[str, Any]:
    """The conversation so far and a new question, with the mask of the whole."""
    ids = torch.cat((answer, more), dim=1)
    new = torch.ones(ids.shape[0], ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.cat((inputs["attention_mask"], new), dim=1)}


def new_tokens(ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    return ids[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    "prompts",
    [
        ["USER: <image> what is this"],
        ["<image> what is the cat", "where <image> <image> is this dog", "what is the dog"],
    ],
    ids=["one row", "batch"],
)
@pytest.mark.parametrize("images_again", [False, True])
def test_a_second_turn_on_a_cache_equals_both_turns_from_scratch(
    model: Any, make_inputs: MakeInputs, processor: Any, pruner: Pruner, prompts: list[str], images_again: bool
) -> None:
    inputs = make_inputs(*prompts)
    cache = DynamicCache()
    with prune(model, pruner, processor=processor) as handle:
        answer = model.generate(**inputs, **OPTIONS, past_key_values=cache)
        length = cache.get_seq_length()
        turn = second_turn(inputs, answer, text_ids(processor, "USER: where is it ASSISTANT:", len(prompts)))
        pixels = {"pixel_values": inputs["pixel_values"]}
        record = handle.last
        continued = model.generate(**turn, **(pixels if images_again else {}), **OPTIONS, past_key_values=cache)
        assert handle.last is record, "no image is pruned twice"
        assert length < inputs["input_ids"].shape[1], "the cache holds the short prompt"
        scratch = model.generate(**turn, **pixels, **OPTIONS)
    assert torch.equal(continued, scratch)


def test_the_dictionary_output_hands_the_cache_on(model: Any, make_inputs: MakeInputs, processor: Any) -> None:
    inputs = make_inputs("<image> what is this")
    with prune(model, make_pruner("uniform", num_tokens=8)):
        first = model.generate(**inputs, **OPTIONS, return_dict_in_generate=True)
        turn = second_turn(inputs, first.sequences, text_ids(processor, "and where"))
        continued = model.generate(**turn, **OPTIONS, past_key_values=first.past_key_values)
        scratch = model.generate(**turn, pixel_values=inputs["pixel_values"], **OPTIONS)
    assert torch.equal(continued, scratch)


def test_three_turns_with_a_new_image_in_the_second(model: Any, make_inputs: MakeInputs, processor: Any) -> None:
    both = make_inputs("<image> what is this", "<image> where", seeds=[1, 2])
    first, later = make_inputs("<image> what is this", seeds=[1]), make_inputs("<image> where", seeds=[2])
    cache = DynamicCache()
    for pixels in (later["pixel_values"], both["pixel_values"]):
        cache = DynamicCache()
        with prune(model, make_pruner("uniform", num_tokens=8)) as handle:
            answer = model.generate(**first, **OPTIONS, past_key_values=cache)
            second = second_turn(first, answer, later["input_ids"])
            answer = model.generate(**second, pixel_values=pixels, **OPTIONS, past_key_values=cache)
            assert handle.last is not None
            assert handle.last.indices.shape == (1, 8), "only the new image"
            third = second_turn(second, answer, text_ids(processor, "two dog"))
            continued = model.generate(**third, **OPTIONS, past_key_values=cache)
            scratch = model.generate(**third, pixel_values=both["pixel_values"], **OPTIONS)
        assert torch.equal(continued, scratch)


def test_a_second_turn_of_new_tokens_only_needs_the_mask_of_the_whole(
    model: Any, make_inputs: MakeInputs, processor: Any
) -> None:
    inputs = make_inputs("<image> what is this")
    cache = DynamicCache()
    with prune(model, make_pruner("uniform", num_tokens=8)):
        answer = model.generate(**inputs, **OPTIONS, past_key_values=cache)
        turn = second_turn(inputs, answer, text_ids(processor, "and where"))
        # The last generated token is not in the cache yet, so it belongs to the new ones.
        tail = turn["input_ids"][:, answer.shape[1] - 1 :]
        continued = model.generate(
            input_ids=tail, attention_mask=turn["attention_mask"], **OPTIONS, past_key_values=cache
        )
        scratch = model.generate(**turn, pixel_values=inputs["pixel_values"], **OPTIONS)
    assert torch.equal(continued[:, : tail.shape[1]], tail)
    assert torch.equal(continued[:, tail.shape[1] :], new_tokens(scratch, turn))


def test_a_cache_filled_without_pruning_goes_on_as_it_is(model: Any, make_inputs: MakeInputs, processor: Any) -> None:
    inputs, later = make_inputs("<image> what is this", seeds=[1]), make_inputs("<image> where", seeds=[2])
    cache = DynamicCache()
    answer = model.generate(**inputs, **OPTIONS, past_key_values=cache)
    turn = second_turn(inputs, answer, text_ids(processor, "and where"))
    expected = model.generate(**turn, pixel_values=inputs["pixel_values"], **OPTIONS)
    with prune(model, make_pruner("uniform", num_tokens=8)) as handle:
        continued = model.generate(**turn, **OPTIONS, past_key_values=cache)
        assert handle.last is None
        assert torch.equal(continued, expected)
        turn = second_turn(turn, continued, later["input_ids"])
        before = cache.get_seq_length()
        model.generate(**turn, pixel_values=later["pixel_values"], **OPTIONS, past_key_values=cache)
        assert handle.last is not None
    # The last token of the second turn, the new prompt with 8 of 36 visual tokens, 4 new tokens but the last.
    assert cache.get_seq_length() == before + 1 + (later["input_ids"].shape[1] - N + 8) + 3


def test_another_prompt_on_a_filled_cache_is_refused(model: Any, make_inputs: MakeInputs) -> None:
    inputs, other = make_inputs("<image> what is this"), make_inputs("where <image> is what and the cat")
    cache = DynamicCache()
    with prune(model, make_pruner("uniform", num_tokens=8)):
        model.generate(**inputs, **OPTIONS, past_key_values=cache)
        with pytest.raises(InvalidInputError, match="do not begin with the prompt that is in the cache"):
            model.generate(**other, **OPTIONS, past_key_values=cache)


def test_a_cache_that_was_reset_starts_anew(model: Any, make_inputs: MakeInputs) -> None:
    inputs, other = make_inputs("<image> what is this"), make_inputs("where <image> is what and the cat")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with prune(model, make_pruner("uniform", num_tokens=8)):
        model.generate(**inputs, **OPTIONS, past_key_values=cache)
        cache.reset()
        again = model.generate(**other, **OPTIONS, past_key_values=cache)
        assert torch.equal(again, model.generate(**other, **OPTIONS))


@pytest.mark.parametrize("with_positions", [False, True])
def test_decoding_by_hand_with_the_long_mask_equals_generate(
    model: Any, make_inputs: MakeInputs, pruner: Pruner, with_positions: bool
) -> None:
    inputs = make_inputs("<image> what is the cat", "where <image> <image> is this dog", "what is the dog")

    def positions(mask: Tensor, count: int) -> dict[str, Tensor]:
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -count:]} if with_positions else {}

    with prune(model, pruner), torch.no_grad():
        expected = new_tokens(model.generate(**inputs, **OPTIONS), inputs)
        mask, found = inputs["attention_mask"], []
        output = model(**inputs, **positions(mask, mask.shape[1]))
        for _ in range(4):
            found.append(output.logits[:, -1:].argmax(dim=-1))
            mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), dim=1)
            output = model(
                input_ids=found[-1], attention_mask=mask, past_key_values=output.past_key_values, **positions(mask, 1)
            )
    assert torch.equal(torch.cat(found, dim=1), expected)
