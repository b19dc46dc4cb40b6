"""Training: resumable at any time without a trace, and every stage of the recipe gives a usable gradient."""

from dataclasses import replace

import pytest
import torch

from dcp_prune.errors import InvalidInputError
from dcp_prune.testbed import train
from dcp_prune.testbed.train import RECIPE, STAGES, Bundle, losses_of, read_checkpoint, rotate, train_stage


class Killed(Exception):
    """Stands in for a process that dies between two steps."""


def small(name: str, steps: int = 4, batch: int = 2):
    return replace(STAGES[name], steps=steps, batch=batch, needs=())


@pytest.fixture
def one_thread():
    """Several threads add gradients up in an order that differs from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_resumes_to_the_very_weights_of_an_unbroken_one(tmp_path, monkeypatch):
    stage = small("language")
    (tmp_path / "broken").mkdir()
    (tmp_path / "whole").mkdir()
    train_stage(stage, tmp_path / "whole", save_every=0)

    scenes_of = train.scenes_of

    def dies_at_step_2(stage, step):
        if step == 2:
            raise Killed
        return scenes_of(stage, step)

    monkeypatch.setattr(train, "scenes_of", dies_at_step_2)
    with pytest.raises(Killed):
        train_stage(stage, tmp_path / "broken", save_every=0)
    assert read_checkpoint(tmp_path / "broken", "language")["step"] == 2

    monkeypatch.setattr(train, "scenes_of", scenes_of)
    train_stage(stage, tmp_path / "broken", save_every=0)
    whole, broken = (read_checkpoint(tmp_path / d, "language")["model"] for d in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_a_finished_stage_is_not_trained_again(tmp_path, capsys):
    stage = small("projector", steps=1)
    train_stage(stage, tmp_path)
    before = read_checkpoint(tmp_path, "projector")["model"]
    train_stage(stage, tmp_path)
    after = read_checkpoint(tmp_path, "projector")["model"]
    assert "done" in capsys.readouterr().out
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", [stage.name for stage in RECIPE])
def test_every_stage_trains_what_it_claims(name):
    bundle = Bundle()
    optimizers = train.make_optimizers(STAGES[name], bundle)
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(trained) == len(set(map(id, trained)))
    for parameter in bundle.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    loss, metrics = losses_of(small(name), bundle, 0)
    loss.backward()
    assert torch.isfinite(loss)
    assert metrics
    reached = sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained)
    assert reached > 0.9 * len(trained) - 4  # the last layer's unread parts get none


def test_turning_lowers_the_cosine_to_every_word_by_the_cosine_of_the_angle():
    tokens = torch.randn(3, 5, 192)
    turned = rotate(tokens, 60.0)
    assert torch.allclose(turned.norm(dim=-1), tokens.norm(dim=-1), rtol=1e-4)
    assert torch.allclose(torch.cosine_similarity(turned, tokens, dim=-1), torch.full((3, 5), 0.5), atol=1e-4)
    assert rotate(tokens, 0.0) is tokens


def test_a_stage_without_its_forerunner_says_which_to_train(tmp_path):
    with pytest.raises(InvalidInputError, match="'vision' has no checkpoint"):
        train_stage(replace(STAGES["projector"], steps=1), tmp_path)
