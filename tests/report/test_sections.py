"""The whole report: its parts, what they say, and what they say when something is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcp_prune.errors import InvalidInputError
from dcp_prune.report.build import build, write
from dcp_prune.report.pages import main as pages
from dcp_prune.report.predictors import Prediction
from dcp_prune.report.results import load_cells
from dcp_prune.report.scores import Scores
from dcp_prune.report.sections import SECTIONS, Analysis, Output
from dcp_prune.report.targets import targets

PROJECT = Path(__file__).parents[2]
ONES = np.ones(240)


@pytest.fixture(scope="module")
def files(graded_folder) -> dict[str, bytes]:
    return build([graded_folder], graded_folder.parent / "out", resamples=200)


def section(files: dict[str, bytes], kind: str) -> str:
    page = files["report.md"].decode()
    return page.partition(f"## {SECTIONS[kind][0]}\n")[2].partition("\n## ")[0]


def part(folder: Path, kind: str) -> tuple[str, dict[str, bytes]]:
    """One part alone, and its files."""
    out = Output(folder.parent / "out", formats=("png",))
    return SECTIONS[kind][1]([Analysis(cell, 300) for cell in load_cells([folder])], out), out.files


def rows(text: str) -> dict[str, list[str]]:
    """Fields of every row of the tables by the row's name."""
    found = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(" `*"): [field.strip() for field in row[1:]] for row in found}


def test_accuracy_counts_answers_and_needs_no_unpruned_model(sweep):
    half = np.tile([1.0, 0.0], 120)
    made = sweep().add("dcp", 8, half).add("dcp", 16, ONES).add("random", 8, 0 * ONES)
    text, files = part(made.write(), "accuracy")
    assert [name for name in rows(text) if name in ("dcp", "random")] == ["dcp", "random"]
    assert [field.split()[0] for field in rows(text)["dcp"]] == ["100.0", "50.0"]
    assert rows(text)["random"][0] == ""
    assert "The model itself" not in text
    text, _ = part(made.add("none", 576, ONES).add("none", 0, half).write(), "accuracy")
    assert re.search(r"all tokens 100\.0 \[.*\]; no image 50\.0 \[", text)
    assert "tables/accuracy-weak-crowded.md" in files


def test_adaptive_budgets_stand_beside_fixed_ones_of_the_same_mean(sweep):
    made = sweep().add("none", 576, ONES).add("none", 0, 0 * ONES)
    rng = np.random.default_rng(0)
    luck = rng.random(240)
    for budget in (7, 8, 9):
        made.add("dcp", budget, luck < 0.1 * budget, 0.2)
    label = "dcp(max_distance=0.4,num_tokens=(4,64))"
    kept = np.tile([4, 12, 8], 80)
    made.add(label, 64, luck < 0.95, 0.2, options={"max_distance": 0.4}, kept=kept)
    text, files = part(made.write(), "adaptive")
    (row,) = [row for name, row in rows(text).items() if name == label]
    assert row[0].startswith("8.0")
    assert row[1] == "4 to 12"
    assert row[5] == "ahead"
    assert float(row[4].split()[0]) == pytest.approx(float(row[2].split()[0]) - float(row[3].split()[0]), abs=0.11)
    assert {"tables/adaptive-weak-crowded.md", "tables/adaptive-weak-crowded.tex"} <= files.keys()


def test_easy_and_crowded_pictures_are_also_looked_at_together(sweep):
    label = "dcp(max_distance=0.4,num_tokens=(4,64))"
    everywhere = {}
    for name, kept in (("crowded", 12), ("standard", 4)):
        made = sweep(f"mix/{name}", difficulty=name).add("none", 576, ONES)
        for budget in (7, 8, 9):
            made.add("dcp", budget, np.tile([1.0, 0.5], 120) if name == "crowded" else ONES, 0.2)
        made.add(f"dcp(threshold=inf,note={name})".replace(",note=", "_"), 8, ONES, 0.2)
        everywhere[name] = made.add(
            label, 64, ONES, 0.2, options={"max_distance": 0.4}, kept=np.full(240, kept)
        ).write()
    out = Output(everywhere["crowded"].parent, formats=("png",))
    analyses = [Analysis(cell, 300) for cell in load_cells([everywhere["crowded"].parent])]
    text = SECTIONS["adaptive"][1](analyses, out)
    parts = {part.split("\n")[0]: rows(part) for part in text.split("### ")[1:]}
    assert list(parts) == ["`weak`, crowded", "`weak`, crowded and standard", "`weak`, standard"]
    everything = parts["`weak`, crowded and standard"]
    alone, together = parts["`weak`, crowded"][label], everything[label]
    assert alone[0].startswith("12.0")
    assert alone[3:] == ["", "", ""], "12 tokens were not measured as a fixed budget"
    assert together[0].startswith("8.0")
    assert float(together[3].split()[0]) == pytest.approx(87.5)
    assert together[5] == "ahead"
    assert [everything[f"of it {kind}"][0].split()[0] for kind in ("crowded", "standard")] == ["12.0", "4.0"]
    assert [everything[f"of it {kind}"][3].split()[0] for kind in ("crowded", "standard")] == ["75.0", "100.0"]


