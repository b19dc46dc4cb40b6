"""Reading records: what belongs together, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from dcp_prune.errors import RecordsError
from dcp_prune.report.results import digest, load_cells

ONES = np.ones(240)


def test_all_methods_lie_on_the_same_questions_whatever_the_order_of_their_rows(sweep):
    made = sweep()
    right = np.arange(240) % 7 == 0
    made.add("none", 576, ONES, 0.0).add("dcp", 16, right, np.arange(240.0))
    made.parts[1] = made.parts[1].sample(fraction=1.0, shuffle=True, seed=0)
    (cell,) = load_cells([made.write()])
    place = cell.place("dcp", 16)
    assert cell.score[place].sum() == right.sum()
    assert np.array_equal(cell.distances["kappa"][place] % 7 == 0, cell.score[place] == 1)
    # Image and task go with the question.
    assert np.array_equal(np.bincount(cell.image), np.full(40, 6))
    numbers = cell.distances["kappa"][place].astype(int)
    assert np.array_equal(cell.task, numbers % 3)
    assert cell.tasks == ("counting", "existence", "reading")


def test_folders_of_the_same_questions_become_one_cell_and_others_stay_apart(sweep, tmp_path):
    sweep("all/a").add("none", 576, ONES, 0.0).add("dcp", 16, ONES, 0.1).write()
    sweep("all/a-ablation").add("dcp", 16, ONES, 0.1).add("dcp(threshold=inf)", 16, ONES, 0.1).write()
    sweep("all/b", difficulty="standard").add("none", 576, ONES, 0.0).write()
    crowded, standard = load_cells([tmp_path / "all"])
    assert (crowded.name, standard.name, crowded.slug) == ("weak, crowded", "weak, standard", "weak-crowded")
    assert {entry.label for entry in crowded.entries} == {"none", "dcp", "dcp(threshold=inf)"}
    assert len(crowded.entries) == 3  # the base was measured twice and counts once


def test_cells_that_would_be_called_the_same_are_told_apart(sweep):
    first = sweep("a").add("dcp", 16, ONES, 0.1).write()
    second = sweep("b", questions=1000).add("dcp", 16, ONES, 0.1).write()
    assert [cell.name for cell in load_cells([first, second])] == [
        "weak, crowded, 560 questions",
        "weak, crowded, 1000 questions",
    ]


def test_the_unpruned_model_is_one_method_though_images_differ_in_their_tokens(sweep):
    made = sweep().add("none", 576, ONES, 0.0).add("none", 0, ONES)
    odd = made.image % 2 == 1
    made.parts[0] = made.parts[0].with_columns(num_tokens=pl.Series(np.where(odd, 2880, 576), dtype=pl.Int32))
    (cell,) = load_cells([made.write()])
    assert [(entry.label, entry.num_tokens) for entry in cell.entries] == [("none", 2880), ("none", 0)]
    assert (cell.full, cell.floor) == (0, 1)


def test_only_pruners_as_they_come_with_the_right_question_are_contenders(sweep):
    made = sweep()
    for label in (
        "none",
        "dcp",
        "dcp@none",
        "dcp(text_weight=0)",
        "dcp(text_weight=0)@wrong",
        "mmtok",
        "dcp_progressive",
    ):
        made.add(label, 16, ONES, 0.1)
    (cell,) = load_cells([made.write()])
    assert cell.contenders == ("dcp", "dcp_progressive", "mmtok")
    assert cell.budgets == (16,)


def test_methods_with_other_questions_are_refused_by_name(sweep):
    made = sweep().add("none", 576, ONES, 0.0).add("dcp", 16, ONES[:100], 0.1).add("scope", 16, ONES, 0.1)
    with pytest.raises(RecordsError, match=r"same 240 questions: dcp at 16 tokens \(100\); run the sweep again"):
        load_cells([made.write()])


def test_a_label_with_other_options_in_another_folder_is_refused(sweep):
    first = sweep("a").add("dcp", 16, ONES, 0.1, options={"text_weight": 1.0}).write()
    second = sweep("b").add("dcp", 16, ONES, 0.1, options={"text_weight": 0.5}).write()
    with pytest.raises(RecordsError, match="dcp at 16 tokens has other options"):
        load_cells([first, second])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "holds no records"),
        (lambda folder: [part.unlink() for part in folder.glob("parts/*")], "holds no rows yet"),
        (lambda folder: (folder / "parts" / "000000-0.parquet").write_bytes(b"PAR1"), "cut short"),
        (
            lambda folder: (folder / "manifest.json").write_text(
                json.dumps({**json.loads((folder / "manifest.json").read_text()), "version": 3})
            ),
            "is of version 3, and this program reads version 1 and 2",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence(sweep, spoil, sentence):
    folder = sweep().add("dcp", 16, ONES, 0.1).write()
    spoil(folder)
    with pytest.raises(RecordsError, match=sentence) as refused:
        load_cells([folder])
    assert "\n" not in str(refused.value)


def test_a_question_with_two_tasks_is_refused(sweep):
    made = sweep().add("none", 576, ONES, 0.0).add("dcp", 16, ONES, 0.1)
    made.parts[1] = made.parts[1].with_columns(task=pl.lit("reading"))
    with pytest.raises(RecordsError, match="has several images or tasks"):
        load_cells([made.write()])


def test_an_answer_without_a_score_is_refused(sweep):
    made = sweep().add("dcp", 16, np.where(np.arange(240) == 5, np.nan, 1.0), 0.1)
    with pytest.raises(RecordsError, match="dcp at 16 tokens has answers without a score"):
        load_cells([made.write()])


def test_missing_kappas_and_questions_for_tuning_are_said(sweep):
    kappa = np.where(np.arange(240) == 5, np.nan, 0.1)
    (cell,) = load_cells([sweep(split="tuning").add("dcp", 16, ONES, kappa).add("none", 0, ONES).write()])
    assert cell.notes == (
        "These are tuning questions, which parameters may have been chosen on: nothing to report from.",
        "Without a finite kappa for every question: `dcp`.",
    )


def test_the_digest_changes_with_the_records(sweep):
    folder = sweep().add("dcp", 16, ONES, 0.1).write()
    before = digest(folder)
    assert before == digest(folder)
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text() + " ")
    assert digest(folder) != before
