"""Training behind a frozen encoder: cached features, stages that learn, a finished model that transformers loads."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Dinov2Config, Dinov2Model, LlavaForConditionalGeneration

from dcp_prune.errors import InvalidInputError
from dcp_prune.testbed import features as cache
from dcp_prune.testbed import train_natural
from dcp_prune.testbed.features import Features, encode_all, training_scene
from dcp_prune.testbed.natural_card import describe
from dcp_prune.testbed.train_natural import RECIPE, Muon, export, pack_questions, train_stage

STAGES = {stage.name: stage for stage in RECIPE}


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A tower of the right width with one small layer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tower")
    config = Dinov2Config(hidden_size=384, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1, image_size=336)
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def features(tower, tmp_path_factory):
    """The first five training pictures, encoded."""
    folder = tmp_path_factory.mktemp("features")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD", 5)
        encode_all(tower, folder, 5)
    return folder


def test_cached_features_are_what_the_encoder_gives(tower, features, monkeypatch):
    monkeypatch.setattr(cache, "SHARD", 5)
    model = Dinov2Model.from_pretrained(tower).eval()
    fresh = cache.encode(model, training_scene(3).image[None]) / cache.FEATURE_SCALE
    torch.testing.assert_close(Features(features)([3]), fresh, atol=0.02, rtol=0.01)


def test_a_picture_that_is_not_encoded_and_a_missing_encoder_are_named(tmp_path):
    with pytest.raises(InvalidInputError, match="picture 7 is not encoded"):
        Features(tmp_path)([7])
    with pytest.raises(InvalidInputError, match=r"there is no vision encoder in .*pretrained"):
        encode_all(tmp_path, tmp_path / "features", 5)


@pytest.mark.slow
def test_every_stage_learns_what_it_trains_and_nothing_else_and_ends_in_a_llava(tower, features, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD", 5)
    before = train_natural.Bundle(0).state_dict()
    for stage in RECIPE:
        train_stage(replace(stage, steps=2, batch=2, first_picture=0), tmp_path, Features(features))
        after = torch.load(tmp_path / f"{stage.name}.pt", weights_only=True)["model"]
        moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
        assert moved == {
            "language": {"language", "head", "ground_head"},
            "projector": {"projector"},
        }.get(stage.name, {"language", "head", "ground_head", "projector"})
        before = after
    encoder = Dinov2Model.from_pretrained(tower, dtype=torch.float32).eval()
    export(encoder, tmp_path / "full.pt", tmp_path / "model")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    scene = training_scene(3)
    inputs = processor(images=scene.image, text="USER: <image> what color is the cat ? ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        encoded: Any = model.get_image_features(pixel_values=inputs["pixel_values"])
        seen = encoded.pooler_output[0]
        bundle = train_natural.Bundle(0)
        bundle.load_state_dict(before)
        told = bundle.project(Features(features)([3]))[0]
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 576
    torch.testing.assert_close(seen.float(), told, atol=0.15, rtol=0.05)  # bfloat16
    describe(encoder, tmp_path, tmp_path / "model", seed=0, pictures=2)
    assert "| counting |" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.slow
def test_a_resumed_stage_ends_in_the_very_weights_of_an_unbroken_one(features, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stage = replace(STAGES["language"], steps=3, batch=2)
    folders = [tmp_path / "whole", tmp_path / "broken"]
    for folder in folders:
        folder.mkdir()
    train_stage(stage, folders[0], Features(features))
    losses_of = train_natural.losses_of

    def dies_at_step_2(stage, bundle, step, *rest):
        if step == 2:
            raise KeyboardInterrupt
        return losses_of(stage, bundle, step, *rest)

    monkeypatch.setattr(train_natural, "losses_of", dies_at_step_2)
    with pytest.raises(KeyboardInterrupt):
        train_stage(stage, folders[1], Features(features), save_every=0)
    monkeypatch.setattr(train_natural, "losses_of", losses_of)
    train_stage(stage, folders[1], Features(features))
    whole, broken = (torch.load(folder / "language.pt", weights_only=True)["model"] for folder in folders)
    torch.set_num_threads(threads)
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_no_question_sees_the_answer_of_another():
    questions = pack_questions([training_scene(0)])
    assert questions.segment.unique().tolist() == list(range(18))
    answered = questions.labels != train_natural.IGNORE
    assert int(answered.sum()) == 2 * 18  # the answer and the end


def test_muon_moves_a_matrix_by_a_step_whose_singular_values_are_near_one():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(32, 48))
    weight.grad = torch.randn(32, 48)
    Muon([{"params": [weight], "lr": 1.0}]).step()
    values = torch.linalg.svdvals(weight.detach())
    assert (values > 0.6).all()
    assert (values < 1.3).all()
    assert np.isclose(float((weight.detach() * weight.grad).sum()) < 0, True)
