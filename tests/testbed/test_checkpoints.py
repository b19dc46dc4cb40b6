"""The shipped checkpoints: plain transformers loads them, they see, and 16 random tokens are not enough for them."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.evaluate import evaluate
from dcp_prune.eval.specs import Method, plan
from dcp_prune.testbed.card import card
from dcp_prune.testbed.load import CHECKPOINTS, WEIGHTS, checkpoint_path, load, prompt
from dcp_prune.testbed.natural_card import card as natural_card
from dcp_prune.testbed.seeds import TUNING
from dcp_prune.testbed.world import TASKS
from dcp_prune.testbed.worlds import world_of


def test_the_weights_fit_into_a_wheel():
    sizes = [file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()]
    assert max(sizes) < 48e6
    assert sum(sizes) < 68e6


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_plain_transformers_loads_it_and_generates_an_answer(checkpoint):
    path = checkpoint_path(checkpoint)
    model: Any = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    scene = world_of(checkpoint).make_scene(TUNING[0])
    asked = next(q for q in scene.questions if q.text == "what does the sign say ?")
    inputs = processor(images=[scene.image], text=[prompt(asked.text)], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 576
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == asked.answer


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_it_answers_with_all_tokens_and_loses_with_16_random_ones(checkpoint):
    model, processor = load(checkpoint)
    methods = (*plan(["none"], [576]), *plan(["dcp", "random"], [16]))
    assert isinstance(methods[0], Method)
    everything, dcp, random = evaluate(
        model, processor, methods, TUNING, 140, difficulty="crowded", checkpoint=checkpoint
    ).answers
    assert everything.correct.mean() > (0.75 if checkpoint == "natural" else 0.93)
    assert random.correct.mean() < everything.correct.mean() - 0.25
    assert dcp.correct.mean() > random.correct.mean() + (0.05 if checkpoint == "natural" else 0.2)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_card_says_what_was_measured(checkpoint):
    record = json.loads((checkpoint_path(checkpoint) / "training.json").read_text())
    if checkpoint == "natural":
        assert (checkpoint_path(checkpoint) / "README.md").read_text() == natural_card(record)
        assert record["measured"]["standard"]["accuracy"]["all"] >= 0.85
        return
    assert (checkpoint_path(checkpoint) / "README.md").read_text() == card(record)
    for measured in record["measured"].values():
        assert measured["accuracy"]["all"] >= 0.95
        assert min(measured["accuracy"][task] for task in TASKS) >= 0.90
        low, high = (0.70, 0.88) if checkpoint == "weak" else (0.95, 1.0)
        assert low <= measured["auc"] <= high


def test_an_unknown_checkpoint_is_refused_with_the_known_ones():
    with pytest.raises(InvalidInputError, match="choose one of natural, weak"):
        load("strong")