def test_without_adaptive_budgets_their_part_says_so(graded_folder):
    assert part(graded_folder, "adaptive")[0] == "*Every method had a fixed budget.*"


def test_every_part_is_there_and_every_link_leads_to_a_file(files):
    page = files["report.md"].decode()
    assert [title for title, _ in SECTIONS.values()] == re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert "Not here" not in page
    figures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert set(figures) == {name for name in files if name.endswith(".png")}
    assert len(figures) == 4
    for name in files:
        if name.endswith(".png"):
            assert Image.open(BytesIO(files[name])).width > 800
            assert files[name.replace(".png", ".svg")].startswith(b"<?xml")
    assert {name for name in files if name.endswith(".tex")} >= {"tables/tasks-weak-crowded.tex", "tables/aims.tex"}
    assert all(name.replace(".tex", ".md") in files for name in files if name.endswith(".tex"))


def test_equal_records_give_equal_bytes_and_other_records_other_ones(files, graded_folder):
    analyses = [Analysis(cell, 200) for cell in load_cells([graded_folder])]
    for kind in ("tokens", "prediction"):
        out = Output(graded_folder.parent / "out")
        SECTIONS[kind][1](analyses, out)
        assert out.files
        assert all(files[name] == data for name, data in out.files.items())
    # Another sample of the same size moves the points.
    cell = analyses[0].cell
    out = Output(graded_folder.parent / "out", formats=("png",))
    SECTIONS["tokens"][1]([Analysis(replace(cell, score=cell.score[:, ::-1] * 0.9), 200)], out)
    (name,) = out.files
    assert out.files[name] != files[name]


def test_the_best_is_bold_only_where_it_is_surely_ahead_and_ties_are_marked(sweep, tmp_path):
    rng = np.random.default_rng(0)
    right = rng.random(240) < 0.8
    made = sweep().add("none", 576, ONES, 0.0).add("none", 0, np.zeros(240))
    made.add("dcp", 32, right, 0.1).add("scope", 32, right & (rng.random(240) < 0.7), 0.1).add("holov", 32, ONES * 0, 0)
    made.add("dcp", 16, right, 0.1).add("scope", 16, np.roll(right, 3), 0.1).add("holov", 16, ONES * 0, 0.3)
    text, files = part(made.write(), "summary")
    found = rows(text)
    assert found["dcp"][0].startswith("**")
    assert "†" in found["dcp"][1]
    assert "†" in found["scope"][1]
    assert not re.search("[†*]", found["holov"][1] + found["scope"][0])
    latex = files["tables/summary-weak-crowded.tex"].decode()
    assert latex.count(r"\textbf") == 1
    assert latex.count(r"\dagger") == 2


def test_leads_have_verdicts_and_the_best_rival_comes_first(files):
    found = rows(section(files, "leads"))
    assert list(found)[2:4] == ["mmtok", "scope"]
    assert found["random"][1::2] == ["ahead"] * 3
    assert all(re.fullmatch(r"\+\d+\.\d \[\+\d+\.\d, \+\d+\.\d\]", lead) for lead in found["random"][::2])


def test_the_ablation_and_the_noise_name_every_variant_and_condition(files):
    found = rows(section(files, "ablation"))
    assert {"dcp(threshold=inf)", "dcp@none", "dcp@wrong", "dcp@noise=0.5", "dcp@noise=1"} <= set(found)
    assert not any(name.startswith("mmtok") for name in found)
    assert found["dcp(threshold=inf)"][0].startswith("-")
    text = rows(section(files, "text"))
    assert {"the question", "noise 0.5", "noise 1", "another image's question", "nothing"} <= set(text)
    assert text["another image's question"][-1] == "against `dcp@none`"
    assert text["nothing"][1:] == [""] * 4  # MMTok needs a question


