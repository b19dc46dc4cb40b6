"""vLLM with the plug-in against transformers, question by question, on held-out questions: `make compare-vllm`.

    python tools/compare_vllm_answers.py --output results/vllm-answers.json

transformers answers as `dcp-prune testbed eval` does; an engine in this process, with all caches on, gets all questions
at once. Both read all visual tokens, then the few that the pruner keeps; with very few, a wrong choice of tokens shows
in the answers. Every question whose answers differ stands in the result. Needs the environment of `make test-vllm`,
whose folder of tests has to be on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_PLUGINS", "dcp_prune")
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ |= {"TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}

import numpy as np
from checkpoints import as_on_the_hub
from engines import Engine, answers_to

from dcp_prune.environment import environment
from dcp_prune.eval.data.testbed import TestbedQuestions, answer_id
from dcp_prune.eval.evaluate import Answers, Evaluation, evaluate, summarise
from dcp_prune.eval.specs import plan
from dcp_prune.eval.statistics.intervals import accuracy, paired_difference
from dcp_prune.files import check_writable, to_json, write_atomically
from dcp_prune.testbed.load import checkpoint_path, load
from dcp_prune.testbed.seeds import HELD_OUT

CHECKPOINT, DIFFICULTY = "weak", "crowded"


def compare(evaluation: Evaluation, expected: Answers, engine: Engine, tokenizer: Any) -> dict[str, Any]:
    """One method's row: both accuracies, their paired difference, and every question that is answered otherwise."""
    seeds = range(evaluation.seeds[0], evaluation.seeds[-1] + 1)
    source = TestbedQuestions(seeds, DIFFICULTY, len(evaluation.task), checkpoint=CHECKPOINT)
    asked, answers = answers_to(engine, source)
    words = np.array([answer.ids[0] for answer in answers])
    right = words == np.array([answer_id(tokenizer, question.truths[0]) for question in asked])
    differing = np.flatnonzero(words != expected.words)
    shares = {"vllm": right, "transformers": expected.correct}
    return {
        "pruner": expected.method.name,
        "num_tokens": int(expected.kept[0]),
        "questions": len(asked),
        "equal": int((words == expected.words).sum()),
        "accuracy": {name: asdict(accuracy(correct, evaluation.image)) for name, correct in shares.items()},
        "difference": asdict(paired_difference(right, expected.correct, evaluation.image)),
        "encoded_images": engine.encoded_images if expected.method.pruner else None,
        "differing": [
            {
                "question": asked[place].key,
                "text": asked[place].text,
                "right": asked[place].truths[0],
                "vllm": tokenizer.decode([int(words[place])]),
                "transformers": tokenizer.decode([int(expected.words[place])]),
                "logprob_gap": float(
                    answers[place].logprobs[0, words[place]] - answers[place].logprobs[0, expected.words[place]]
                ),
            }
            for place in differing
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--num-tokens", type=int, nargs="+", default=[16, 4], help="visual tokens to keep per image")
    parser.add_argument("--output", type=Path, default=Path("results/vllm-answers.json"))
    args = parser.parse_args()
    check_writable(args.output)
    import vllm

    model, processor = load(CHECKPOINT)
    methods = plan(["none", "dcp"], args.num_tokens)
    evaluation = evaluate(
        model, processor, methods, HELD_OUT, args.questions, difficulty=DIFFICULTY, checkpoint=CHECKPOINT
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = as_on_the_hub(checkpoint_path(CHECKPOINT), Path(folder) / CHECKPOINT)
        for expected in evaluation.answers:
            settings = {"num_tokens": expected.num_tokens} if expected.method.pruner else {}
            rows.append(compare(evaluation, expected, Engine(checkpoint, **settings), processor.tokenizer))
    manifest: dict[str, Any] = {**environment()}
    manifest["packages"] = {**manifest["packages"], "vllm": vllm.__version__}
    result = {
        "results": rows,
        "questions": summarise(evaluation)["questions"],
        "checkpoint": CHECKPOINT,
        "environment": manifest,
    }
    write_atomically(args.output, to_json(result).encode())
    print(*({**row, "differing": len(row["differing"])} for row in rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
