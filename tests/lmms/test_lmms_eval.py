"""The lmms-eval plug-in on the testbed: a task of the same output type as gqa, mme, pope and the like."""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from PIL import Image

from dcp_prune.errors import InvalidInputError, UnknownPrunerError, UnsupportedModelError
from dcp_prune.eval.evaluate import evaluate
from dcp_prune.eval.specs import plan
from dcp_prune.testbed.load import checkpoint_path, load
from dcp_prune.testbed.seeds import TUNING
from dcp_prune.testbed.world import Scene, make_scene

TASK = Path(__file__).parent / "task"
SEEDS = range(TUNING.start, TUNING.start + 3)
WEAK = checkpoint_path("weak")
GREEDY = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


@pytest.fixture(scope="session")
def scenes() -> list[Scene]:
    return [make_scene(seed, "crowded") for seed in SEEDS]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, scenes: list[Scene]) -> Path:
    """A folder in which the task finds its questions."""
    folder = tmp_path_factory.mktemp("lmms")
    rows = [
        {"image": Image.fromarray(scene.image), "question": question.text, "answer": question.answer}
        for scene in scenes
        for question in scene.questions
    ]
    features = Features(
        {"image": ImageFeature(), "question": Value("string"), "answer": Value("string"), "number": Value("int64")}
    )
    numbered = [{**row, "number": number} for number, row in enumerate(rows)]
    DatasetDict({"test": Dataset.from_list(numbered, features=features)}).save_to_disk(str(folder / "questions"))
    return folder