def test_predictors_are_shown_with_kappa_and_all_are_in_the_file(files):
    found = rows(section(files, "prediction"))
    assert list(found)[2] == "run.coverage_both"
    assert set(found) >= {"kappa", "eval.mmd"}
    assert all(len(row) == 10 for row in found.values())
    assert "of at least 0.9. Measured: 1.00" in section(files, "prediction")


def test_aims_are_met_missed_or_tied_by_their_intervals(sweep):
    rng = np.random.default_rng(0)
    right = rng.random(240) < 0.95
    made = (
        sweep().add("none", 576, ONES, 0.0).add("dcp", 16, right, 0.1).add("scope", 16, right & (rng.random(240) < 0.5))
    )
    made.add("dcp", 32, right, 0.1).add("scope", 32, right, 0.1)
    made.add("dcp", 64, right & (rng.random(240) < 0.5)).add("scope", 64, right)
    (cell,) = load_cells([made.write()])
    scores = Scores(cell, resamples=300)
    verdicts = {target.aim: target.verdict for target in targets(scores, Prediction(scores))}
    assert verdicts["`dcp` first at 16 tokens: lead over the best rival"] == "met"
    assert verdicts["`dcp` first at 32 tokens: lead over the best rival"] == "tie"
    assert verdicts["`dcp` first at 64 tokens: lead over the best rival"] == "missed"
    assert verdicts["at least 4,000 held-out questions"] == "missed"
    assert not [aim for aim in verdicts if "run time" in aim], "only sweeps with distances have this aim"


def test_what_is_missing_is_said_where_it_would_be(sweep):
    folder = sweep().add("dcp", 16, ONES, 0.1).write()
    for kind in ("summary", "tasks", "radar"):
        assert "*Not here: the unpruned model was not measured; sweep `--pruner none`" in part(folder, kind)[0]
    assert "*Not here: nothing was measured with another text than the question.*" in part(folder, "text")[0]
    assert "three points" in part(folder, "prediction")[0]
    assert "not measured" in part(folder, "aims")[0]
    assert "nan" not in part(folder, "aims")[0]
    alone = sweep("alone").add("none", 576, ONES, 0.0).add("dcp", 16, ONES, 0.1).write()
    assert "*Not here: `dcp` and another pruner were not measured at one budget.*" in part(alone, "leads")[0]
    assert "*Not here: no variant of `dcp` was measured beside `dcp`.*" in part(alone, "ablation")[0]


def test_without_the_floor_only_the_second_form_is_missing(sweep):
    text, _ = part(sweep().add("none", 576, ONES, 0.0).add("dcp", 16, ONES, 0.1).write(), "tasks")
    assert "No score above the floor: the floor was not measured" in text
    assert rows(text)["dcp"][-1].startswith("100.0")


def test_one_image_and_questions_of_ones_own_make_a_report_without_intervals_and_aims(graded):
    source = {"kind": "jsonl", "path": "data/mine.jsonl", "questions": 6}
    made = graded(images=1, budgets=(16,))
    made.source = source
    folder = made.write(model={"name": "llava-hf/llava-1.5-7b-hf"})
    assert part(folder, "summary")[0].startswith("### `llava-1.5-7b-hf`, mine")
    assert "There is one image only" in part(folder, "measured")[0]
    assert part(folder, "aims")[0] == "*These records are not from the testbed, for which the aims are set.*"
    text = "".join(part(folder, kind)[0] for kind in ("tokens", "summary", "tasks", "leads", "ablation", "prediction"))
    assert "Not here" not in text
    assert not re.search(r"\d \[", text)
    assert "nan" not in text


def test_writing_leaves_foreign_files_alone_and_refuses_a_file_as_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    write({"tables/a.md": b"a", "report.md": b"r"}, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert (tmp_path / "out" / "tables" / "a.md").read_bytes() == b"a"
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="it is a file; name a folder"):
        write({"report.md": b""}, tmp_path / "file")


@pytest.fixture
def document(graded, tmp_path) -> Path:
    graded("results/sweeps/weak-crowded", budgets=(32, 16)).write()
    (tmp_path / "docs").mkdir()
    path = tmp_path / "docs" / "results.md"
    kinds = ("measured", "summary", "radar")
    marks = "".join(f"<!-- table:begin {kind} ../results/sweeps -->\n<!-- table:end -->\nbetween\n" for kind in kinds)
    path.write_text(f"# Results\n{marks}")
    return path


