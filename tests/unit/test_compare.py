"""The decision of `compare`, and that its sharing changes no answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.compare import Agreement, Comparison, Cost, compare
from dcp_prune.eval.data.pictures import PictureQuestion, PictureQuestions
from dcp_prune.eval.data.scoring import normalised
from dcp_prune.eval.specs import parse_spec
from dcp_prune.eval.verdict import decide, too_few
from dcp_prune.integrations.transformers import prune_inputs
from dcp_prune.pruners.base import Pruner

TEXTS = ("what is the colour of this dog", "where is the cat")
COST = Cost(576, 600.0, 1, 1, 1.0)


def _comparison(agreement: dict[int, float], images: int = 400, questions: int = 1) -> Comparison:
    work = PictureQuestions(
        tuple(PictureQuestion(Path(f"{i}.png"), f"{q}") for i in range(images) for q in range(questions))
    )
    n = images * questions
    rng = np.random.default_rng(0)
    answers = []
    for budget, share in agreement.items():
        same = rng.permutation(np.arange(n) < round(share * n))
        zeros = np.zeros(n)
        answers.append(Agreement(parse_spec("dcp").at(budget), ("",) * n, same, same, zeros, zeros, COST))
    return Comparison(work, ("",) * n, COST, tuple(answers))


def test_the_smallest_budget_is_named_that_passes_after_all_larger_ones() -> None:
    (verdict,) = decide(_comparison({16: 0.80, 32: 0.985, 64: 0.99, 128: 1.0}), 0.95)
    assert (verdict.num_tokens, verdict.tested, verdict.measured) == (32, (128, 64, 32, 16), 32)
    assert "32 of 576 visual tokens keep at least 95 % of the answers" in verdict.sentence
    assert "At 16 tokens 80 % stayed the same, less than wanted" in verdict.sentence


def test_a_budget_below_one_that_failed_is_never_claimed() -> None:
    (verdict,) = decide(_comparison({16: 1.0, 32: 0.90, 64: 1.0}), 0.95)
    assert (verdict.num_tokens, verdict.tested, verdict.measured) == (64, (64, 32), 64)


def test_too_few_images_claim_nothing_and_say_how_many_are_needed() -> None:
    comparison = _comparison({16: 1.0, 32: 1.0}, images=20, questions=5)
    (verdict,) = decide(comparison, 0.95)
    assert verdict.num_tokens is None
    assert verdict.images_needed == 59
    assert verdict.measured == 16
    assert "about 59 images with 295 questions would show it; there were 20 with 100" in verdict.sentence
    assert "Here 16 tokens were enough, which may be luck" in verdict.sentence
    assert "at least 59 images" in str(too_few(comparison.questions, 0.95))
    assert too_few(_comparison({16: 1.0}, images=59).questions, 0.95) is None


def test_a_claim_is_wrong_no_more_often_than_promised() -> None:
    """Every budget truly keeps 94.9 %, so each claim of 95 % is wrong, whichever of the three budgets it names."""
    rng, wrong, runs = np.random.default_rng(1), 0, 120
    zeros = np.zeros(300)
    work = PictureQuestions(tuple(PictureQuestion(Path(f"{i}.png"), "?") for i in range(300)))
    methods = [parse_spec("dcp").at(budget) for budget in (16, 32, 64)]
    for _ in range(runs):
        drawn = [rng.random(300) < 0.949 for _ in methods]
        answers = tuple(
            Agreement(m, ("",) * 300, s, s, zeros, zeros, COST) for m, s in zip(methods, drawn, strict=True)
        )
        wrong += decide(Comparison(work, ("",) * 300, COST, answers), 0.95)[0].num_tokens is not None
    assert wrong / runs <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5


@pytest.mark.parametrize("keep", [0.0, 1.0, -0.1, float("nan")])
def test_an_agreement_that_cannot_be_shown_is_refused(keep: float) -> None:
    with pytest.raises(InvalidInputError, match="share above 0 and below 1"):
        decide(_comparison({16: 1.0}, images=2), keep)


def _ask_alone(model: Any, processor: Any, asked: PictureQuestion, pruner: Pruner | None) -> tuple[str, torch.Tensor]:
    inputs = processor(images=Image.open(asked.image), text=_prompt(asked.question), return_tensors="pt")
    if pruner is not None:
        inputs = prune_inputs(model, inputs, pruner, processor=processor).inputs
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    text = processor.tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip(), out.logits[0][0].log_softmax(dim=-1)


def _prompt(question: str) -> str:
    return f"USER: <image> {question} ASSISTANT:"


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_sharing_images_and_batches_changes_no_answer(
    pristine_model: Any, processor: Any, tmp_path: Path, batch_size: int
) -> None:
    asked = []
    for number in range(3):
        image = tmp_path / f"{number}.png"
        Image.effect_noise((84, 84), 40 + 30 * number).save(image)
        asked += [PictureQuestion(image, "what is the colour of this dog"), PictureQuestion(image, "where is the cat")][
            : 1 + number % 2
        ]
    methods = [parse_spec(name).at(budget) for budget in (12, 6) for name in ("dcp", "dcp_progressive")]
    progress: list[tuple[int, int]] = []
    comparison = compare(
        pristine_model,
        processor,
        PictureQuestions(tuple(asked)),
        methods,
        prompt=_prompt,
        max_new_tokens=4,
        batch_size=batch_size,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert progress[-1] == (4, 4)
    with torch.inference_mode():
        for at, each in enumerate(asked):
            text, first = _ask_alone(pristine_model, processor, each, None)
            assert comparison.texts[at] == text
            for answers in comparison.answers:
                other, pruned = _ask_alone(pristine_model, processor, each, answers.method.pruner)
                assert answers.texts[at] == other
                assert answers.same[at] == (normalised(text) == normalised(other))
                wanted = float((first.exp() * (first - pruned)).sum())
                assert answers.divergence[at] == pytest.approx(wanted, abs=1e-4)
    cache = {answers.method.num_tokens: answers.cost.kv_cache_bytes for answers in comparison.answers}
    # 4 layers, keys and values, 2 heads of 12, float32: 768 bytes a token
    assert comparison.cost.kv_cache_bytes - cache[6] == 768 * 30
    assert cache[12] - cache[6] == 768 * 6


def test_a_model_that_answers_nan_is_named(model: Any, processor: Any, tmp_path: Path) -> None:
    Image.effect_noise((84, 84), 60).save(tmp_path / "0.png")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    work = PictureQuestions((PictureQuestion(tmp_path / "0.png", "what is this"),))
    with pytest.raises(InvalidInputError, match="answers with NaN"):
        compare(model, processor, work, [parse_spec("random").at(6)], prompt=_prompt)