def command_line(workplace: Path, model_args: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmms_eval", "--model", "dcp_llava_hf", "--model_args", model_args]
    command += ["--tasks", "dcp_testbed", "--include_path", str(TASK), *more]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
    return subprocess.run(
        command,
        cwd=workplace,
        env={**os.environ, **offline, **environment},
        text=True,
        capture_output=True,
        check=False,
    )


def run_task(model_args: str, batch_size: int, **more: Any) -> dict[str, Any]:
    return simple_evaluate(
        model="dcp_llava_hf",
        model_args=model_args,
        tasks=["dcp_testbed"],
        batch_size=batch_size,
        task_manager=TaskManager("WARNING", include_path=str(TASK), model_name="dcp_llava_hf"),
        bootstrap_iters=0,
        **more,
    )


def answers_of(samples: list[dict[str, Any]]) -> list[str]:
    answers = [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    # In memory a list of one, in the file the one.
    return [answer if isinstance(answer, str) else answer[0] for answer in answers]


def our_answers(pruner: str, num_tokens: int) -> tuple[list[str], list[bool]]:
    """The words, and whether they are right, by the project's own evaluation of the same questions."""
    model, processor = load("weak")
    methods = plan([pruner], [num_tokens])
    (answers,) = evaluate(model, processor, methods, SEEDS, 10_000, difficulty="crowded", checkpoint="weak").answers
    return [processor.tokenizer.decode(int(word)) for word in answers.words], answers.correct.tolist()


def make_lm(**arguments: Any) -> Any:
    return get_model("dcp_llava_hf")(**{"pretrained": str(WEAK), "device": "cpu", **arguments})


def make_requests(documents: list[dict[str, Any]], arguments: list[dict[str, Any]]) -> list[Instance]:
    return [
        Instance(
            "generate_until",
            (document["question"], dict(given), lambda doc: doc["pictures"], number, "made_up", "test"),
            0,
            {"task": "made_up", "doc_id": number, "repeats": 1},
        )
        for number, (document, given) in enumerate(zip(documents, arguments, strict=True))
    ]


def ask(lm: Any, documents: list[dict[str, Any]], arguments: dict[str, Any] = GREEDY) -> list[str]:
    lm.task_dict = {"made_up": {"test": documents}}
    return [result.text for result in lm.generate_until(make_requests(documents, [arguments] * len(documents)))]


@pytest.fixture(scope="module")
def documents(scenes: list[Scene]) -> list[dict[str, Any]]:
    """No, one or two pictures, questions of different lengths, one with its own placeholder."""
    first, second, third = (Image.fromarray(scene.image) for scene in scenes)
    return [
        {"pictures": [first], "question": "what does the sign say ?"},
        {"pictures": [], "question": "is there a cat in the picture ?"},
        {"pictures": [second, third], "question": "how many car objects are there ?"},
        {"pictures": [third], "question": "<image> is the dog left of the tree ?"},
        {"pictures": [second], "question": "where is the moon ?"},
    ]


def test_the_command_line_reports_what_our_own_evaluation_reports(workplace: Path, tmp_path: Path) -> None:
    # So few tokens that some answers are wrong; where all are right, equal shares of right answers would say little.
    # Our own evaluation reads the testbed in float32; the checkpoint's bfloat16 answers a near tie otherwise.
    model_args = f"pretrained={WEAK},pruner=dcp,num_tokens=4,dtype=float32"
    done = command_line(workplace, model_args, "--batch_size", "4", "--output_path", str(tmp_path), "--log_samples")
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = [json.loads(path.read_text()) for path in tmp_path.rglob("*_results.json")]
    (samples,) = [list(map(json.loads, path.open())) for path in tmp_path.rglob("*_samples_dcp_testbed.jsonl")]
    words, correct = our_answers("dcp", 4)
    assert answers_of(samples) == words
    assert results["results"]["dcp_testbed"]["exact_match,none"] == pytest.approx(sum(correct) / len(correct))
    assert 0 < sum(correct) < len(correct)
    assert "pruner=dcp,num_tokens=4" in results["config"]["model_args"]
    assert results["throughput"]["avg_visual_tokens_before"] == 576
    assert results["throughput"]["avg_visual_tokens_after"] == 4
    assert results["throughput"]["avg_kappa"] > 0
    assert all(4 < sample["token_counts"][0]["input_tokens"] < 64 for sample in samples)
    assert f"DCPPruner(num_tokens=4) of dcp-prune {version('dcp-prune')}" in done.stdout


def test_batches_of_four_answer_as_single_questions_do(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    one, four = (run_task(f"pretrained={WEAK},pruner=mmtok,num_tokens=12", size)["samples"] for size in (1, 4))
    assert answers_of(one["dcp_testbed"]) == answers_of(four["dcp_testbed"])


def test_no_pruner_is_the_unpruned_model(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    results = run_task(f"pretrained={WEAK},pruner=none", 14)
    words, _ = our_answers("none", 576)
    assert answers_of(results["samples"]["dcp_testbed"]) == words
    assert all(sample["token_counts"][0]["input_tokens"] > 576 for sample in results["samples"]["dcp_testbed"])


def test_a_second_run_answers_from_the_cache_of_lmms_eval(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    model_args = f"pretrained={WEAK},pruner=uniform,num_tokens=4"
    first = run_task(model_args, 2, limit=4, use_cache=str(tmp_path))
    monkeypatch.setattr(get_model("dcp_llava_hf"), "generate_until", lambda *_: pytest.fail("asked again"))
    second = run_task(model_args, 2, limit=4, use_cache=str(tmp_path))
    assert answers_of(first["samples"]["dcp_testbed"]) == answers_of(second["samples"]["dcp_testbed"])
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        run_task(model_args.replace("num_tokens=4", "num_tokens=5"), 2, limit=4, use_cache=str(tmp_path))


def test_an_error_in_a_question_ends_the_command_with_exit_code_1_and_no_results(
    workplace: Path, tmp_path: Path
) -> None:
    model_args = f"pretrained={WEAK},pruner=dcp,num_tokens=16"
    done = command_line(workplace, model_args, "--output_path", str(tmp_path), DCP_TESTBED_BROKEN="3")
    assert done.returncode == 1
    assert "the picture cannot be read" in done.stderr
    assert "in document 3 of task dcp_testbed (test)" in done.stderr
    assert not list(tmp_path.rglob("*_results.json"))


def test_an_unknown_pruner_ends_the_command_with_our_sentence(workplace: Path) -> None:
    done = command_line(workplace, f"pretrained={WEAK},pruner=dpc,num_tokens=16")
    assert done.returncode == 1
    assert "no pruner is named 'dpc'; did you mean dcp" in done.stderr


def test_an_error_inside_the_model_is_raised_not_scored(
    documents: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm(pruner="uniform", num_tokens=4)
    monkeypatch.setattr(
        lm.model, "generate", lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory left"))
    )
    with pytest.raises(torch.OutOfMemoryError, match="no memory left") as failure:
        ask(lm, documents)
    assert failure.value.__notes__ == ["while answering document(s) 3 of made_up"]  # the longest question goes first


@pytest.mark.parametrize("pruner", ["dcp", "dcp_progressive", "none"])
def test_a_batch_of_no_one_and_two_pictures_answers_as_its_rows_do(
    pruner: str, documents: list[dict[str, Any]]
) -> None:
    options = {} if pruner == "none" else {"num_tokens": 16}
    together = ask(make_lm(pruner=pruner, batch_size=5, **options), documents)
    lm = make_lm(pruner=pruner, batch_size=1, **options)
    assert together == ask(lm, documents)
    assert together == [ask(lm, [document])[0] for document in documents]
    assert all(together)


def test_until_cuts_the_answer_and_generation_arguments_are_passed_on(documents: list[dict[str, Any]]) -> None:
    lm = make_lm(num_tokens=16, batch_size=2)
    whole = ask(lm, documents[:1])
    stopped = ask(lm, documents[:1], {**GREEDY, "until": whole[0][1:]})
    assert stopped == [whole[0][0]]
    seen: list[dict[str, Any]] = []
    generate = lm.model.generate
    lm.model.generate = lambda **arguments: seen.append(arguments) or generate(**arguments)
    ask(lm, documents[:1], {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 3, "image_aspect_ratio": "pad"})
    assert {name: seen[0][name] for name in ("do_sample", "temperature", "top_p", "max_new_tokens")} == {
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_new_tokens": 3,
    }
    assert "image_aspect_ratio" not in seen[0]


def test_different_generation_arguments_never_share_a_batch_and_answers_keep_their_order(
    documents: list[dict[str, Any]],
) -> None:
    lm = make_lm(pruner="uniform", num_tokens=16, batch_size=8)
    lm.task_dict = {"made_up": {"test": documents}}
    requests = make_requests(documents, [{**GREEDY, "max_new_tokens": 1 + number % 2} for number in range(5)])
    before = [dict(request.args[1]) for request in requests]
    sizes: list[int] = []
    generate = lm.model.generate
    lm.model.generate = lambda **arguments: sizes.append(len(arguments["input_ids"])) or generate(**arguments)
    answers = [result.text for result in lm.generate_until(requests)]
    assert sorted(sizes) == [2, 3]
    assert answers == [ask(lm, [doc])[0] for doc in documents]
    # lmms-eval's cache keys are made of these, before and after.
    assert [request.args[1] for request in requests] == before


def test_lmms_eval_knows_the_model_whichever_is_imported_first() -> None:
    code = (
        "import dcp_prune.integrations.lmms_eval.model; from lmms_eval.models import list_available_models; "
        "assert 'dcp_llava_hf' in list_available_models()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_system_prompt_stands_in_front_of_the_question(tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("stop , open\n")
    lm = make_lm(num_tokens=16, system_prompt=str(tmp_path / "system.txt"))
    assert lm._prompt("where is the cat ?", 1).split("USER:")[0].strip().endswith("stop , open")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pruner": "dcp"}, InvalidInputError, "num_tokens"),
        ({"num_tokens": 16, "num_tokns": 3}, InvalidInputError, "did you mean num_tokens"),
        ({"pruner": "dpc", "num_tokens": 16}, UnknownPrunerError, "did you mean dcp"),
        (
            {"pruner": "none", "num_tokens": 16},
            InvalidInputError,
            "pruner=none .* takes no options, but got num_tokens",
        ),
        ({"num_tokens": 16, "batch_size": "auto"}, InvalidInputError, "batch sizes are not found automatically"),
        ({"num_tokens": 16, "max_batch_size": 4}, InvalidInputError, "batch sizes are not found automatically"),
        ({"num_tokens": 16, "batch_size": 0}, InvalidInputError, "give a number from 1"),
    ],
)
def test_bad_model_arguments_are_refused_in_one_sentence(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_lm(**arguments)


def test_a_model_without_an_adapter_is_refused(tmp_path: Path) -> None:
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    words = {"model_type": "opt", "ffn_dim": 8, "word_embed_proj_dim": 8, "vocab_size": 8}
    config = Blip2Config(vision_config=small, qformer_config=small, text_config={**small, **words})
    Blip2ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="Blip2ForConditionalGeneration has no adapter"):
        make_lm(pretrained=str(tmp_path), num_tokens=16)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"pictures": ["clip.mp4"], "question": "what happens ?"}, "gives a str where dcp_llava_hf reads pictures"),
        ({"pictures": [], "question": "<image> what ?"}, "the question has 1 <image> for 0 picture"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused_with_their_document(document: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as refusal:
        ask(make_lm(num_tokens=16), [document])
    assert refusal.value.__notes__[0] == "in document 0 of task made_up (test)"


def test_other_output_types_are_refused_with_the_name_of_the_task() -> None:
    lm = make_lm(num_tokens=16)
    request = Instance("loglikelihood", ("", "", None, 0, "ppl", "test"), 0, {"task": "ppl", "doc_id": 0, "repeats": 1})
    for asked in (lm.loglikelihood, lm.generate_until_multi_round):
        with pytest.raises(InvalidInputError, match="output type generate_until, but ppl asks for"):
            asked([request])
