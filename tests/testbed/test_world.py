"""The world: the same seed gives the same scene everywhere, and every answer is true of its picture."""

import hashlib
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from dcp_prune.testbed.language import make_tokenizer, vocabulary
from dcp_prune.testbed.seeds import HELD_OUT, TRAINING, TUNING, split_of
from dcp_prune.testbed.train import RECIPE
from dcp_prune.testbed.world import (
    GRID,
    LETTERS,
    NUMBERS,
    OBJECT_COUNTS,
    TASKS,
    Question,
    Scene,
    make_scene,
)

SEEDS = range(40)


def fingerprint(seed: int, difficulty) -> str:
    scene = make_scene(seed, difficulty)
    return hashlib.sha256(scene.image.tobytes() + repr(scene.questions).encode()).hexdigest()


def truth(scene: Scene, question: Question) -> str:
    """The answer, worked out from the text and the list of objects alone."""
    words = question.text.split()
    named = {o.name: o for o in scene.objects}
    count = {name: sum(o.name == name for o in scene.objects) for name in named}
    yes_no = {True: "yes", False: "no"}
    match words:
        case ["is", "there", "a", name, *_]:
            return yes_no[name in named]
        case ["what", "color", "is", "the", name, "?"]:
            return named[name].color
        case ["is", "the", first, ("above" | "below") as where, "the", second, "?"]:
            return yes_no[(named[first].center[0] < named[second].center[0]) == (where == "above")]
        case ["is", "the", first, ("left" | "right") as where, "of", "the", second, "?"]:
            return yes_no[(named[first].center[1] < named[second].center[1]) == (where == "left")]
        case ["is", "the", name, color, "?"]:
            return yes_no[named[name].color == color]
        case ["how", "many", name, *_]:
            return NUMBERS[count[name] - 1]
        case ["where", "is", "the", name, "?"]:
            row, col = named[name].center
            middle = scene.grid / 2
            return ("lower" if row > middle else "upper") + "-" + ("right" if col > middle else "left")
        case ["what", "does", "the", "sign", "say", "?"]:
            return scene.word
        case ["does", "the", "sign", "say", word, "?"]:
            return yes_no[word == scene.word]
        case ["which", *_, "?", _, w1, _, w2, _, w3, _, w4]:
            return next(letter for letter, w in zip(LETTERS, (w1, w2, w3, w4), strict=True) if w in named)
        case ["what", "color", "is", "the", name, "?", _, w1, _, w2, _, w3, _, w4]:
            return LETTERS[(w1, w2, w3, w4).index(named[name].color)]
    raise AssertionError(f"unknown question: {question.text}")


@pytest.mark.parametrize("difficulty", ["standard", "crowded"])
def test_a_seed_gives_the_same_scene_in_another_process(difficulty):
    code = (
        "import hashlib; from dcp_prune.testbed.world import make_scene; "
        f"s = make_scene(7, {difficulty!r}); "
        "print(hashlib.sha256(s.image.tobytes() + repr(s.questions).encode()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == fingerprint(7, difficulty)


def test_another_seed_or_difficulty_gives_another_scene():
    assert len({fingerprint(seed, d) for seed in range(5) for d in ("standard", "crowded")}) == 10


def test_the_picture_does_not_depend_on_when_it_is_painted():
    first, second = make_scene(3), make_scene(3)
    _ = [make_scene(seed).image for seed in range(3)]
    assert np.array_equal(first.image, second.image)


@pytest.mark.parametrize("difficulty", ["standard", "crowded"])
def test_every_answer_is_true_of_the_objects(difficulty):
    for seed in SEEDS:
        scene = make_scene(seed, difficulty)
        for question in scene.questions:
            assert question.answer == truth(scene, question), (seed, question)


@pytest.mark.parametrize("difficulty", ["standard", "crowded"])
def test_a_scene_asks_twice_per_task_about_the_promised_number_of_objects(difficulty):
    fewest, most = OBJECT_COUNTS[difficulty]
    for seed in SEEDS:
        scene = make_scene(seed, difficulty)
        assert [q.task for q in scene.questions] == [task for task in TASKS for _ in range(2)]
        assert fewest <= len(scene.objects) <= most
        assert scene.image.shape == (192, 192, 3)
        assert scene.image.dtype == np.uint8


def test_a_larger_picture_holds_as_many_objects_of_the_same_size_and_true_answers():
    for seed in SEEDS:
        scene = make_scene(seed, "crowded", 2 * GRID)
        assert scene.image.shape == (384, 384, 3)
        assert {o.size for o in scene.objects} <= {3, 4}
        assert 9 <= len(scene.objects) <= 13
        for question in scene.questions:
            assert question.answer == truth(scene, question), (seed, question)
    assert max(o.row for seed in SEEDS for o in make_scene(seed, "crowded", 2 * GRID).objects) > GRID


def test_objects_and_sign_never_overlap():
    for seed in SEEDS:
        scene = make_scene(seed, "crowded")
        covered = sum(scene.patches(i).astype(int) for i in range(len(scene.objects))) + scene.sign_patches()
        assert covered.max() == 1
        assert covered.sum() == sum(o.size**2 for o in scene.objects) + 12


def test_answers_are_balanced_enough_that_guessing_does_not_pay():
    yes = [q.answer == "yes" for s in range(300) for q in make_scene(s).questions if q.answer in ("yes", "no")]
    assert 0.45 < np.mean(yes) < 0.55


def test_the_tokenizer_knows_every_word_that_is_asked_or_answered():
    tokenizer = make_tokenizer(vocabulary())
    for seed in SEEDS:
        for question in make_scene(seed, "crowded").questions:
            ids = tokenizer(f"{question.text} {question.answer}", add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert len(ids) == len(question.text.split()) + 1
    assert len(vocabulary()) == len(set(vocabulary())) == len(tokenizer)


def test_seed_splits_do_not_touch_and_training_stays_in_its_own():
    assert TRAINING.stop == TUNING.start == 900_000_000
    assert TUNING.stop == HELD_OUT.start == 1_000_000_000
    assert [split_of(s) for s in (0, 899_999_999, 900_000_000, 1_000_000_000)] == [
        "training",
        "training",
        "tuning",
        "held-out",
    ]
    spans = sorted((stage.first_seed, stage.first_seed + stage.steps * stage.batch) for stage in RECIPE)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= TRAINING.stop
    with pytest.raises(ValueError, match="lies in no split"):
        split_of(-1)
