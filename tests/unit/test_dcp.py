"""DCP-Prune: its schedule, its recovery, its trigger, its use of the question, every one of its fields, its presets."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import fields, replace

import pytest
import torch

from dcp_prune import (
    ACGR,
    TATCS,
    DCPPruner,
    EncoderTokens,
    InvalidInputError,
    MissingSignalError,
    ProgressiveDCPPruner,
    Pruner,
    Trigger,
    VisualTokens,
    kappa,
    make_pruner,
)
from dcp_prune.functional.distribution import DISTANCES
from dcp_prune.functional.similarity import gather_tokens

SIDE, D, K = 12, 32, 8
N = SIDE * SIDE
THINGS, PATCHES = 12, 3


def scene(seed: int = 0, b: int = 2, *, asked: tuple[int, ...] = (0,), clarity: float = 1.0) -> VisualTokens:
    """12 things of 3 patches each on a plain background, and a question of 4 words that names the things in `asked`.

    Thing t fills patches 12 t + 4 .. 12 t + 6. A word's embedding lies `clarity` of the way from noise to its thing.
    """
    generator = torch.Generator().manual_seed(seed)
    looks = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    features = 0.1 * torch.randn(b, N, D, generator=generator) + looks[-1]
    for thing in range(THINGS):
        patches = slice(12 * thing + 4, 12 * thing + 4 + PATCHES)
        features[:, patches] = looks[thing] + 0.05 * torch.randn(b, PATCHES, D, generator=generator)
    text = torch.nn.functional.normalize(torch.randn(4, D, generator=generator), dim=-1)
    for word, thing in enumerate(asked):
        text[word] = clarity * looks[thing] + (1.0 - clarity) * text[word]
    attention = torch.rand(b, N, generator=generator)
    return VisualTokens.from_features(
        features, cls_attention=attention / attention.sum(dim=1, keepdim=True), text=text.expand(b, 4, D)
    )


def on_thing(indices: torch.Tensor, thing: int) -> list[int]:
    """How many kept patches of each image show the thing."""
    first = 12 * thing + 4
    return ((indices >= first) & (indices < first + PATCHES)).sum(dim=1).tolist()


# --- the schedule ---


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (23, [(11, 288), (16, 144)]),  # CLIP ViT-L/14 with features from hidden_states[-2]
        (12, [(5, 288), (8, 144)]),
        (4, [(1, 288), (2, 144)]),
        (3, [(1, 144)]),  # both shares fall on the last layer that has one behind it
        (2, [(0, 144)]),
        (1, []),
    ],
)
def test_the_default_schedule_fits_encoders_of_any_depth(layers, expected):
    stages = ProgressiveDCPPruner(num_tokens=16).encoder_stages(576, layers)
    assert [(stage.layer, stage.num_tokens) for stage in stages] == expected


@pytest.mark.parametrize(
    ("k", "expected"), [(200, [288, 200]), (288, [288]), (300, [300]), (575, [575]), (576, []), (9999, [])]
)
def test_shares_are_raised_to_the_budget_and_stages_without_work_are_left_out(k, expected):
    assert [stage.num_tokens for stage in ProgressiveDCPPruner(num_tokens=k).encoder_stages(576, 23)] == expected


def test_a_schedule_can_be_given_in_layers_and_counts():
    pruner = make_pruner("dcp", num_tokens=16, schedule=((2, 300), (5, 100), (9, 16)))
    stages = pruner.encoder_stages(576, 12)
    assert [(stage.layer, stage.num_tokens) for stage in stages] == [(2, 300), (5, 100), (9, 16)]
    assert [stage.num_tokens for stage in pruner.encoder_stages(256, 12)] == [100, 16], "an image of fewer tokens"
    assert DCPPruner(num_tokens=16).encoder_stages(576, 12) == (), "without ACGR there are none"


def test_a_schedule_from_a_configuration_file_is_as_good_as_one_of_tuples():
    as_lists = make_pruner("dcp", num_tokens=16, schedule=[[2, 300], [5, 100]], recovery=[5, 0])
    assert as_lists == DCPPruner(num_tokens=16, acgr=ACGR(schedule=((2, 300), (5, 100)), recovery=(5, 0)))
    hash(as_lists)


@pytest.mark.parametrize(
    "schedule",
    [
        "half",
        (),
        (1, 2),
        ((1,),),
        ((1, 2, 3),),
        ((-1, 30),),
        ((1, 0),),
        ((0.0, 0.5),),
        ((0.5, 1.0),),
        ((0.5, True),),
        ((3, 100), (2, 50)),
        ((3, 100), (3, 50)),
        ((2, 100), (3, 100)),
        ((0.2, 0.3), (0.4, 0.5)),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_at_construction(schedule):
    with pytest.raises(InvalidInputError, match="ACGR: schedule must"):
        make_pruner("dcp", num_tokens=16, schedule=schedule)


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        (((11, 100),), "choose a layer of at most 10"),
        (((3, 15),), "below the budget of 16"),
        (((0.5, 300), (2, 0.25)), "after layer 5 and then after layer 2; sort it"),
    ],
)
def test_a_schedule_that_does_not_fit_the_encoder_or_the_budget_is_refused(schedule, says):
    with pytest.raises(InvalidInputError, match=says):
        make_pruner("dcp", num_tokens=16, schedule=schedule).encoder_stages(576, 12)


# --- recovery inside the encoder ---


def stage_input(seed: int = 0) -> EncoderTokens:
    encoder = scene(seed).encoder
    assert encoder is not None
    return encoder


def test_without_recovery_a_stage_only_drops_tokens():
    tokens = stage_input()
    (stage,) = make_pruner("dcp", num_tokens=8, schedule=((0.5, 40),)).encoder_stages(N, 12)
    done = stage.reduce(tokens)
    assert torch.equal(done.features, gather_tokens(tokens.features, done.kept))
    torch.testing.assert_close(done.stats["kappa"], kappa(done.features, tokens.features))


def test_recovery_changes_what_anchors_hold_but_not_which_they_are():
    tokens = stage_input()
    (drop,) = make_pruner("dcp", num_tokens=8, schedule=((0.5, 40),)).encoder_stages(N, 12)
    (pour,) = make_pruner("dcp", num_tokens=8, schedule=((0.5, 40),), recovery=0.5).encoder_stages(N, 12)
    dropped, poured = drop.reduce(tokens), pour.reduce(tokens)
    assert torch.equal(dropped.kept, poured.kept)
    assert not torch.allclose(dropped.features, poured.features, atol=1e-2)
    torch.testing.assert_close(dropped.features.norm(dim=-1), poured.features.norm(dim=-1))


@pytest.mark.parametrize("anchors", ["farthest", "coverage"])
def test_diverse_anchors_see_every_thing_where_saliency_sees_one(anchors):
    tokens = stage_input()
    loud = torch.full((2, N), 0.002)
    loud[:, :20] = 0.01
    tokens = replace(tokens, cls_attention=loud)

    def things_seen(rule):
        (stage,) = make_pruner("dcp", num_tokens=8, schedule=((0.5, 20),), anchors=rule).encoder_stages(N, 12)
        kept = stage.reduce(tokens).kept
        return [sum(on_thing(kept[i : i + 1], thing)[0] > 0 for thing in range(THINGS)) for i in range(2)]

    assert min(things_seen(anchors)) >= 10
    assert max(things_seen("saliency")) <= 2


def test_a_stage_without_attention_says_what_it_needs():
    tokens = replace(stage_input(), cls_attention=None)
    (stage,) = make_pruner("dcp", num_tokens=8, schedule=((0.5, 40),)).encoder_stages(N, 12)
    with pytest.raises(MissingSignalError, match=r"encoder\.cls_attention"):
        stage.reduce(tokens)


# --- the trigger ---


def test_a_threshold_of_zero_always_and_one_of_infinity_never_selects_anew():
    tokens = scene()
    always, never = DCPPruner(num_tokens=K)(tokens), make_pruner("dcp", num_tokens=K, threshold=math.inf)(tokens)
    assert always.stats["reselected"].all()
    assert not never.stats["reselected"].any()
    assert not torch.equal(always.indices, never.indices)
    torch.testing.assert_close(always.stats["distance"], never.stats["distance"])


@pytest.mark.parametrize("trigger", sorted(DISTANCES))
def test_each_image_is_judged_by_itself(trigger):
    tokens = scene(1, b=4)
    always = make_pruner("dcp", num_tokens=K, distance=trigger)(tokens)
    never = make_pruner("dcp", num_tokens=K, distance=trigger, threshold=math.inf)(tokens)
    between = float(always.stats["distance"].sort().values[1:3].mean())
    some = make_pruner("dcp", num_tokens=K, distance=trigger, threshold=between)(tokens)
    severe = always.stats["distance"] > between
    assert severe.tolist().count(True) == 2
    assert torch.equal(some.stats["reselected"], severe)
    assert torch.equal(some.indices, torch.where(severe[:, None], always.indices, never.indices))


def test_stats_report_the_kappa_of_what_was_kept_and_the_distance_that_was_judged():
    tokens = scene(2)
    pruned = make_pruner("dcp", num_tokens=K, distance="mmd")(tokens)
    torch.testing.assert_close(pruned.stats["kappa"], kappa(pruned.features, tokens.features))
    first = make_pruner("dcp", num_tokens=K, threshold=math.inf)(tokens)
    torch.testing.assert_close(pruned.stats["distance"], DISTANCES["mmd"](first.features, tokens.features))
    assert {key: tuple(value.shape) for key, value in pruned.stats.items()} == {
        "kappa": (2,),
        "distance": (2,),
        "reselected": (2,),
        "scores": (2, N),
        "relevance": (2, N),
        "confidence": (2,),
    }


def test_selecting_anew_covers_what_matters_better_than_the_first_choice():
    tokens = scene(3)
    always, never = DCPPruner(num_tokens=K)(tokens), make_pruner("dcp", num_tokens=K, threshold=math.inf)(tokens)
    weights = always.stats["relevance"] ** DCPPruner(num_tokens=K).tatcs.relevance_power
    after = DISTANCES["coverage"](always.features, tokens.features, weights=weights)
    assert (after < never.stats["distance"]).all()
    torch.testing.assert_close(
        never.stats["distance"], DISTANCES["coverage"](never.features, tokens.features, weights=weights)
    )


# --- the question ---


def test_what_the_question_names_is_kept():
    for thing in range(THINGS):
        pruned = DCPPruner(num_tokens=K)(scene(4, asked=(thing,)))
        assert min(on_thing(pruned.indices, thing)) >= 1


def test_relevance_points_at_the_patches_of_the_named_thing():
    pruned = DCPPruner(num_tokens=K)(scene(5, asked=(3,)))
    assert on_thing(pruned.stats["relevance"].topk(PATCHES, dim=1).indices, 3) == [PATCHES, PATCHES]
    assert (pruned.stats["confidence"] > 0.5).all()


def test_a_question_about_nothing_in_the_image_changes_nothing_behind_the_gate():
    tokens = scene(6, asked=())
    without = DCPPruner(num_tokens=K)(replace(tokens, text=None, text_mask=None))
    gated = make_pruner("dcp", num_tokens=K, confidence_margin=1.5)(tokens)
    trusting = make_pruner("dcp", num_tokens=K, confidence_margin=-9.0)(tokens)
    assert torch.equal(gated.indices, without.indices)
    assert not torch.equal(trusting.indices, without.indices), "without the gate the noise is believed"
    assert gated.stats["confidence"].tolist() == [0.0, 0.0]


def test_questions_in_one_batch_are_read_one_by_one():
    tokens = scene(7, asked=(2,))
    other = scene(7, asked=(9,))
    assert tokens.text is not None
    assert other.text is not None
    mixed = replace(tokens, text=torch.stack((tokens.text[0], other.text[1])))
    pruned = DCPPruner(num_tokens=K)(mixed)
    assert torch.equal(pruned.indices[0], DCPPruner(num_tokens=K)(tokens).indices[0])
    assert torch.equal(pruned.indices[1], DCPPruner(num_tokens=K)(other).indices[1])
    assert not torch.equal(pruned.indices[0], DCPPruner(num_tokens=K)(other).indices[0])


def test_words_that_are_padding_are_not_read():
    tokens = scene(8, asked=(2, 9))
    mask = torch.tensor([[True, False, True, True]]).expand(2, 4)
    assert tokens.text is not None
    short = replace(tokens, text=tokens.text[:, [0, 2, 3]], text_mask=torch.ones(2, 3, dtype=torch.bool))
    masked = DCPPruner(num_tokens=K)(replace(tokens, text_mask=mask))
    assert torch.equal(masked.indices, DCPPruner(num_tokens=K)(short).indices)


# --- the fields ---

OTHER_VALUES = {
    "schedule": ((0.4, 0.4),),
    "anchors": "coverage",
    "recovery": 0.3,
    "neighbours": 1,
    "graph_temperature": 1.0,
    "graph_sigma": None,
    "rescale": False,
    "time_weight": 40.0,
    "first_choice": "saliency",
    "distance": "mmd",
    "threshold": math.inf,
    "space": "encoder",
    "centre_temperature": 1.0,
    "centre_sigma": 0.3,
    "coverage_weight": 5.0,
    "saliency_weight": 1.0,
    "text_weight": 0.0,
    "relevance_power": 0.5,
    "confidence_margin": 2.0,
    "confidence_span": 40.0,
    "text_affinity": 0.9,
    "reselect_members": False,
    "member_relevance": 5.0,
    "member_saliency": 5.0,
}


def outcome(pruner: Pruner) -> list[torch.Tensor]:
    """All that a run decides: stages, features, indices, assignment, stats."""
    tokens = scene(9, asked=(1, 5), clarity=0.5)
    assert tokens.encoder is not None
    other_space = tokens.encoder.features.flip(2).square()
    frame = tokens.indices.unsqueeze(2) % 2
    tokens = replace(
        tokens,
        encoder=replace(tokens.encoder, features=other_space),
        positions=torch.cat((tokens.positions, frame), dim=2),
    )
    results = [torch.tensor([])]
    for stage in pruner.encoder_stages(N, 12)[:1]:
        done = stage.reduce(stage_input())
        results += [done.features, done.kept, done.assignment]
    pruned = pruner(tokens)
    return [*results, pruned.features, pruned.indices, pruned.assignment, *pruned.stats.values()]


GROUP_OF = {field.name: group for group in (ACGR, TATCS, Trigger) for field in fields(group)}


@pytest.mark.parametrize("field", [*GROUP_OF, "time_weight"])
def test_every_field_has_an_effect(field):
    recovery = {"recovery": 0.1}  # the graph's fields matter only where there is recovery
    base = make_pruner("dcp_progressive", num_tokens=K, **recovery)
    plain = outcome(base)
    changed = outcome(make_pruner("dcp_progressive", num_tokens=K, **recovery | {field: OTHER_VALUES[field]}))
    same = len(plain) == len(changed) and all(map(torch.equal, plain, changed))
    assert not same
    again = outcome(base)
    assert all(map(torch.equal, plain, again)), "the difference must come from the field"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("anchors", "random"),
        ("first_choice", "best"),
        ("distance", "kapa"),
        ("centre_temperature", 0.0),
        ("centre_sigma", -1.0),
        ("bounded", "kappa"),
        ("recovery", -0.1),
        ("recovery", math.nan),
        ("recovery", "much"),
        ("recovery", (0.3, -0.1)),
        ("recovery", (0.3,)),
        ("neighbours", 0),
        ("neighbours", 2.5),
        ("graph_temperature", 0.0),
        ("graph_sigma", 0.0),
        ("threshold", -1.0),
        ("threshold", math.nan),
        ("coverage_weight", 0.0),
        ("saliency_weight", -1.0),
        ("text_weight", math.inf),
        ("relevance_power", 0.0),
        ("confidence_margin", math.inf),
        ("confidence_span", 0.0),
        ("text_affinity", 1.1),
        ("member_relevance", -1.0),
        ("member_saliency", None),
        ("rescale", "yes"),
    ],
)
def test_a_field_outside_its_range_is_refused_by_name(field, value):
    group = GROUP_OF[field].__name__ if field in GROUP_OF else "DCPPruner"
    with pytest.raises(InvalidInputError, match=f"{group}: {field} must") as refused:
        make_pruner("dcp", num_tokens=16, **{field: value})
    assert repr(value) in str(refused.value)


def test_rules_that_need_attention_say_so():
    bare = VisualTokens.from_features(scene().features)
    assert DCPPruner(num_tokens=K)(bare).indices.shape == (2, K)
    with pytest.raises(MissingSignalError, match="partition rule 'saliency'"):
        make_pruner("dcp", num_tokens=K, first_choice="saliency")(bare)


def test_without_features_of_the_encoder_those_of_the_language_model_count():
    tokens = scene(9)
    assert tokens.encoder is not None
    same = replace(tokens, encoder=replace(tokens.encoder, features=tokens.features, cls_attention=None))
    bare = replace(tokens, encoder=None)
    assert torch.equal(DCPPruner(num_tokens=K)(bare).indices, DCPPruner(num_tokens=K)(same).indices)


# --- the groups and the presets ---


def test_a_pruner_reads_like_the_figure_and_prints_what_differs_from_the_defaults():
    pruner = DCPPruner(num_tokens=16, acgr=ACGR(recovery=5.0), tatcs=TATCS(text_weight=0), trigger=Trigger())
    assert repr(pruner) == "DCPPruner(num_tokens=16, acgr=ACGR(recovery=5.0), tatcs=TATCS(text_weight=0))"
    assert eval(repr(pruner)) == pruner
    assert repr(ProgressiveDCPPruner(num_tokens=16)) == "ProgressiveDCPPruner(num_tokens=16)"


def test_an_option_reaches_its_group_by_its_own_name_or_within_a_mapping():
    meant = DCPPruner(num_tokens=16, acgr=ACGR(anchors="saliency"), trigger=Trigger(distance="kappa", threshold=1.0))
    flat = make_pruner("dcp", num_tokens=16, anchors="saliency", distance="kappa", threshold=1.0)
    grouped = make_pruner(
        "dcp", num_tokens=16, acgr={"anchors": "saliency"}, trigger={"distance": "kappa"}, threshold=1.0
    )
    assert flat == grouped == meant
    assert make_pruner("dcp_progressive", num_tokens=16, acgr=None) == ProgressiveDCPPruner(num_tokens=16, acgr=None)
    stages = make_pruner("dcp_progressive", num_tokens=16, recovery=5.0).encoder_stages(576, 12)
    assert [stage.num_tokens for stage in stages] == [288, 144], "what is not said stays as the preset has it"


def test_no_two_groups_have_a_field_of_one_name():
    assert len(GROUP_OF) == sum(len(fields(group)) for group in (ACGR, TATCS, Trigger))
    assert not GROUP_OF.keys() & {field.name for field in fields(DCPPruner)}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"acgr": None, "recovery": 1.0}, "acgr is given whole and recovery beside it"),
        ({"tatcs": {"text_wieght": 1}}, "no option 'text_wieght'; did you mean text_weight"),
        ({"tatcs": {"anchors": "saliency"}}, "no option 'anchors'; it has space"),
        ({"acgr": "on"}, r"acgr must be ACGR\(...\) or None, got 'on'"),
        ({"trigger": "kappa"}, r"trigger must be Trigger\(...\), got 'kappa'"),
    ],
)
def test_groups_that_cannot_be_are_refused(options, says):
    with pytest.raises(InvalidInputError, match=says):
        make_pruner("dcp", num_tokens=16, **options)


def test_first_mistakes_are_answered_with_the_way_to_write_it():
    with pytest.raises(InvalidInputError, match=r"DCPPruner takes its options by name.* DCPPruner\(num_tokens=16\)"):
        DCPPruner(16)  # pyright: ignore[reportCallIssue]
    with pytest.raises(InvalidInputError, match=r"write DCPPruner\(tatcs=TATCS\(text_weight=0\), ...\)"):
        DCPPruner(num_tokens=16, text_weight=0)  # pyright: ignore[reportCallIssue]
    for made in (pickle.loads(pickle.dumps(DCPPruner(num_tokens=16))), copy.deepcopy(DCPPruner(num_tokens=16))):
        assert made == DCPPruner(num_tokens=16)


@pytest.mark.parametrize("name", ["dcp", "dcp_progressive"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_presets_keep_the_tokens_that_they_have_always_kept(name, seed):
    kept = {
        0: [[4, 8, 17, 65, 77, 112, 124, 137], [5, 17, 65, 77, 87, 89, 112, 136]],
        1: [[6, 18, 55, 65, 90, 101, 125, 138], [4, 16, 64, 78, 87, 89, 102, 136]],
    }
    anchors = {0: [[5291, 5157], [2286, 2706]], 1: [[5011, 5477], [2306, 2715]]}  # the sums of their positions
    pruner = make_pruner(name, num_tokens=8)
    assert pruner(scene(seed, asked=(1, 5), clarity=0.5)).indices.tolist() == kept[seed]
    stages = pruner.encoder_stages(N, 12)
    found = [stage.reduce(stage_input(seed)).kept.sum(dim=1).tolist() for stage in stages]
    assert found == (anchors[seed] if name == "dcp_progressive" else [])


def test_recovery_can_be_left_out_at_the_last_stage():
    both, first, none = (
        make_pruner("dcp_progressive", num_tokens=8, recovery=recovery).encoder_stages(N, 12)
        for recovery in (5.0, (5.0, 0.0), 0.0)
    )
    assert first[0] != none[0]
    for stage, like in zip(first, (both[0], none[1]), strict=True):
        assert torch.equal(stage.reduce(stage_input()).features, like.reduce(stage_input()).features)
