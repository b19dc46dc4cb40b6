"""The evaluation's shortcuts (shared encoder passes, shared prefixes, batches) give the answers of single questions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcp_prune.assistant import Assistant
from dcp_prune.errors import InvalidInputError, UnknownPrunerError
from dcp_prune.eval.asking import runner as runner_module
from dcp_prune.eval.data import testbed as testbed_module
from dcp_prune.eval.data.testbed import split_name
from dcp_prune.eval.evaluate import Answers, Evaluation, evaluate, summarise
from dcp_prune.eval.specs import Method, plan
from dcp_prune.registry import make_pruner
from dcp_prune.testbed.model import make_model, make_processor
from dcp_prune.testbed.seeds import HELD_OUT
from dcp_prune.testbed.world import TASKS, make_scene


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    """The testbed's architecture with random weights, scaled until its answers depend on what it reads."""
    model: Any = make_model(0).eval()
    for layer in model.model.language_model.layers:
        layer.self_attn.v_proj.weight.data *= 3
    return Assistant("random weights", model, make_processor())


ADAPTIVE = 'dcp(max_distance=0.1,num_tokens=(2,60),space="encoder",relevance_power=3.0)'
METHODS = (*plan(["none", "dcp_progressive", "cls_attention"], [16]), *plan(["none"], [0]), *plan([ADAPTIVE], [16]))


@pytest.fixture(scope="module")
def evaluation(assistant: Assistant) -> Evaluation:
    return evaluate(assistant.model, assistant.processor, METHODS, HELD_OUT, 17, images_at_once=2, checkpoint="weak")


@pytest.mark.parametrize("place", range(len(METHODS)), ids=lambda place: f"{METHODS[place].name}")
def test_batched_answers_equal_those_of_single_questions(
    assistant: Assistant, evaluation: Evaluation, place: int
) -> None:
    answers = evaluation.answers[place]
    asked = [(seed, question) for seed in HELD_OUT[:2] for question in make_scene(seed).questions][:17]
    tokenizer: Any = assistant.processor.tokenizer  # type: ignore[attr-defined]
    assert len(set(answers.words)) > 1  # a method that mixes up its questions would be found out
    for number in range(0, 17, 4):
        seed, question = asked[number]
        image = Image.fromarray(make_scene(seed).image)
        if answers.num_tokens == 0:
            ids = tokenizer(assistant.prompt(question.text).replace("<image> ", ""), return_tensors="pt")
            word = int(assistant.model(**ids).logits[0, -1].argmax())
        else:
            pruner = answers.method.pruner
            view = assistant.look(image, pruner)
            reply = assistant.ask(view, assistant.prompt(question.text), pruner)
            word = tokenizer.convert_tokens_to_ids(reply.text) if reply.text else -1
            assert answers.kappa is not None
            assert answers.kappa[number] == pytest.approx(reply.kappa, abs=1e-4)
        assert answers.words[number] == word or tokenizer.decode(answers.words[number], skip_special_tokens=True) == ""
        assert answers.correct[number] == (tokenizer.decode(answers.words[number]) == question.answer)


def test_questions_keep_their_order_image_and_task_and_end_at_the_limit(evaluation: Evaluation) -> None:
    expected = [question.task for seed in HELD_OUT[:2] for question in make_scene(seed).questions][:17]
    assert evaluation.task.tolist() == expected
    assert evaluation.image.tolist() == [0] * 14 + [1] * 3
    assert evaluation.seeds == (HELD_OUT[0], HELD_OUT[1])
    assert [answers.num_tokens for answers in evaluation.answers[:4]] == [576, 16, 16, 0]


