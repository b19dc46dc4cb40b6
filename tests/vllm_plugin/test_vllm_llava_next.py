"""LLaVA-NeXT inside vLLM: images of many sizes, each with its own number of visual tokens."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Engine, Question, Reference, difference
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.vllm.images import ImagePruner
from dcp_prune.integrations.vllm.request import ImageRequest, to_inputs
from dcp_prune.integrations.vllm.settings import Settings
from dcp_prune.registry import get_pruner, make_pruner
from dcp_prune.tokens import Signal
from tiny_llava import IMAGE_SIZE, make_image

Start = Callable[..., Engine]
CLOSE = 1e-4
MOST = 90
"""Budget of the engine: above what the smallest image has, below what the others have."""
SMALL, WIDE, LONG, TALL, LARGE = SIZES = ((80, 84), (75, 160), (80, 250), (250, 84), (150, 170))
"""(height, width) of pictures of 2, 3, 4, 4 and 5 tiles."""
RIVALS = ("mmtok", "visionzip")


def ask_about(size: tuple[int, int], words: str = "what colour is the dog", num_tokens: int | None = None) -> Question:
    height, width = size
    return Question(f"<image> {words}", (make_image(height + width).resize((width, height)),), num_tokens)


@pytest.fixture(scope="module")
def reference(checkpoints: dict[str, Path]) -> Reference:
    return Reference(checkpoints["next"])


@pytest.fixture
def engine(start: Start) -> Engine:
    return start("next", num_tokens=MOST)


@pytest.fixture
def stock(start: Start) -> Engine:
    return start("next")


def count_tokens(engine: Engine, size: tuple[int, int]) -> tuple[int, int]:
    info: Any = MULTIMODAL_REGISTRY.create_processor(engine.llm.model_config).info
    return info.count_tokens(ImageSize(width=size[1], height=size[0]), {})


def tiles_of(engine: Engine, size: tuple[int, int]) -> torch.Tensor:
    (count,) = engine.model.make_adapter().count_tiles([size], {})
    return torch.zeros(count, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_the_process_that_reads_prompts_counts_what_the_adapter_lays_out(engine: Engine) -> None:
    sides = (1, 2, 7, 40, 83, 84, 85, 99, 168, 169, 251, 252, 253, 400, 1023)
    sizes = [(height, width) for height in sides for width in sides]
    adapter, info = engine.model.make_adapter(), MULTIMODAL_REGISTRY.create_processor(engine.llm.model_config).info
    pixels = [tiles_of(engine, size) for size in sizes]
    assert {len(tiles) for tiles in pixels} == {2, 3, 4, 5}
    layouts = adapter.layouts({"pixel_values": pixels, "image_sizes": torch.tensor(sizes)})
    for size, layout in zip(sizes, layouts, strict=True):
        counted = info.count_tokens(ImageSize(width=size[1], height=size[0]), {})
        assert counted == (len(layout), sum(layout.tile_lengths)), size


def test_prompts_get_shorter_by_the_dropped_tokens_and_small_images_stay_as_in_stock_vllm(
    engine: Engine, stock: Engine
) -> None:
    for size in SIZES:
        n, _ = count_tokens(engine, size)
        (whole,), (pruned,) = stock.ask(ask_about(size)), engine.ask(ask_about(size))
        assert whole.prompt_tokens - pruned.prompt_tokens == max(0, n - MOST), size
        if n <= MOST:
            assert size == SMALL
            assert difference(whole, pruned) == 0.0
    assert engine.encoded_images == len(SIZES) - 1  # the small one was left to stock vLLM


@pytest.mark.parametrize("num_tokens", [MOST, 3, 1])
def test_logprobs_equal_those_of_transformers(engine: Engine, reference: Reference, num_tokens: int) -> None:
    for size in (WIDE, TALL, LARGE):
        question = ask_about(size, num_tokens=num_tokens)
        (answer,) = engine.ask(question)
        expected = reference.ask(question, make_pruner("dcp", num_tokens=num_tokens))
        assert answer.prompt_tokens == expected.prompt_tokens
        assert difference(answer, expected) < CLOSE


@pytest.mark.parametrize("name", ["dcp_progressive", *RIVALS])
def test_logprobs_of_other_pruners_equal_those_of_transformers(start: Start, reference: Reference, name: str) -> None:
    engine = start("next", num_tokens=16, pruner=name)
    questions = [ask_about(size) for size in (WIDE, LONG, LARGE)]
    for question, answer in zip(questions, engine.ask(*questions), strict=True):
        expected = reference.ask(question, make_pruner(name, num_tokens=16))
        assert answer.prompt_tokens == expected.prompt_tokens
        assert difference(answer, expected) < CLOSE


def test_one_of_the_rivals_reads_the_question() -> None:
    assert [Signal.TEXT in get_pruner(name).requires for name in RIVALS] == [True, False]


def test_a_batch_of_sizes_and_budgets_equals_one_by_one(engine: Engine, stock: Engine) -> None:
    asked = [(LARGE, None), (SMALL, None), (WIDE, 16), (TALL, 2), (SMALL, 16), (LONG, MOST), (LARGE, 16)]
    questions = [ask_about(size, num_tokens=budget) for size, budget in asked]
    together = engine.ask(*questions)
    for question, answer in zip(questions, together, strict=True):
        engine.forget()
        (alone,) = engine.ask(question)
        assert alone.prompt_tokens == answer.prompt_tokens
        assert difference(alone, answer) < CLOSE
    (whole,) = stock.ask(ask_about(SMALL))
    assert together[1].prompt_tokens == whole.prompt_tokens
    assert difference(whole, together[1]) < CLOSE


def test_a_budget_between_patches_and_newlines_keeps_all_patches(engine: Engine) -> None:
    n, patches = count_tokens(engine, SMALL)
    assert patches < n <= MOST
    answers = engine.ask(*(ask_about(SMALL, num_tokens=budget) for budget in (n, n - 1, patches, patches - 1)))
    before = answers[0].prompt_tokens
    assert [before - answer.prompt_tokens for answer in answers] == [0, n - patches, n - patches, n - patches + 1]


def test_two_questions_about_one_image_get_the_answers_they_get_alone(engine: Engine, reference: Reference) -> None:
    questions = [ask_about(LARGE, words, 16) for words in ("what colour is the dog", "where is the red cat here")]
    answers = [engine.ask(question)[0] for question in questions]
    assert engine.encoded_images == 1
    expected = [reference.ask(question, make_pruner("dcp", num_tokens=16)) for question in questions]
    for answer, own in zip(answers, expected, strict=True):
        assert difference(answer, own) < CLOSE
    other = reference.ask(questions[1], make_pruner("uniform", num_tokens=16))  # wrong tokens would be seen
    assert other.ids != answers[1].ids or difference(answers[1], other) > 100 * CLOSE


def test_two_images_of_one_prompt_are_read_with_their_own_words(engine: Engine, reference: Reference) -> None:
    images = (*ask_about(WIDE).images, *ask_about(LARGE).images)  # of 3 and 5 tiles: one is padded
    question = Question("<image> what is here <image> what colour is the cat", images, 16)
    (answer,) = engine.ask(question)
    expected = reference.ask(question, make_pruner("dcp", num_tokens=16), text_scope="own")
    assert answer.prompt_tokens == expected.prompt_tokens
    assert difference(answer, expected) < CLOSE


def test_the_encoder_never_sees_more_tiles_at_once_than_images_are_allowed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = engine.model, []
    pruner = ImagePruner(Settings(num_tokens=16, max_images_per_batch=7), model.make_adapter(), model.embed_words, None)
    sizes = [WIDE, TALL, LARGE, SMALL, SMALL]
    images = {"pixel_values": [tiles_of(engine, size) for size in sizes], "image_sizes": torch.tensor(sizes)}
    walk = type(pruner.adapter.tower).walk  # type: ignore[attr-defined]
    monkeypatch.setattr(
        type(pruner.adapter.tower),  # type: ignore[attr-defined]
        "walk",
        lambda self, pixels, *args: seen.append(len(pixels)) or walk(self, pixels, *args),
    )
    requests = [ImageRequest.of(16, (5,), str(image)) for image in range(len(sizes))]
    with torch.inference_mode():
        kept = pruner(images, pruner.adapter.layouts(images), requests)
    assert [len(each) for each in kept] == [16] * 5
    assert seen == [7, 7, 2]


def test_sizes_that_do_not_fit_the_tiles_are_refused(engine: Engine) -> None:
    model, tiles = engine.model, tiles_of(engine, LARGE)

    def embed(num_tokens: int, **images: Any) -> None:
        with torch.inference_mode():
            model.embed_multimodal(**images, **to_inputs([ImageRequest.of(num_tokens, (5,), "a")]))

    with pytest.raises(InvalidInputError, match=r"image_sizes for each, got shape .* and none"):
        embed(16, pixel_values=tiles.unsqueeze(0))
    with pytest.raises(InvalidInputError, match="cut into 5 tiles, but pixel_values hold 3"):
        embed(16, pixel_values=tiles[:3].unsqueeze(0), image_sizes=torch.tensor([LARGE]))
    n, patches = count_tokens(engine, LARGE)
    for wrong in (patches + 1, n + 1):
        with pytest.raises(InvalidInputError, match=f"holds {wrong} visual tokens for an image that has {n}"):
            embed(wrong, pixel_values=[tiles], image_sizes=torch.tensor([LARGE]))
