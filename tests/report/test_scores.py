"""Relative scores, leads and differences on records small enough to work out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dcp_prune.report.results import load_cells
from dcp_prune.report.scores import GapError, Scores

TASK = np.tile(np.arange(6) % 3, 40)  # counting, existence, reading


def share(*shares: float) -> np.ndarray:
    """Answers of which this share of each task is right."""
    score = np.zeros(240)
    for task, part in enumerate(shares):
        places = np.flatnonzero(task == TASK)
        score[places[: round(part * len(places))]] = 1
    return score


def scores(made, **settings) -> Scores:
    (cell,) = load_cells([made.write()])
    return Scores(cell, **{"resamples": 500, **settings})


def test_a_relative_score_is_the_mean_over_the_tasks_of_the_share_of_the_unpruned_score(sweep):
    found = scores(sweep().add("none", 576, share(0.8, 1.0, 0.5)).add("dcp", 16, share(0.4, 1.0, 0.25)))
    place = found.cell.place("dcp", 16)
    assert found.relative_by_task[0, place].tolist() == [0.5, 1.0, 0.5]
    assert found.relative[0, place] == pytest.approx(2 / 3)
    assert (found.relative[:, found.cell.full] == 1).all()


def test_above_the_floor_what_needs_no_image_does_not_count(sweep):
    made = sweep().add("none", 576, share(0.8, 1.0, 0.5)).add("none", 0, share(0.3, 0.5, 0.1))
    found = scores(made.add("dcp", 16, share(0.55, 0.75, 0.5)))
    place, floor = found.cell.place("dcp", 16), found.cell.floor
    assert found.above_floor[0, place] == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    assert found.above_floor[0, floor] == pytest.approx(0.0)
    assert found.above_floor[0, found.cell.full] == pytest.approx(1.0)


def test_a_task_without_a_right_unpruned_answer_is_left_out_and_named(sweep):
    found = scores(sweep().add("none", 576, share(0.8, 0.0, 0.5)).add("dcp", 16, share(0.4, 1.0, 0.5)))
    assert found.silent == ("existence",)
    assert found.relative[0, found.cell.place("dcp", 16)] == pytest.approx(0.75)
    nothing = scores(sweep("nothing").add("none", 576, share(0, 0, 0)).add("dcp", 16, share(1, 1, 1)))
    with pytest.raises(GapError, match="nothing right"):
        _ = nothing.relative


def test_a_task_on_which_the_image_does_not_help_has_no_score_above_the_floor(sweep):
    made = sweep().add("none", 576, share(0.9, 0.5, 0.9)).add("none", 0, share(0.3, 0.5, 0.3))
    found = scores(made.add("dcp", 16, share(0.6, 1.0, 0.9)))
    assert found.blind == ("existence",)
    assert found.above_floor[0, found.cell.place("dcp", 16)] == pytest.approx(0.75)


def test_without_the_unpruned_model_or_the_floor_the_gap_says_what_to_sweep(sweep):
    found = scores(sweep().add("dcp", 16, share(1, 1, 1)).add("none", 0, share(0, 0, 0)))
    with pytest.raises(GapError, match="--pruner none"):
        _ = found.relative
    found = scores(sweep("b").add("dcp", 16, share(1, 1, 1)).add("none", 576, share(1, 1, 1)))
    with pytest.raises(GapError, match="--num-tokens 0"):
        _ = found.above_floor


def test_a_lead_is_paired_so_that_it_is_surer_than_the_scores_themselves(sweep):
    rng = np.random.default_rng(0)
    easy = rng.random(40)[np.repeat(np.arange(40), 6)]
    base = rng.random(240) < easy
    made = sweep().add("none", 576, np.ones(240)).add("scope", 16, base)
    found = scores(made.add("dcp", 16, base | (rng.random(240) < 0.15)))
    (lead,) = found.leads()
    assert lead.points.verdict() == "ahead"
    own = [found.resampling.interval(100 * found.relative[:, found.cell.place(name, 16)]) for name in ("dcp", "scope")]
    assert own[0].low < own[1].high  # by themselves they overlap
    assert lead.points.value == pytest.approx(own[0].value - own[1].value)
    assert lead.points.high - lead.points.low < own[0].high - own[0].low


def test_presets_of_dcp_are_no_rivals_and_its_variants_differ_from_it_as_it_comes(sweep):
    made = sweep().add("none", 576, share(1, 1, 1)).add("dcp", 16, share(0.9, 0.9, 0.9))
    made.add("dcp_progressive", 16, share(0.95, 0.95, 0.95)).add("holov", 16, share(0.5, 0.5, 0.5))
    made.add("dcp(threshold=inf)", 16, share(0.8, 0.8, 0.8)).add("dcp@wrong", 16, share(0.7, 0.7, 0.7))
    found = scores(made.add("mmtok@wrong", 16, share(0, 0, 0)))
    assert found.best_lead(16).over.label == "holov"
    values = {lead.entry.label: round(lead.points.value, 6) for lead in found.variants()}
    assert values == {"dcp_progressive": 5.0, "dcp(threshold=inf)": -10.0, "dcp@wrong": -20.0}


def test_one_image_gives_values_without_intervals(sweep):
    made = sweep(images=1).add("none", 576, np.ones(6)).add("dcp", 16, [1, 1, 1, 1, 1, 0])
    found = scores(made.add("scope", 16, [0, 1, 1, 1, 1, 0]))
    (lead,) = found.leads()
    assert lead.points.value == pytest.approx(100 / 6)
    assert lead.points.verdict() == "unknown"
    assert math.isnan(found.accuracy(0).low)


def test_a_rare_task_that_a_draw_misses_is_left_out_of_that_draw_only(sweep):
    made = sweep(images=4)
    made.task = np.where(made.image == 0, 1, 0)
    found = scores(made.add("none", 576, np.ones(24)).add("dcp", 16, np.where(made.task == 1, 0.0, 1.0)))
    relative = found.relative[:, found.cell.place("dcp", 16)]
    assert relative[0] == 0.5
    assert set(np.unique(relative)) == {0.0, 0.5, 1.0}
    assert not np.isnan(relative).any()


ADAPTIVE = "dcp(max_distance=0.4,num_tokens=(4,64))"
BOUND = {"max_distance": 0.4}


def place_of_adaptive(found: Scores) -> int:
    place = found.cell.place(ADAPTIVE, 64)
    assert place is not None
    return place


def test_an_adaptive_method_is_compared_with_fixed_budgets_of_its_mean(sweep):
    kept = np.where(np.arange(240) < 180, 8, 9)  # 8.25 in the mean
    made = sweep().add("none", 576, share(1.0, 1.0, 1.0)).add("dcp", 8, share(0.4, 0.6, 0.8))
    made.add("dcp", 9, share(0.8, 0.8, 0.8)).add("dcp", 16, share(1.0, 1.0, 1.0))
    found = scores(made.add(ADAPTIVE, 64, share(0.7, 0.7, 0.7), options=BOUND, kept=kept))
    place = place_of_adaptive(found)
    assert found.cell.entries[place].is_adaptive
    assert found.mean_kept[0, place] == 8.25
    mixed = found.at_same_mean(place)
    eight, nine = (found.relative[:, found.cell.place("dcp", budget)] for budget in (8, 9))
    assert mixed[0] == pytest.approx(0.75 * 0.6 + 0.25 * 0.8)
    share_of_nine = found.mean_kept[:, place] - 8
    assert share_of_nine.min() < 0.2 < 0.3 < share_of_nine.max(), "draws have means of their own"
    np.testing.assert_allclose(mixed, (1 - share_of_nine) * eight + share_of_nine * nine)


def test_a_whole_mean_needs_one_fixed_budget(sweep):
    made = sweep().add("none", 576, share(1.0, 1.0, 1.0)).add("dcp", 8, share(0.4, 0.6, 0.8))
    found = scores(made.add(ADAPTIVE, 64, share(0.7, 0.7, 0.7), options=BOUND, kept=np.full(240, 8)))
    assert (found.at_same_mean(place_of_adaptive(found)) == found.relative[:, found.cell.place("dcp", 8)]).all()


def test_without_the_neighbouring_fixed_budgets_there_is_no_comparison(sweep):
    made = sweep().add("none", 576, share(1.0, 1.0, 1.0)).add("dcp", 8, share(0.4, 0.6, 0.8))
    made.add("dcp", 16, share(1.0, 1.0, 1.0))
    found = scores(made.add(ADAPTIVE, 64, share(0.7, 0.7, 0.7), options=BOUND, kept=np.where(TASK == 0, 8, 9)))
    with pytest.raises(GapError, match=r"`dcp` was not measured at 9 tokens, beside .* with 8.7 in the mean"):
        found.at_same_mean(place_of_adaptive(found))


def test_an_adaptive_method_is_neither_a_contender_nor_a_variant_at_a_budget(sweep):
    made = sweep().add("none", 576, share(1.0, 1.0, 1.0)).add("dcp", 64, share(0.4, 0.6, 0.8))
    made.add("dcp(threshold=inf)", 64, share(0.4, 0.6, 0.6))
    found = scores(made.add(ADAPTIVE, 64, share(0.7, 0.7, 0.7), options=BOUND, kept=np.full(240, 8)))
    assert found.cell.contenders == ("dcp",)
    assert [lead.entry.label for lead in found.variants()] == ["dcp(threshold=inf)"]


def test_records_that_do_not_say_what_was_kept_had_fixed_budgets(sweep):
    found = scores(sweep().add("none", 576, share(1.0, 1.0, 1.0)).add("dcp", 16, share(0.4, 0.6, 0.8)))
    assert {float(row[0]) for row in found.mean_kept.T} == {16.0, 576.0}
