"""Qwen2.5-VL inside vLLM: kept tokens and the text behind them stand where they stand in transformers."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import PLACEHOLDER
from engines import Engine, Question, Reference, difference
from PIL import Image

from dcp_prune.errors import UnsupportedModelError
from dcp_prune.integrations.transformers import prune_inputs
from dcp_prune.integrations.vllm.images import ImagePruner
from dcp_prune.integrations.vllm.mrope import PrunesPositions, TruePositions, add_columns
from dcp_prune.integrations.vllm.request import ImageRequest
from dcp_prune.integrations.vllm.settings import Settings
from dcp_prune.models.layout import plain_layout
from dcp_prune.models.qwen_vl import Qwen25VLAdapter
from dcp_prune.registry import get_pruner, list_pruners, make_pruner
from dcp_prune.tokens import Signal

K = 8
CLOSE = 1e-4
CELL = 28
"""Pixels of a visual token's side."""
Start = Callable[..., Engine]


def make_picture(seed: int, rows: int, cols: int) -> Image.Image:
    """Coloured blocks, rows x cols visual tokens large."""
    blocks = torch.randint(0, 256, (5, 5, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(blocks.numpy()).resize((cols * CELL, rows * CELL), Image.Resampling.NEAREST)


TALL, WIDE, SQUARE = make_picture(0, 12, 3), make_picture(1, 4, 11), make_picture(2, 6, 6)
N = {"tall": 36, "wide": 44}
PICTURES = {"tall": TALL, "wide": WIDE}


def ask_about(words: str, *pictures: Image.Image, num_tokens: int | None = None) -> Question:
    return Question(f"{PLACEHOLDER * len(pictures)} {words}", pictures, num_tokens)


FIRST, SECOND = "what is the colour of this dog", "where is a cat and two here"


@pytest.fixture(scope="module")
def reference(checkpoints: dict[str, Path]) -> Reference:
    return Reference(checkpoints["qwen"])


@pytest.fixture
def engine(start: Start) -> Engine:
    return start("qwen", num_tokens=K)


def assert_equal(engine: Engine, reference: Reference, question: Question, pruner: Any, steps: int = 5) -> None:
    (answer,) = engine.ask(question, steps=steps)
    expected = reference.ask(question, pruner, steps=steps)
    assert answer.prompt_tokens == expected.prompt_tokens
    assert difference(answer, expected) < CLOSE


@pytest.mark.parametrize("shape", PICTURES)
def test_the_prompt_gets_shorter_by_exactly_the_dropped_tokens(start: Start, engine: Engine, shape: str) -> None:
    question = ask_about(FIRST, PICTURES[shape])
    (whole,), (pruned,) = start("qwen").ask(question), engine.ask(question)
    assert whole.prompt_tokens - pruned.prompt_tokens == N[shape] - K


@pytest.mark.parametrize("shape", PICTURES)
@pytest.mark.parametrize("pruner", ["dcp", "dcp_progressive", "mmtok"])
def test_logprobs_equal_those_of_transformers_with_the_same_pruner(
    start: Start, reference: Reference, pruner: str, shape: str
) -> None:
    engine = start("qwen", num_tokens=K, **({} if pruner == "dcp" else {"pruner": pruner}))
    assert_equal(engine, reference, ask_about(FIRST, PICTURES[shape]), make_pruner(pruner, num_tokens=K))


def as_vllm_sees(reference: Reference, *pictures: Image.Image) -> dict[str, Any]:
    """Model inputs whose pixels the encoder itself is to rescale and normalise."""
    return dict(
        reference.processor.image_processor(list(pictures), return_tensors="pt", do_rescale=False, do_normalize=False)
    )


READABLE = [
    name
    for name in list_pruners()
    if get_pruner(name).requires <= Qwen25VLAdapter.signals | {Signal.TEXT}
    and get_pruner(name).text_space == "embeddings"
]


@pytest.mark.parametrize("name", READABLE)
def test_every_pruner_keeps_the_tokens_that_it_keeps_in_transformers(
    engine: Engine, reference: Reference, name: str
) -> None:
    model, question = engine.model, ask_about(FIRST, TALL, WIDE)
    pruner = ImagePruner(Settings(num_tokens=K, pruner=name), model.make_adapter(), model.embed_words, None)
    inputs = reference.processor(text=[question.prompt], images=list(question.images), return_tensors="pt")
    words = tuple(reference.processor.tokenizer(FIRST)["input_ids"])
    with torch.inference_mode():
        images = as_vllm_sees(reference, *question.images)
        kept = pruner(images, pruner.adapter.layouts(images), [ImageRequest.of(K, words, str(n)) for n in range(2)])
        expected = prune_inputs(
            reference.model, dict(inputs), make_pruner(name, num_tokens=K), processor=reference.processor
        ).features
    assert expected is not None
    for one, other in zip(kept, expected, strict=True):
        assert (one - other).abs().max() < 1e-4 * other.abs().max()


def test_tokens_are_dropped_inside_the_encoder(start: Start) -> None:
    engine = start("qwen", num_tokens=K, pruner="dcp_progressive")
    pruner = engine.model.image_pruner
    assert all(pruner._plan(K, plain_layout(1, n)).stages for n in N.values())


def test_an_encoder_that_drops_nothing_gives_the_stock_features(engine: Engine, reference: Reference) -> None:
    model = engine.model
    images = as_vllm_sees(reference, TALL, WIDE)
    with torch.inference_mode():
        stock = model.visual(images["pixel_values"], images["image_grid_thw"].tolist())
        adapter = model.make_adapter()
        encoded = adapter.encode(images)
    walked = encoded.tokens.features[encoded.tokens.mask]
    torch.testing.assert_close(walked, stock, rtol=1e-5, atol=1e-5)


def positions_side_by_side(self: Any, tokens: Any, images: Any) -> Any:
    """As if pruned images were text."""
    return torch.arange(len(tokens)).repeat(3, 1), 0


def positions_left(self: Any, input_ids: Any, multimodal_embeddings: Any, mrope_positions: Any, **_: Any) -> Any:
    """As they were before the image was encoded."""
    features = [each[:, :-4] for each in multimodal_embeddings]
    return features, mrope_positions, int(mrope_positions[0, -1]) + 1 - mrope_positions.shape[1]


@pytest.mark.parametrize("mistakes", [("text", "tokens"), ("tokens",)], ids="-".join)
def test_positions_counted_without_the_image_would_give_other_answers(
    engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch, mistakes: tuple[str, ...]
) -> None:
    if "text" in mistakes:
        monkeypatch.setattr(TruePositions, "get_mrope_input_positions", positions_side_by_side)
    monkeypatch.setattr(TruePositions, "recompute_mrope_positions", positions_left)
    question = ask_about(FIRST, TALL)
    (answer,) = engine.ask(question)
    expected = reference.ask(question, make_pruner("dcp", num_tokens=K))
    assert answer.ids != expected.ids or difference(answer, expected) > 100 * CLOSE


def test_two_images_of_different_sizes_keep_their_places(engine: Engine, reference: Reference) -> None:
    assert_equal(engine, reference, ask_about(FIRST, TALL, WIDE), make_pruner("dcp", num_tokens=K))


def test_cached_answers_about_one_image_equal_uncached_ones(engine: Engine, reference: Reference) -> None:
    questions = [ask_about(" ".join([words] * 5), TALL) for words in (FIRST, SECOND)]
    expected = [reference.ask(question, make_pruner("dcp", num_tokens=K)) for question in questions]
    for question, one in zip(questions, expected, strict=True):
        (answer,) = engine.ask(question)
        assert difference(answer, one) < CLOSE
    assert engine.encoded_images == 1  # the second question finds the image encoded
    (again,) = engine.ask(questions[0])
    assert again.cached_tokens > K  # all of the image, whose positions nobody asks for now
    assert engine.model.image_pruner.cache.lookups == 2
    assert difference(again, expected[0]) < CLOSE


def test_a_border_of_chunks_or_cached_blocks_inside_an_image_changes_nothing(
    start: Start, reference: Reference
) -> None:
    chunked = start("qwen", num_tokens=36, max_num_batched_tokens=32, max_num_seqs=2, enable_chunked_prefill=True)
    question = ask_about(FIRST, WIDE, SQUARE)
    expected = reference.ask(question, make_pruner("dcp", num_tokens=36))
    for cached in (0, 64):  # the first image begins at token 1, the second one at token 39
        (answer,) = chunked.ask(question)
        assert answer.cached_tokens == cached
        assert difference(answer, expected) < CLOSE


def test_a_budget_of_all_tokens_changes_no_bit(start: Start) -> None:
    whole, pruned = start("qwen"), start("qwen", num_tokens=64)
    for question in (ask_about(FIRST, TALL), ask_about(SECOND, WIDE, SQUARE)):
        (stock,), (same,) = whole.ask(question), pruned.ask(question)
        assert same.prompt_tokens == stock.prompt_tokens
        assert torch.equal(same.logprobs, stock.logprobs)


def test_a_batch_of_sizes_questions_and_budgets_equals_one_by_one(engine: Engine) -> None:
    questions = [ask_about(FIRST, TALL), ask_about(SECOND, WIDE, num_tokens=3), ask_about(FIRST, SQUARE, TALL)]
    together = engine.ask(*questions)
    assert engine.encoded_images == 3  # one is in two prompts
    for question, answer in zip(questions, together, strict=True):
        engine.forget()
        (alone,) = engine.ask(question)
        assert alone.prompt_tokens == answer.prompt_tokens
        assert difference(alone, answer) < CLOSE


def test_encoded_images_have_as_many_rows_as_the_budget(start: Start) -> None:
    engine = start("qwen", num_tokens=K, enable_mm_embeds=True)
    width = engine.model.config.get_text_config().hidden_size
    for rows, grid in ((K, [1, 4, 8]), (36, [1, 24, 6])):
        image = {"image_embeds": torch.zeros(rows, width), "image_grid_thw": torch.tensor([grid])}
        prompt: Any = {"prompt": f"{PLACEHOLDER} {FIRST}", "multi_modal_data": {"image": image}}
        if rows == K:
            engine.llm.generate([prompt], use_tqdm=False)
        else:
            with pytest.raises(ValueError, match=f"image_embeds have {rows} rows, but an image has {K} visual tokens"):
                engine.llm.generate([prompt], use_tqdm=False)


def test_vllm_measures_images_of_any_size(engine: Engine) -> None:
    core = engine.llm.llm_engine.engine_core.engine_core
    with torch.inference_mode():
        core.model_executor.driver_worker.worker.model_runner.profile_run()
    assert len(engine.model.image_pruner.cache) == 0


def test_positions_of_large_images_survive_16_bits() -> None:
    rows, cols = 3, 1810
    indices = torch.tensor([0, 300, 1809, 3 * 1810 - 1])
    features = add_columns(torch.zeros(4, 2, dtype=torch.bfloat16), indices, cols)
    model: Any = SimpleNamespace(config=SimpleNamespace(image_token_id=9))
    start, behind = 2, 2 + max(rows, cols)
    before = torch.tensor([[0, 1, 2, 2, 2, 2, behind, behind + 1]]).repeat(3, 1)
    kept, after, delta = TruePositions.recompute_mrope_positions(model, [1, 2, 9, 9, 9, 9, 3, 4], [features], before, 0)
    assert kept[0].shape == (4, 2)
    assert after[1, 2:6].tolist() == [start, start, start, start + 2]
    assert after[2, 2:6].tolist() == [start, start + 300, start + 1809, start + 1809]
    assert after[0].tolist() == before[0].tolist()
    assert delta == behind + 2 - 8


@pytest.mark.parametrize(
    ("part", "value", "sentence"),
    [
        ("parallel_config", {"pipeline_parallel_size": 2}, "only the first stage learns where"),
        ("speculative_config", {}, "--speculative-config asks for positions"),
    ],
)
def test_engines_that_would_leave_positions_wrong_do_not_start(part: str, value: dict[str, Any], sentence: str) -> None:
    config = {"parallel_config": SimpleNamespace(pipeline_parallel_size=1), "speculative_config": None}
    with pytest.raises(Exception, match=sentence):
        PrunesPositions.verify_and_update_config(SimpleNamespace(**{**config, part: SimpleNamespace(**value)}))


def test_a_compiled_encoder_is_refused(start: Start) -> None:
    with pytest.raises(Exception, match="compiles the vision encoder as one"):
        start("qwen", num_tokens=K, compilation_config={"compile_mm_encoder": True})


def test_features_whose_positions_nobody_took_are_refused(engine: Engine) -> None:
    features = add_columns(torch.zeros(K, engine.model.config.get_text_config().hidden_size), torch.arange(K), 3)
    with pytest.raises(UnsupportedModelError, match="leave --worker-cls to its default"):
        engine.model.embed_input_ids(torch.zeros(K, dtype=torch.long), [features])


def test_videos_and_images_without_an_end_are_refused_and_the_engine_lives_on(engine: Engine) -> None:
    frames = np.stack([np.asarray(SQUARE)] * 2)
    about = {"fps": 1.0, "duration": 2.0, "total_num_frames": 2, "frames_indices": [0, 1], "video_backend": "opencv"}
    video = {"prompt": "<|vision_start|><|video_pad|><|vision_end|>", "multi_modal_data": {"video": [(frames, about)]}}
    with pytest.raises(ValueError, match="videos are not pruned in vLLM so far"):
        engine.llm.generate([video], use_tqdm=False)
    for prompt in ("what is <|image_pad|>", "<|image_pad|><|image_pad|> what is this"):
        with pytest.raises(ValueError, match="an image placeholder is followed by another one or by nothing"):
            engine.ask(Question(prompt, (SQUARE,) * prompt.count("pad")))
    assert engine.ask(ask_about(FIRST, SQUARE))[0].prompt_tokens
