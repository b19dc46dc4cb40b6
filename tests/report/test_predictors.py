"""What predicts the loss: correlations against scipy, and what is left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dcp_prune.report.predictors import Prediction
from dcp_prune.report.results import PLAIN, load_cells
from dcp_prune.report.scores import GapError, Scores


def correlation(x, y) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def rank_correlation(x, y) -> float:
    return correlation(stats.rankdata(x), stats.rankdata(y))


@pytest.fixture
def prediction(graded) -> Prediction:
    (cell,) = load_cells([graded().write()])
    return Prediction(Scores(cell, resamples=300))


def test_the_correlations_are_those_of_the_mean_distance_with_accuracy(prediction):
    cell = prediction.scores.cell
    found = prediction.named("kappa")
    rows = [place for place, entry in enumerate(cell.entries) if entry.is_contender]
    content = [place for place in rows if cell.entries[place].pruner not in PLAIN]
    for chosen, spearman, pearson in (
        (rows, found.overall.spearman, found.overall.pearson),
        (content, found.overall.spearman_content, found.overall.pearson_content),
    ):
        x, y = cell.distances["kappa"][chosen].mean(axis=1), cell.score[chosen].mean(axis=1)
        assert spearman.value == pytest.approx(rank_correlation(x, y), abs=1e-6)
        assert pearson.value == pytest.approx(correlation(x, y), abs=1e-6)
        assert spearman.low <= spearman.value <= spearman.high
    tasks = [(row, task) for row in content for task in range(3)]
    x = [cell.distances["kappa"][row, cell.task == task].mean() for row, task in tasks]
    y = [cell.score[row, cell.task == task].mean() for row, task in tasks]
    assert found.by_task.spearman_content.value == pytest.approx(rank_correlation(x, y), abs=1e-6)
    assert (found.overall.points, found.overall.points_content, found.by_task.points_content) == (21, 15, 45)


def test_the_strongest_comes_first_and_kappa_is_blind_to_relevance(prediction):
    names = [predictor.name for predictor in prediction.predictors]
    assert names[0] == "run.coverage_both"
    assert set(names) == {"kappa", "eval.mmd", "run.coverage_both"}
    best, kappa = prediction.best(at_run_time=True), prediction.named("kappa")
    assert best.name == "run.coverage_both"
    assert best.overall.spearman.value < -0.95
    assert abs(kappa.overall.spearman_content.value) > abs(kappa.overall.spearman.value) + 0.2


def test_the_area_tells_answers_that_break_among_those_the_unpruned_model_has_right(prediction):
    cell = prediction.scores.cell
    asked = cell.score[cell.full] == 1
    rows = [place for place, entry in enumerate(cell.entries) if entry.is_contender]
    values, broken = cell.distances["kappa"][rows][:, asked].ravel(), cell.score[rows][:, asked].ravel() == 0
    wins = np.mean(np.sign(values[broken][:, None] - values[~broken][None]) / 2 + 0.5)
    assert prediction.named("kappa").breaks.value == pytest.approx(wins, abs=1e-6)
    assert prediction.named("run.coverage_both").breaks_within.value > 0.9
    noise = prediction.named("eval.mmd")
    assert noise.breaks.low < 0.5 < noise.breaks.high


def test_equal_distances_share_a_rank(sweep):
    made = sweep().add("none", 576, np.ones(240), 0.0)
    for number, (name, kappa) in enumerate({"dcp": 1.0, "scope": 1.0, "holov": 2.0, "random": 3.0}.items()):
        made.add(name, 16, np.arange(240) % 12 >= number, kappa)
    (cell,) = load_cells([made.write()])
    found = Prediction(Scores(cell, resamples=200)).named("kappa").overall
    assert found.spearman.value == pytest.approx(rank_correlation([1, 1, 2, 3], [4, 3, 2, 1]))


def test_a_method_without_the_distance_is_no_point_of_it_and_what_never_varies_has_no_correlation(sweep):
    made = sweep().add("none", 576, np.ones(240), 0.0)
    for number, name in enumerate(("dcp", "scope", "holov", "mmtok")):
        more = {} if name == "mmtok" else {"run_mmd": np.full(240, 0.25)}
        made.add(name, 16, np.arange(240) % 12 >= number, float(number), **more)
    (cell,) = load_cells([made.write()])
    prediction = Prediction(Scores(cell, resamples=200))
    assert prediction.named("run.mmd").overall.points == 3
    assert math.isnan(prediction.named("run.mmd").overall.spearman.value)
    assert prediction.predictors[0].name == "kappa"


def test_who_drops_tokens_inside_the_encoder_is_no_point_of_a_distance_at_run_time(sweep):
    made = sweep().add("none", 576, np.ones(240), 0.0)
    for number, name in enumerate(("dcp", "scope", "holov", "flowcut")):
        far = np.full(240, float(number))
        seen = np.zeros(240) if name == "flowcut" else far
        made.add(name, 16, np.arange(240) % 12 >= number, float(number), run_mmd=seen, eval_mmd=far)
    (cell,) = load_cells([made.write()])
    prediction = Prediction(Scores(cell, resamples=200))
    assert {cell.entries[row].pruner for row in prediction.staged} == {"flowcut"}
    assert (prediction.named("run.mmd").overall.points, prediction.named("eval.mmd").overall.points) == (3, 4)
    assert prediction.named("run.mmd").overall.spearman.value == pytest.approx(-1.0)


def test_two_points_are_no_correlation(sweep):
    made = sweep().add("none", 576, np.ones(240), 0.0).add("dcp", 16, np.ones(240), 1.0)
    (cell,) = load_cells([made.add("scope", 16, np.zeros(240), 2.0).write()])
    with pytest.raises(GapError, match="three points"):
        _ = Prediction(Scores(cell, resamples=200)).predictors
