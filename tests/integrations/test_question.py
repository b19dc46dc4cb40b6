"""Which words ask about an image, and what a text-aware pruner gets to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import prune, prune_inputs
from dcp_prune.integrations.transformers.prompt import locate_images
from dcp_prune.integrations.transformers.question import (
    embed_words,
    last_turn,
    turn_marks,
    words_behind_all,
    words_behind_each,
)
from dcp_prune.models import lookup_vectors
from dcp_prune.registry import make_pruner
from tiny_llava import IMAGE_ID, build_processor

MakeInputs = Callable[..., dict[str, Any]]

IMAGE, TEXT_AWARE = 4, make_pruner("mmtok", num_tokens=8)


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def words_of(prompt: Tensor) -> Tensor:
    return prompt > IMAGE


def test_a_question_is_what_follows_the_last_image() -> None:
    prompt = ids([0, 1, 7, 4, 8, 4, 9, 9], [1, 4, 4, 8, 9, 5, 0, 0])
    found = words_behind_all(words_of(prompt), prompt == IMAGE)
    assert [row[mask].tolist() for row, mask in zip(prompt, found, strict=True)] == [[9, 9], [8, 9, 5]]


def test_a_prompt_that_ends_with_the_image_asks_with_all_its_words() -> None:
    prompt = ids([1, 8, 9, 4, 4, 0])
    assert words_behind_all(words_of(prompt), prompt == IMAGE).tolist() == [[False, True, True, False, False, False]]


def test_each_image_has_the_words_up_to_the_next_and_touching_images_share_theirs() -> None:
    prompt = ids([1, 4, 4, 8, 9, 4, 4, 4, 4, 7, 6], [0, 5, 4, 4, 0, 0, 0, 0, 0, 0, 0])
    rows, places = locate_images(prompt, IMAGE, [2, 2, 2, 2])
    found = words_behind_each(words_of(prompt), prompt == IMAGE, rows, places)
    asked = [prompt[row][mask].tolist() for row, mask in zip(rows.tolist(), found, strict=True)]
    assert asked == [[8, 9], [7, 6], [7, 6], [5]]


TEMPLATES = {
    "llava": "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}{{ c['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}",
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{{ c['text'] }}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


class Bare:
    """A processor with nothing but a tokenizer of bytes and a chat template."""

    def __init__(self, template: str) -> None:
        alphabet = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}
        backend = Tokenizer(BPE(alphabet, []))
        backend.pre_tokenizer = ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        backend.decoder = ByteLevelDecoder()  # type: ignore[assignment]
        self.tokenizer: Any = PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=template, additional_special_tokens=["<|im_start|>", "<|im_end|>"]
        )
        self.chat_template = template

    def apply_chat_template(self, turns: list[Any], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(turns, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answered", [True, False])
def test_the_last_turn_is_found_in_any_template_and_tokenizer(name: str, answered: bool) -> None:
    processor = Bare(TEMPLATES[name])
    spoken = ["what is this?", "a dog", "and the user: where is it?"]
    turns = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in zip(("user", "assistant", "user"), spoken, strict=True)
    ]
    written = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=answered)
    tokens = processor.tokenizer.tokenize(written)
    start, end = last_turn(tokens, *turn_marks(processor))
    found = processor.tokenizer.convert_tokens_to_string(tokens[start:end]).replace("<|im_end|>", "").strip()
    assert found == spoken[-1]


def test_a_template_without_turns_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="choose another text_scope"):
        turn_marks(Bare("{{ messages[-1]['content'][0]['text'] }}"))


def read_by(model: Any, inputs: dict[str, Any], **options: Any) -> list[list[float]]:
    """First coordinate of the embedded words that a pruner is given, image by image."""
    seen: list[Any] = []

    class Spy(type(TEXT_AWARE)):
        def prune(self, tokens: Any, k: int) -> Any:
            seen.append(tokens)
            return super().prune(tokens, k)

    prune_inputs(model, inputs, Spy(num_tokens=8), **options)
    return [
        row[mask][:, 0].tolist() for tokens in seen for row, mask in zip(tokens.text, tokens.text_mask, strict=True)
    ]


def embedded(model: Any, processor: Any, *texts: str) -> list[list[float]]:
    table = model.get_input_embeddings().weight[:, 0]
    return [table[processor.tokenizer(text, add_special_tokens=False)["input_ids"]].tolist() for text in texts]


SCOPES: list[tuple[Any, list[str]]] = [
    ("after_image", ["where is the cat"] * 2),
    ("own", ["what is this", "where is the cat"]),
    ("all", ["two dog what is this where is the cat"] * 2),
    (lambda prompt, real: real & (torch.arange(prompt.shape[1]) < 3), ["two dog"] * 2),
]


@pytest.mark.parametrize(("scope", "expected"), SCOPES, ids=["after_image", "own", "all", "callable"])
def test_every_scope_reads_its_words(
    model: Any, make_inputs: MakeInputs, processor: Any, scope: Any, expected: list[str]
) -> None:
    inputs = make_inputs("two dog <image> what is this <image> where is the cat", seeds=[1, 2])
    assert read_by(model, inputs, text_scope=scope) == embedded(model, processor, *expected)


def test_the_space_of_the_first_layer_is_what_a_pruner_reads(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs("<image> what is this <image> where is the cat", seeds=[1, 2])
    words = [model.get_input_embeddings().weight[row[row > IMAGE]] for row in inputs["input_ids"]]
    looked = lookup_vectors(model, words[0][-4:].unsqueeze(0))[0, :, 0].tolist()
    assert read_by(model, inputs, text_space="lookup")[1] == pytest.approx(looked, rel=1e-4)
    assert read_by(model, inputs)[1] != pytest.approx(looked, rel=1e-4)
    with prune(model, TEXT_AWARE, text_space="lookup") as handle:
        model.generate(**inputs, max_new_tokens=1)
    expected = prune_inputs(model, inputs, TEXT_AWARE, text_space="lookup").record
    assert expected is not None
    assert handle.last.indices.tolist() == expected.indices.tolist()


def test_the_last_turn_is_read_without_role_words(model: Any, make_inputs: MakeInputs, processor: Any) -> None:
    inputs = make_inputs("USER: <image> what is this ASSISTANT: dog USER: where is the cat ASSISTANT:", seeds=[1])
    read = read_by(model, inputs, text_scope="last_turn", processor=processor)
    assert read == embedded(model, processor, "where is the cat")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("blue", ["blue"] * 3),
        (["blue", "red cat"], ["blue", "blue", "red cat"]),
        ([["blue", "two"], "red cat"], ["blue", "two", "red cat"]),
    ],
)
def test_a_question_may_be_given_for_all_for_each_prompt_or_for_each_image(
    model: Any, make_inputs: MakeInputs, processor: Any, text: Any, expected: list[str]
) -> None:
    inputs = make_inputs("<image> what <image> where", "<image> what", seeds=[1, 2, 3])
    assert read_by(model, inputs, text=text, processor=processor) == embedded(model, processor, *expected)


def test_a_handle_reads_its_text_until_it_is_taken_away(model: Any, make_inputs: MakeInputs, processor: Any) -> None:
    inputs = make_inputs("<image> what is this", seeds=[1])

    def kept(handle: Any) -> list[int]:
        model.generate(**inputs, max_new_tokens=1)
        return handle.last.indices[0].tolist()

    with prune(model, TEXT_AWARE, processor=processor) as handle:
        own = kept(handle)
        handle.text = "red red red"
        other = kept(handle)
        handle.text = None
        assert kept(handle) == own
    expected = prune_inputs(model, inputs, TEXT_AWARE, processor=processor, text="red red red").record
    assert expected is not None
    assert other == expected.indices[0].tolist()
    assert other != own


def test_in_a_conversation_each_image_keeps_what_its_own_question_asks(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs("<image> what is this ASSISTANT: dog USER: <image> where is the cat", seeds=[1, 2])
    short = prune_inputs(model, inputs, TEXT_AWARE, text_scope="own")
    alone = [
        prune_inputs(model, make_inputs(prompt, seeds=[seed]), TEXT_AWARE)
        for prompt, seed in (("<image> what is this ASSISTANT: dog USER:", 1), ("<image> where is the cat", 2))
    ]
    assert short.record is not None
    assert short.record.indices.tolist() == [each.record.indices[0].tolist() for each in alone if each.record]


BAD: list[tuple[Callable[[Any], dict[str, Any]], str]] = [
    (lambda processor: {"text_scope": "before"}, "text_scope must be one of after_image, own, last_turn, all or a"),
    (lambda processor: {"text_scope": "last_turn"}, "'last_turn' needs processor="),
    (lambda processor: {"text_scope": lambda prompt, real: real[:, 1:]}, "must return a bool tensor of the shape"),
    (lambda processor: {"text": "blue"}, "no processor"),
    (lambda processor: {"text": ["a", "b"], "processor": processor}, r"2 question\(s\) for 1 prompt"),
    (lambda processor: {"text": [["a"]], "processor": processor}, r"1 question\(s\) for a prompt with 2 image"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD)
def test_what_cannot_be_read_is_refused(
    model: Any,
    make_inputs: MakeInputs,
    processor: Any,
    options: Callable[[Any], dict[str, Any]],
    sentence: str,
) -> None:
    inputs = make_inputs("<image> what <image> where", seeds=[1, 2])
    with pytest.raises(InvalidInputError, match=sentence):
        prune_inputs(model, inputs, TEXT_AWARE, **options(processor))


def test_the_tiny_processor_marks_turns() -> None:
    assert turn_marks(build_processor()) == ("USER:", "ASSISTANT:")
    assert IMAGE_ID == IMAGE


def test_a_placeholder_beyond_the_last_embedding_is_never_looked_up():
    class Model:
        def get_input_embeddings(self) -> torch.nn.Embedding:
            return torch.nn.Embedding(10, 4)

    ids = torch.tensor([[10, 3, 4], [10, 10, 5]])
    asked = embed_words(Model(), ids, ids < 10, torch.device("cpu"))
    assert asked["text_mask"] is not None
    assert asked["text_mask"].tolist() == [[True, True], [True, False]]