def test_a_document_is_rebuilt_between_its_marks_and_then_without_a_difference(document):
    assert pages(["--check", str(document)]) == 1
    assert not (document.parent / "figures").exists()  # checking writes nothing
    assert pages([str(document)]) == 0
    text = document.read_text()
    assert text.count("\nbetween\n") == 3
    assert "](../results/sweeps/weak-crowded) (" in text
    for figure in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (document.parent / figure).is_file()
    assert pages(["--check", str(document)]) == 0
    (document.parent / "figures" / "radar-weak-crowded.png").write_bytes(b"old")
    assert pages(["--check", str(document)]) == 1


def test_a_page_elsewhere_shows_the_figures_of_the_docs(document):
    readme = document.parents[1] / "README.md"
    readme.write_text("<!-- table:begin tokens results/sweeps/weak-crowded -->\n<!-- table:end -->\n")
    assert pages([str(readme)]) == 0
    assert "](docs/figures/tokens-weak-crowded.png)" in readme.read_text()
    assert (document.parent / "figures" / "tokens-weak-crowded.png").is_file()


def test_a_page_shows_records_and_result_files_and_keeps_what_is_around_them(document):
    readme = document.parents[1] / "README.md"
    (readme.parent / "results" / "cost.json").write_text((PROJECT / "results" / "latency-cpu.json").read_text())
    marks = [
        f"<!-- table:begin {kind} {source} -->\nold\n<!-- table:end -->\n"
        for kind, source in (("summary", "results/sweeps/weak-crowded"), ("cost", "results/cost.json"))
    ]
    readme.write_text(f"before\n{marks[0]}between\n{marks[1]}after\n")
    assert pages([str(readme)]) == 0
    text = readme.read_text()
    assert re.findall(r"^(?:before|between|after|old)$", text, re.MULTILINE) == ["before", "between", "after"]
    assert "| relative score, % |" in text
    assert "[`results/cost.json`](results/cost.json)" in text
    assert not (document.parent / "figures").exists()
    (readme.parent / "results" / "cost.json").unlink()
    assert pages(["--check", str(readme)]) == 1


def test_records_of_one_name_in_several_folders_are_told_apart(graded, document):
    graded("results/distances/weak-crowded", images=20, budgets=(16,), questions=280).write()
    document.write_text("<!-- table:begin measured ../results -->\n<!-- table:end -->\n")
    assert pages([str(document)]) == 0
    table = rows(document.read_text())
    assert table["weak, crowded, 280 questions"][-1].startswith(
        "[`distances/weak-crowded`](../results/distances/weak-crowded) ("
    )
    assert table["weak, crowded, 560 questions"][-1].startswith(
        "[`sweeps/weak-crowded`](../results/sweeps/weak-crowded) ("
    )


def test_the_command_refuses_a_missing_document_with_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "dcp_prune.report.pages", str(tmp_path / "none.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("cannot read ")
    assert done.stderr.count("\n") == 1


def test_records_that_are_not_there_yet_and_unknown_kinds_are_said(document, capsys):
    shutil.rmtree(document.parents[1] / "results")
    assert pages([str(document)]) == 0
    assert "*Not measured yet: no records in `../results/sweeps`.*" in document.read_text()
    document.write_text("<!-- table:begin sumary ../results/sweeps -->\n<!-- table:end -->\n")
    with pytest.raises(InvalidInputError, match="unknown part 'sumary'; the kinds are"):
        pages([str(document)])
    with pytest.raises(InvalidInputError, match="name the documents"):
        pages([])


def test_whom_dcp_beats_is_what_the_intervals_say(graded):
    folder = graded(budgets=(16,)).add("mine", 16, ONES, 0.1).write()
    text, _ = part(folder, "standing")
    (row,) = [fields for name, fields in rows(text).items() if name.startswith("weak, crowded")]
    (cell,) = load_cells([folder])
    expected = {"ahead": set(), "tie": set(), "behind": set()}
    for lead in Scores(cell, resamples=300).leads():
        expected[lead.points.verdict()].add(lead.over.label)
    found = [set(field.replace("`", "").split(", ")) - {"none"} for field in row[:3]]
    assert found == [expected["ahead"], expected["tie"], expected["behind"]]
    assert "random" in expected["ahead"]
    assert expected["behind"] == {"mine"}