def test_a_method_whose_budget_varies_reports_the_mean_of_what_it_kept(
    assistant: Assistant, evaluation: Evaluation
) -> None:
    answers = evaluation.answers[-1]
    assert 2 < answers.num_tokens < 60
    assert answers.num_tokens == answers.kept.mean()
    assert len(set(answers.kept.tolist())) > 2
    for number in range(0, 17, 5):
        seed, slot = HELD_OUT[number // 14], number % 14
        pruner = answers.method.pruner
        assert pruner is not None
        view = assistant.look(Image.fromarray(make_scene(seed).image), pruner)
        prompt = assistant.prompt(make_scene(seed).questions[slot].text)
        reply = assistant.ask(view, prompt, pruner)
        assert reply.visual_tokens == answers.kept[number]
    rows = [row for row in summarise(evaluation)["results"] if row["pruner"] == ADAPTIVE and row["task"] == "all"]
    assert [row["num_tokens"] for row in rows] == [answers.num_tokens]
    (entry,) = [entry for entry in summarise(evaluation)["methods"] if entry["pruner"] == ADAPTIVE]
    assert entry["options"]["max_distance"] == 0.1
    assert entry["options"]["num_tokens"] == [2, 60]


def test_batch_size_changes_no_answer(assistant: Assistant, evaluation: Evaluation) -> None:
    one = evaluate(
        assistant.model, assistant.processor, METHODS[1:2], HELD_OUT, 17, images_at_once=1, checkpoint="weak"
    )
    assert one.answers[0].words.tolist() == evaluation.answers[1].words.tolist()


def test_methods_that_need_the_same_encoder_pass_share_it(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    original = runner_module.encode_images

    def counted(model: Any, pixels: Any, *pruners: Any) -> Any:
        passes.append((len(pixels), len(pruners)))
        return original(model, pixels, *pruners)

    monkeypatch.setattr(runner_module, "encode_images", counted)
    methods = plan(["none", "random", "uniform", "cls_attention"], [16, 8])
    evaluate(assistant.model, assistant.processor, methods, HELD_OUT, 28, images_at_once=2, checkpoint="weak")
    assert [count for images, count in passes if images == 2] == [6]


def test_progress_is_told_up_to_the_end(assistant: Assistant) -> None:
    told: list[tuple[int, int]] = []
    evaluate(
        assistant.model,
        assistant.processor,
        plan(["random"], [16]),
        HELD_OUT,
        30,
        images_at_once=1,
        checkpoint="weak",
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(0, 30), (14, 30), (28, 30), (30, 30)]


def test_a_plan_holds_each_contender_once() -> None:
    methods = plan(["none", "random", "dcp", "random"], [0, 16, 8])
    assert [(method.name, method.num_tokens) for method in methods] == [
        ("none", 0),
        ("none", None),
        ("random", 16),
        ("dcp", 16),
        ("random", 8),
        ("dcp", 8),
    ]
    assert plan(["none"], [0]) == (Method("none", 0),)


def test_a_plan_refuses_what_no_pruner_could_do() -> None:
    with pytest.raises(UnknownPrunerError, match="did you mean random"):
        plan(["randon"], [16])
    with pytest.raises(InvalidInputError, match="at least 1"):
        plan(["random"], [-1])
    with pytest.raises(InvalidInputError, match="at least one pruner"):
        plan([], [16])
    with pytest.raises(InvalidInputError, match="no option 'depth'"):
        plan(["random"], [16], {"depth": 3})


def test_seeds_of_two_splits_are_never_mixed() -> None:
    assert split_name(range(900_000_000, 1_000_000_000)) == "tuning"
    assert split_name([1_000_000_005]) == "held-out"
    with pytest.raises(InvalidInputError, match="from the tuning into the held-out"):
        split_name(range(999_999_999, 1_000_000_001))
    with pytest.raises(InvalidInputError, match="empty"):
        split_name(range(5, 5))
    with pytest.raises(InvalidInputError, match="no split"):
        split_name(range(3_000_000_000, 3_000_000_001))


def test_words_that_the_model_lacks_are_refused(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    real = make_scene(HELD_OUT[0])
    strange = type(real)(
        real.seed,
        real.objects,
        real.word,
        real.sign,
        (real.questions[0].__class__("existence", real.questions[0].text, "zebra"),),
    )
    monkeypatch.setattr(testbed_module.TestbedQuestions, "scene", lambda self, number: strange)
    with pytest.raises(InvalidInputError, match="zebra"):
        evaluate(assistant.model, assistant.processor, METHODS[:1], HELD_OUT, 1, checkpoint="weak")


def _answers(name: str, tokens: int, correct: list[int]) -> Answers:
    pruner = None if name == "none" else make_pruner(name, num_tokens=tokens)
    method = Method(name, tokens if pruner else None, pruner)
    right = np.array(correct, dtype=bool)
    return Answers(method, np.full(len(right), tokens), right.astype(int), right, np.full(len(right), 0.5), 1.0)


def test_the_summary_of_known_answers_is_known() -> None:
    # Two images; questions 0, 1 of one task, 2, 3 of another, and the same for the second image.
    full = _answers("none", 576, [1, 1, 1, 1, 1, 1, 1, 0])
    dcp = _answers("dcp", 16, [1, 1, 1, 0, 1, 1, 1, 0])
    random = _answers("random", 16, [1, 0, 0, 0, 0, 0, 1, 0])
    task = np.array([TASKS[0], TASKS[0], TASKS[1], TASKS[1]] * 2)
    image = np.repeat([0, 1], 4)
    summary = summarise(Evaluation((HELD_OUT[0], HELD_OUT[1]), "crowded", image, task, (full, dcp, random)))
    rows = {(row["pruner"], row["task"]): row for row in summary["results"]}
    assert set(rows) == {(name, t) for name in ("none", "dcp", "random") for t in ("all", *TASKS[:2])}
    assert rows["dcp", "all"]["accuracy"] == 6 / 8
    assert rows["dcp", TASKS[1]]["accuracy"] == 2 / 4
    assert rows["dcp", TASKS[1]]["n"] == 4
    assert rows["dcp", "all"]["relative_score"] == pytest.approx((1 + 2 / 3) / 2)
    assert rows["random", "all"]["kappa"] == 0.5
    low, high = rows["dcp", "all"]["ci95"]
    assert 0 <= low < 0.75 < high <= 1
    pairs = {(pair["pruner"], pair["against"], pair["task"]): pair for pair in summary["paired"]}
    assert set(pairs) == {("dcp", "random", t) for t in ("all", *TASKS[:2])}
    assert pairs["dcp", "random", "all"]["difference"] == 0.5  # the first pruner minus the other
    assert summary["questions"]["split"] == "held-out"
    assert summary["questions"]["images"] == 2
    assert [method["options"].get("seed") for method in summary["methods"]] == [None, None, 0]
