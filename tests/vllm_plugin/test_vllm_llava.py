"""LLaVA-1.5 inside vLLM: the same answers as in transformers, whatever is cached, batched or cut into chunks."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import Engine, Question, Reference, answers_to, difference
from PIL import Image

from dcp_prune.eval.data.testbed import TestbedQuestions
from dcp_prune.eval.evaluate import evaluate
from dcp_prune.eval.specs import plan
from dcp_prune.integrations.vllm import processor as vllm_processor
from dcp_prune.registry import make_pruner
from dcp_prune.testbed.language import prompt
from dcp_prune.testbed.seeds import HELD_OUT, TUNING
from dcp_prune.testbed.world import make_scene

N, K = 576, 16
CLOSE = 5e-4  # of log-probabilities down to -30, in float32 with other kernels
Start = Callable[..., Engine]

SCENES = [make_scene(seed, "crowded") for seed in range(TUNING.start, TUNING.start + 6)]
IMAGES = [Image.fromarray(scene.image) for scene in SCENES]


def ask_about(scene: int, number: int, num_tokens: int | None = None) -> Question:
    return Question(prompt(SCENES[scene].questions[number].text), (IMAGES[scene],), num_tokens)


@pytest.fixture(scope="module")
def reference(checkpoints: dict[str, Path]) -> Reference:
    return Reference(checkpoints["testbed"])


@pytest.fixture
def engine(start: Start) -> Engine:
    return start("testbed", num_tokens=K)


def test_the_prompt_gets_shorter_by_exactly_the_dropped_tokens(start: Start, engine: Engine) -> None:
    question = ask_about(0, 0)
    (whole,), (pruned,) = start("testbed").ask(question), engine.ask(question)
    assert whole.prompt_tokens - pruned.prompt_tokens == N - K


@pytest.mark.parametrize("number", range(4))
def test_logprobs_equal_those_of_transformers_with_the_same_pruner(
    engine: Engine, reference: Reference, number: int
) -> None:
    question = ask_about(1, number)
    (answer,) = engine.ask(question)
    expected = reference.ask(question, make_pruner("dcp", num_tokens=K))
    assert answer.prompt_tokens == expected.prompt_tokens
    assert difference(answer, expected) < CLOSE


def test_held_out_questions_are_answered_as_in_transformers(engine: Engine, reference: Reference) -> None:
    source = TestbedQuestions(HELD_OUT, "crowded", limit=20, checkpoint="weak")
    _, answers = answers_to(engine, source)
    methods = plan(["dcp"], [K])
    expected = evaluate(
        reference.model,
        reference.processor,
        methods,
        HELD_OUT,
        source.questions,
        difficulty="crowded",
        checkpoint="weak",
    )
    assert [answer.ids[0] for answer in answers] == expected.answers[0].words.tolist()
    assert engine.encoded_images == source.images


def test_two_questions_about_one_image_get_the_answers_they_get_alone(engine: Engine, reference: Reference) -> None:
    questions = [ask_about(2, 0), ask_about(2, 5)]
    for question in questions:
        (answer,) = engine.ask(question)
        assert difference(answer, reference.ask(question, make_pruner("dcp", num_tokens=K))) < CLOSE
    assert engine.encoded_images == 1  # the second question finds the image encoded
    assert engine.model.image_pruner.cache.hits == 1


def test_a_cache_key_of_the_image_alone_would_give_the_second_question_the_tokens_of_the_first(
    engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_processor, "cache_key", lambda image, fingerprint, request: image)
    first, second = ask_about(2, 0), ask_about(2, 5)
    engine.ask(first)
    (answer,) = engine.ask(second)
    expected = reference.ask(second, make_pruner("dcp", num_tokens=K))
    assert answer.ids != expected.ids or difference(answer, expected) > 100 * CLOSE


def test_a_repeated_question_comes_from_the_prefix_cache(start: Start) -> None:
    engine = start("testbed", num_tokens=64)
    question = ask_about(3, 1)
    (first,), encoded = engine.ask(question), engine.encoded_images
    (again,) = engine.ask(question)
    assert first.cached_tokens == 0
    assert again.cached_tokens >= 64
    assert engine.encoded_images == encoded
    assert difference(first, again) < CLOSE


def test_a_batch_of_images_questions_and_budgets_equals_one_by_one(engine: Engine) -> None:
    questions = [ask_about(*each) for each in ((0, 0, None), (1, 7, 16), (2, 3, 8), (3, 11, 16), (4, 5, 4))]
    together = engine.ask(*questions)
    assert engine.encoded_images == 5
    for question, answer in zip(questions, together, strict=True):
        engine.forget()
        (alone,) = engine.ask(question)
        assert alone.prompt_tokens == answer.prompt_tokens
        assert difference(alone, answer) < CLOSE


def test_a_smaller_budget_equals_transformers_with_that_budget(engine: Engine, reference: Reference) -> None:
    question = ask_about(4, 2, num_tokens=5)
    (answer,) = engine.ask(question)
    expected = reference.ask(question, make_pruner("dcp", num_tokens=5))
    assert answer.prompt_tokens == expected.prompt_tokens
    assert difference(answer, expected) < CLOSE


@pytest.mark.parametrize("asked", [K + 1, 0, "many", True])
def test_a_budget_above_the_servers_is_refused_and_the_engine_lives_on(engine: Engine, asked: Any) -> None:
    with pytest.raises(ValueError, match=rf"num_tokens={asked!r}, but an image may have 1 to {K} visual tokens"):
        engine.ask(ask_about(0, 0, num_tokens=asked))
    assert engine.ask(ask_about(0, 0))[0].prompt_tokens


def test_a_chunk_border_inside_an_image_changes_nothing(start: Start, reference: Reference) -> None:
    chunked = start("testbed", num_tokens=40, max_num_batched_tokens=32, max_num_seqs=2, enable_chunked_prefill=True)
    question = ask_about(5, 4)
    (answer,) = chunked.ask(question)
    assert answer.prompt_tokens > 40
    assert difference(answer, reference.ask(question, make_pruner("dcp", num_tokens=40))) < CLOSE


def test_a_budget_of_all_tokens_changes_no_bit(start: Start) -> None:
    question = ask_about(0, 3)
    (whole,), (pruned,) = start("testbed").ask(question), start("testbed", num_tokens=N).ask(question)
    assert whole.prompt_tokens == pruned.prompt_tokens
    assert difference(whole, pruned) == 0.0


def conversation(turns: int) -> Question:
    """Turn by turn: a question about an image, one about a second image, one more about that."""
    texts = [SCENES[0].questions[1].text, SCENES[1].questions[2].text, SCENES[1].questions[6].text]
    parts = [f"USER: {'<image> ' if turn < 2 else ''}{text} ASSISTANT:" for turn, text in enumerate(texts[:turns])]
    return Question(" yes</s>".join(parts), tuple(IMAGES[: min(turns, 2)]))


def test_images_of_earlier_turns_stay_as_they_were_chosen(start: Start, reference: Reference) -> None:
    engine = start("testbed", num_tokens=64)
    answers = [engine.ask(conversation(turns))[0] for turns in (1, 2, 3)]
    assert engine.encoded_images == 2
    assert engine.model.image_pruner.cache.lookups == 2  # the third turn asks the encoder for nothing
    assert answers[1].cached_tokens >= 64
    assert answers[2].cached_tokens >= 128
    first = reference.ask(conversation(1), make_pruner("dcp", num_tokens=64))
    assert difference(answers[0], first) < CLOSE
    for turns, answer in ((2, answers[1]), (3, answers[2])):
        engine.forget()
        (uncached,) = engine.ask(conversation(turns))
        assert difference(answer, uncached) < CLOSE


def test_without_words_in_the_key_one_selection_serves_all_questions(start: Start, reference: Reference) -> None:
    engine = start("testbed", num_tokens=64, text_scope="none")
    engine.ask(ask_about(2, 0))
    (answer,) = engine.ask(ask_about(2, 5))
    assert engine.encoded_images == 1
    assert answer.cached_tokens >= 64
    blind = reference.ask(ask_about(2, 5), make_pruner("dcp", num_tokens=64, text_weight=0.0))
    assert answer.prompt_tokens == blind.prompt_tokens


def test_the_scope_of_the_whole_prompt_lets_a_later_turn_choose_anew(start: Start) -> None:
    engine = start("testbed", num_tokens=64, text_scope="prompt")
    for turns in (1, 2):
        engine.ask(conversation(turns))
    pruner = engine.model.image_pruner
    assert (pruner.cache.lookups, pruner.cache.hits, engine.encoded_images) == (3, 1, 2)
