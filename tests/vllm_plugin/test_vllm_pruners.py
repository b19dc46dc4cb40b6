"""Every pruner inside vLLM chooses what it chooses in transformers, and what cannot work is refused at the start."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Engine, Question, Reference, difference
from PIL import Image
from prometheus_client import REGISTRY

from dcp_prune.errors import MissingSignalError, NonFiniteError
from dcp_prune.integrations.transformers import prune_inputs
from dcp_prune.integrations.vllm.images import ImagePruner
from dcp_prune.integrations.vllm.request import ImageRequest
from dcp_prune.integrations.vllm.settings import Settings
from dcp_prune.registry import get_pruner, list_pruners, make_pruner
from dcp_prune.tokens import Signal
from tiny_llava import NUM_TOKENS, make_image

K = 9
Start = Callable[..., Engine]
PROMPT = "<image> what colour is the dog here"
IN_ENCODER = {"dcp_progressive": {}, "flowcut": {}, "dcp": {"schedule": [[2, 24], [5, 12]], "recovery": 0.5}}
"""Pruners that drop tokens inside the encoder, and options that make one do so."""
NAMES = [name for name in list_pruners() if get_pruner(name).text_space == "embeddings"]
CASES = [(name, {}) for name in NAMES] + [(name, options) for name, options in IN_ENCODER.items() if options]


@pytest.fixture(scope="module")
def engine(start: Start) -> Engine:
    return start("deep", num_tokens=K)


@pytest.fixture(scope="module")
def reference(checkpoints: dict[str, Path]) -> Reference:
    return Reference(checkpoints["deep"])


def kept_in_vllm(engine: Engine, settings: Settings, inputs: Any, requests: list[ImageRequest]) -> list[torch.Tensor]:
    model = engine.model
    pruner = ImagePruner(settings, model.make_adapter(), model.embed_words, None)
    return ask_pruner(pruner, inputs, requests)


def ask_pruner(pruner: ImagePruner, inputs: Any, requests: list[ImageRequest]) -> list[torch.Tensor]:
    images = {"pixel_values": inputs["pixel_values"]}
    with torch.inference_mode():
        return pruner(images, pruner.adapter.layouts(images), requests)


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda case: str(case)[:20])
def test_every_pruner_keeps_the_tokens_that_it_keeps_in_transformers(
    engine: Engine, reference: Reference, name: str, options: dict[str, Any]
) -> None:
    settings = Settings(num_tokens=K, pruner=name, options=options)
    images = [make_image(seed) for seed in range(3)]
    inputs = reference.processor(text=[PROMPT] * 3, images=images, return_tensors="pt")
    words = tuple(reference.processor.tokenizer(PROMPT.removeprefix("<image> "))["input_ids"])
    requests = [ImageRequest.of(K, words, str(image)) for image in range(3)]
    if get_pruner(name).requires & {Signal.CLIP_SIMILARITY}:
        with pytest.raises(MissingSignalError, match="which such checkpoints do not hold"):
            kept_in_vllm(engine, settings, inputs, requests)
        return
    kept = kept_in_vllm(engine, settings, inputs, requests)
    with torch.no_grad():
        expected = prune_inputs(
            reference.model, dict(inputs), make_pruner(name, num_tokens=K, **options), processor=reference.processor
        )
    features = expected.features
    assert features is not None
    for image, one in enumerate(kept):
        assert (one - features[image]).abs().max() < 1e-4 * features[image].abs().max()


def test_images_are_encoded_in_small_batches_and_repeats_only_once(engine: Engine, reference: Reference) -> None:
    images = [make_image(seed) for seed in range(5)]
    inputs = reference.processor(text=[PROMPT] * 5, images=images, return_tensors="pt")
    requests = [ImageRequest.of(4 + image, (5, 6 + image), str(image)) for image in range(5)]
    small, whole = (
        kept_in_vllm(engine, Settings(num_tokens=K, max_images_per_batch=size), inputs, requests) for size in (2, 16)
    )
    for one, other in zip(small, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_cache_of_encoded_images_is_bounded_and_can_be_switched_off(engine: Engine, reference: Reference) -> None:
    model = engine.model
    inputs = reference.processor(text=[PROMPT], images=[make_image(0)], return_tensors="pt")
    asked = [ImageRequest.of(K, (5,), "a")]
    counts = []
    for size in (0, 1):
        pruner = ImagePruner(
            Settings(num_tokens=K, stage1_cache_mb=size), model.make_adapter(), model.embed_words, None
        )
        first, second = (ask_pruner(pruner, inputs, asked)[0] for _ in range(2))
        assert torch.equal(first, second)
        assert pruner.cache.size <= size * 10**6
        counts.append(pruner.encoded_images)
    assert counts == [2, 1]


def test_numbers_of_pruning_are_counted(start: Start) -> None:
    def read(name: str) -> float:
        return REGISTRY.get_sample_value(f"dcp_prune:{name}") or 0.0

    names = ("visual_tokens_before_total", "visual_tokens_after_total", "pruned_images_total", "kappa_count")
    names += ("stage1_lookups_total", "stage1_hits_total", "select_milliseconds_count")
    engine = start("deep", num_tokens=K)
    before = [read(name) for name in names]
    image = make_image(7)
    for words in ("what is this", "where is the cat"):
        engine.ask(Question(f"<image> {words}", (image,)), steps=1)
    assert [read(name) - was for name, was in zip(names, before, strict=True)] == [
        2 * NUM_TOKENS, 2 * K, 2, 2, 2, 1, 2
    ]  # fmt: skip


def test_the_profile_run_of_vllm_is_not_counted(start: Start) -> None:
    engine = start("deep", num_tokens=K)
    assert (engine.model.image_pruner.cache.lookups, len(engine.model.image_pruner.cache)) == (0, 0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pruner": "cdpruner"}, "which such checkpoints do not hold"),
        ({"pruner": "dpc"}, "did you mean dcp"),
        ({"max_images_per_batch": 0}, "max_images_per_batch must be a whole number of at least 1"),
        ({"options": {"schedule": [[9, 20]]}}, "choose a layer of at most"),
        ({"compilation_config": {"cudagraph_mm_encoder": True}}, "replays the vision encoder without the pruner"),
        ({"mm_encoder_only": True, "enable_prefix_caching": False}, "leaves out the language model, whose word embedd"),
        ({"enable_lora": True, "enable_tower_connector_lora": True}, "use adapters of the language model only"),
        ({"mm_processor_kwargs": {"num_tokens": 4}}, "set it as num_tokens of dcp_prune"),
    ],
)
def test_engines_that_could_not_prune_do_not_start(start: Start, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Exception, match=sentence):
        start("deep", num_tokens=K, **options)


@pytest.mark.parametrize("name", ["dcp", "flowcut", "dcp_progressive"])
def test_an_image_without_finite_features_costs_its_own_request_only(
    start: Start, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    def breaks_on_white(_: Any, args: Any, hidden: torch.Tensor) -> torch.Tensor:
        white = args[0].flatten(1).amin(dim=1) > 1.5
        return hidden.masked_fill(white[:, None, None], torch.nan)

    engine = start("deep", num_tokens=K, pruner=name)
    good = [Question(PROMPT, (make_image(seed),)) for seed in range(2)]
    broken = Question(PROMPT, (Image.new("RGB", make_image(0).size, "white"),))
    expected = engine.ask(*good)
    engine.forget()
    hook = engine.model.vision_tower.vision_model.embeddings.register_forward_hook(breaks_on_white)
    try:
        first, senseless, second = engine.ask(good[0], broken, good[1])
        (after,) = engine.ask(good[0])
    finally:
        hook.remove()
    assert senseless.logprobs.isnan().any()
    assert "NaN or inf, so no selection is meaningful" in caplog.text
    for answer, alone in ((first, expected[0]), (second, expected[1]), (after, expected[0])):
        assert difference(answer, alone) < 1e-4


def test_a_model_that_gives_no_finite_features_of_a_made_up_picture_is_broken(engine: Engine) -> None:
    size = engine.model.config.vision_config.image_size
    inputs = {"pixel_values": torch.full((1, 3, size, size), torch.nan)}
    with pytest.raises(NonFiniteError):
        kept_in_vllm(engine, Settings(num_tokens=K), inputs, [ImageRequest.of(K, (), None)])


def test_encoded_images_must_have_as_many_rows_as_the_budget(start: Start, engine: Engine) -> None:
    width = engine.model.config.text_config.hidden_size
    served = start("deep", num_tokens=K, enable_mm_embeds=True)
    for rows in (NUM_TOKENS, K):
        prompt: Any = {"prompt": PROMPT, "multi_modal_data": {"image": torch.zeros(1, rows, width)}}
        if rows == K:
            served.llm.generate([prompt], use_tqdm=False)
        else:
            with pytest.raises(ValueError, match=f"image_embeds have {rows} rows, but an image has {K} visual tokens"):
                served.llm.generate([prompt], use_tqdm=False)


def test_the_plugin_is_found_by_its_entry_point() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="dcp_prune")
    found.load()()  # again: each process of vLLM may call it more than once
