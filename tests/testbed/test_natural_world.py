"""The natural world: the same seed gives the same scene everywhere, and every answer is true of its picture."""

import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest

from dcp_prune.testbed.language import UNKNOWN, make_tokenizer, natural_vocabulary
from dcp_prune.testbed.natural import (
    CLASSES,
    GRID,
    LEVELS,
    NUMBERS,
    PATCH,
    SCENES,
    TASKS,
    WORDS,
    NaturalScene,
    make_scene,
)
from dcp_prune.testbed.world import COLORS, LETTERS, Question
from dcp_prune.testbed.worlds import FIRST, NATURAL, world_of

SEEDS = range(25)


def fingerprint(seed: int, difficulty) -> str:
    scene = make_scene(seed, difficulty)
    return sha256(scene.image.tobytes() + repr(scene.questions).encode()).hexdigest()


def truth(scene: NaturalScene, question: Question) -> str:
    """The answer, worked out from the text and the list of objects alone."""
    named = {o.name: o for o in scene.objects}
    side = scene.grid * PATCH
    yes_no = {True: "yes", False: "no"}
    match question.text.split():
        case ["is", "there", "a", name, *_]:
            return yes_no[name in named]
        case ["what", "color", "is", "the", name, "?"]:
            return named[name].color
        case ["is", "the", first, ("above" | "below") as where, "the", second, "?"]:
            return yes_no[(named[first].center[0] < named[second].center[0]) == (where == "above")]
        case ["is", "the", first, ("left" | "right") as where, "of", "the", second, "?"]:
            return yes_no[(named[first].center[1] < named[second].center[1]) == (where == "left")]
        case ["is", "the", first, ("larger" | "smaller") as how, "than", "the", second, "?"]:
            return yes_no[(named[first].size > named[second].size) == (how == "larger")]
        case ["is", "the", "background", what, "?"]:
            return yes_no[scene.background == what]
        case ["what", "is", "the", "background", "?"]:
            return scene.background
        case ["is", "the", name, color, "?"]:
            return yes_no[named[name].color == color]
        case ["how", "many", name, *_]:
            return NUMBERS[sum(o.name == name for o in scene.objects) - 1]
        case ["where", "is", "the", name, "?"]:
            y, x = named[name].center
            return ("lower" if y > side / 2 else "upper") + "-" + ("right" if x > side / 2 else "left")
        case ["what", "does", "the", "sign", "say", "?"]:
            return scene.word
        case ["does", "the", "sign", "say", word, "?"]:
            return yes_no[word == scene.word]
        case ["which", *_, "?", _, w1, _, w2, _, w3, _, w4]:
            (letter,) = (a for a, w in zip(LETTERS, (w1, w2, w3, w4), strict=True) if w in named)
            return letter
        case ["what", "color", "is", "the", name, "?", _, w1, _, w2, _, w3, _, w4]:
            (letter,) = (a for a, w in zip(LETTERS, (w1, w2, w3, w4), strict=True) if w == named[name].color)
            return letter
    raise AssertionError(question.text)


def test_a_seed_gives_the_same_scene_in_another_process():
    seed = 1_000_000_017
    code = (
        "from hashlib import sha256; from dcp_prune.testbed.natural import make_scene; "
        f"s = make_scene({seed}, 'cluttered'); "
        "print(sha256(s.image.tobytes() + repr(s.questions).encode()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == fingerprint(seed, "cluttered") != fingerprint(seed + 1, "cluttered")


@pytest.mark.parametrize("difficulty", LEVELS)
def test_every_answer_is_true_of_its_picture_and_each_task_is_asked_twice(difficulty):
    for seed in SEEDS:
        scene = make_scene(seed, difficulty)
        assert [q.task for q in scene.questions] == [task for task in TASKS for _ in range(2)]
        for question in scene.questions:
            assert question.answer == truth(scene, question), question


@pytest.mark.parametrize("difficulty", LEVELS)
def test_a_level_has_as_many_things_of_such_sizes_as_it_says(difficulty):
    level = LEVELS[difficulty]
    for seed in SEEDS:
        scene = make_scene(seed, difficulty)
        assert level.things[0] <= len(scene.objects) <= level.things[1]
        assert level.distractors[0] <= len(scene.distractors) <= level.distractors[1]
        assert all(level.sizes[0] <= o.size <= level.sizes[1] for o in scene.objects)


def test_every_thing_can_be_seen_and_its_patches_are_where_it_is_painted():
    for seed in SEEDS:
        scene = make_scene(seed, "cluttered")
        assert scene.image.shape == (GRID * PATCH, GRID * PATCH, 3)
        for i, o in enumerate(scene.objects):
            rows, cols = np.nonzero(scene.patches(i))
            assert len(rows) >= 1, (seed, o)
            assert (rows >= o.y // PATCH).all(), (seed, o)
            assert (rows <= (o.y + o.size) // PATCH).all(), (seed, o)
            assert (cols >= o.x // PATCH).all(), (seed, o)
            assert (cols <= (o.x + o.size) // PATCH).all(), (seed, o)
        assert scene.sign_patches().sum() >= 8


def test_answers_of_yes_or_no_are_about_even_and_others_use_every_word():
    questions = [q for seed in range(150) for q in make_scene(seed, "crowded").questions]
    said = [q.answer for q in questions if q.answer in ("yes", "no")]
    assert 0.42 < said.count("yes") / len(said) < 0.58
    assert {q.answer for q in questions} == {"yes", "no", *COLORS, *NUMBERS, *WORDS, *SCENES, *LETTERS} | {
        "upper-left",
        "upper-right",
        "lower-left",
        "lower-right",
    }


def test_a_larger_picture_keeps_the_size_of_its_things():
    scene = make_scene(3, "standard", grid=2 * GRID)
    assert scene.image.shape == (2 * GRID * PATCH, 2 * GRID * PATCH, 3)
    assert all(o.size <= LEVELS["standard"].sizes[1] for o in scene.objects)


def test_every_word_of_the_natural_world_is_one_token():
    tokenizer = make_tokenizer(natural_vocabulary())
    text = " ".join(q.text + " " + q.answer for seed in range(60) for q in make_scene(seed, "standard").questions)
    ids = tokenizer(f"{text} {' '.join(CLASSES)}")["input_ids"]
    assert tokenizer.convert_tokens_to_ids(UNKNOWN) not in ids


def test_a_checkpoint_tells_its_world(tmp_path):
    (tmp_path / "config.json").write_text('{"vision_config": {"model_type": "dinov2"}}')
    assert world_of(str(tmp_path)) is NATURAL
    assert world_of("weak") is world_of(str(tmp_path / "nothing")) is FIRST


def test_the_first_world_has_no_cluttered_pictures():
    with pytest.raises(Exception, match="the first world has no difficulty 'cluttered'; it has standard, crowded"):
        FIRST.check("cluttered")
