"""The testbed as a LLaVA-NeXT: the same weights, tiles that show the right pixels, and the evaluation's shortcuts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.asking.runner import Question, Runner
from dcp_prune.eval.evaluate import evaluate
from dcp_prune.eval.specs import plan
from dcp_prune.integrations.transformers import prune_inputs
from dcp_prune.models import get_adapter
from dcp_prune.registry import make_pruner
from dcp_prune.testbed.load import load, prompt
from dcp_prune.testbed.model import PIXEL_MEAN, PIXEL_STD
from dcp_prune.testbed.seeds import TUNING
from dcp_prune.testbed.tiles import TILED_GRID, load_tiled, with_tiles
from dcp_prune.testbed.world import PATCH, Scene, make_scene


@pytest.fixture(scope="module")
def tiled() -> tuple[Any, Any]:
    return load_tiled("weak")


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene(TUNING[0], "crowded", TILED_GRID)


@pytest.fixture(scope="module")
def inputs(tiled: tuple[Any, Any], scene: Scene) -> Any:
    return tiled[1](images=[scene.image], text=[prompt("what does the sign say ?")], return_tensors="pt")


def test_weights_are_those_of_the_checkpoint_and_separators_are_zero(tiled: tuple[Any, Any]) -> None:
    plain, weights = load("weak")[0].state_dict(), tiled[0].state_dict()
    assert not weights.pop("model.image_newline").any()
    assert weights.keys() == plain.keys()
    assert all(torch.equal(weights[name], plain[name]) for name in plain)


def test_a_picture_becomes_an_overview_and_four_tiles_with_a_separator_behind_each_row(
    tiled: tuple[Any, Any], inputs: Any
) -> None:
    (layout,) = get_adapter(tiled[0]).layouts(inputs)
    assert inputs["pixel_values"].shape == (1, 5, 3, 192, 192)
    assert layout.tile_lengths == (576,) * 5
    assert int((inputs["input_ids"] == tiled[0].config.image_token_id).sum()) == len(layout) == 2880 + TILED_GRID


def test_boxes_of_tokens_name_the_pixels_that_their_patches_show(
    tiled: tuple[Any, Any], inputs: Any, scene: Scene
) -> None:
    (layout,) = get_adapter(tiled[0]).layouts(inputs)
    pixels = inputs["pixel_values"][0].permute(0, 2, 3, 1).numpy() * PIXEL_STD + PIXEL_MEAN
    picture = scene.image / 255
    rng = np.random.default_rng(0)
    for token in rng.choice((layout.source >= 0).nonzero().squeeze(1), 200, replace=False):
        tile, patch = divmod(int(layout.source[token]), layout.tile_size)
        row, col = (PATCH * place for place in divmod(patch, layout.grid[1]))
        shown = pixels[tile, row : row + PATCH, col : col + PATCH]
        top, left, bottom, right = (len(picture) * layout.boxes[token]).round().int().tolist()
        there = picture[top:bottom, left:right]
        if tile == 0:
            assert there.shape == (2 * PATCH, 2 * PATCH, 3)
            assert np.abs(shown.mean((0, 1)) - there.mean((0, 1))).max() < 0.04  # halving the picture blurs its edges
        else:
            np.testing.assert_allclose(shown, there, atol=1e-6)


def test_kept_tokens_of_the_sign_read_it_without_the_rest_of_the_picture(
    tiled: tuple[Any, Any], inputs: Any, scene: Scene
) -> None:
    model, processor = tiled
    record = prune_inputs(model, inputs, make_pruner("divprune", num_tokens=40), processor=processor).record
    assert record is not None
    centres = (record.boxes(0)[:, :2] + record.boxes(0)[:, 2:]) / 2 * TILED_GRID
    sign = scene.sign_patches()
    on_sign = [tile > 0 and sign[int(y), int(x)] for tile, (y, x) in zip(record.tiles(0), centres, strict=True)]
    assert any(on_sign), "farthest points find what stands out, where the record says it is"


def test_the_language_model_reads_all_tiles_and_is_lost_among_them_with_the_positions_of_the_training(
    scene: Scene, tiled: tuple[Any, Any]
) -> None:
    def right(model: Any, processor: Any) -> int:
        (answers,) = evaluate(
            model, processor, plan(["none"], [1]), TUNING, 14, difficulty="crowded", grid=TILED_GRID, checkpoint="weak"
        ).answers
        assert answers.num_tokens == 2880
        return int(answers.correct.sum())

    assert right(*tiled) >= right(*load_tiled("weak", rope_theta=None)) + 2


def test_answers_are_those_of_the_models_own_prompt(tiled: tuple[Any, Any], scene: Scene) -> None:
    model, processor = tiled
    methods = plan(["none", "uniform"], [20])
    asked = [
        Question(f"{slot}", 0, question.text, prompt(question.text))
        for slot, question in enumerate(scene.questions[:2])
    ]
    everything, few = Runner(model, processor, methods).run([scene.image], asked)
    generated = list(Runner(model, processor, methods, max_new_tokens=1).run([scene.image], asked))
    assert [each.answers for each in generated] == [everything.answers, few.answers]
    for number, question in enumerate(asked[:1]):
        inputs = processor(images=[Image.fromarray(scene.image)], text=[question.prompt], return_tensors="pt")
        with torch.inference_mode():
            assert int(model(**inputs).logits[0, -1].argmax()) == everything.words[number]
            short = prune_inputs(model, inputs, make_pruner("uniform", num_tokens=20), processor=processor)
            assert int(model(**short.inputs).logits[0, -1].argmax()) == few.words[number]


def test_what_is_no_llava_is_refused(tiled: tuple[Any, Any]) -> None:
    with pytest.raises(InvalidInputError, match="this is a LlavaNextForConditionalGeneration"):
        with_tiles(*tiled)
