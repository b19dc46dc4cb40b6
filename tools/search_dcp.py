"""Searches the options of `dcp` on tuning seeds; the study is a journal that Optuna reads and goes on with.

    python tools/search_dcp.py --trials 40 --study results/dcp-search/study.jsonl

A trial's value is the mean accuracy over both checkpoints and three situations: 8 tokens, 16 tokens, and 16 tokens with
another image's question, on crowded pictures. The first trial is the current defaults. The best of many noisy trials is
flattered by luck, so a winner becomes a default only after `dcp-prune sweep` on other tuning seeds agrees.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from dcp_prune.eval.evaluate import evaluate
from dcp_prune.eval.specs import Method, TextCondition
from dcp_prune.pruners.dcp import ACGR, TATCS, Trigger
from dcp_prune.pruners.options import default_of
from dcp_prune.registry import make_pruner
from dcp_prune.testbed.load import CHECKPOINTS, load
from dcp_prune.testbed.seeds import TUNING

QUESTION, WRONG = TextCondition("question"), TextCondition("wrong")
SITUATIONS = ((8, QUESTION), (16, QUESTION), (16, WRONG))


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    """The options that are searched; all others keep their defaults."""
    return {
        "centre_temperature": trial.suggest_float("centre_temperature", 0.1, 0.4, step=0.05),
        "centre_sigma": trial.suggest_categorical("centre_sigma", [None, 3.0, 6.0, 12.0]),
        "coverage_weight": trial.suggest_float("coverage_weight", 0.05, 1.0, log=True),
        "saliency_weight": trial.suggest_float("saliency_weight", 0.0, 0.3, step=0.1),
        "relevance_power": trial.suggest_float("relevance_power", 1.0, 6.0, step=0.5),
        "confidence_margin": trial.suggest_float("confidence_margin", -2.5, 0.5, step=0.5),
        "confidence_span": trial.suggest_float("confidence_span", 2.0, 8.0, step=1.0),
        "text_affinity": trial.suggest_float("text_affinity", 0.0, 0.5, step=0.1),
        "reselect_members": trial.suggest_categorical("reselect_members", [True, False]),
        "member_relevance": trial.suggest_float("member_relevance", 0.0, 1.0, step=0.25),
        "member_saliency": trial.suggest_float("member_saliency", 0.0, 0.2, step=0.1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--questions", type=int, default=448, help="per trial, checkpoint and situation")
    parser.add_argument("--skip", type=int, default=0, help="tuning scenes to leave out at the beginning")
    parser.add_argument("--study", type=Path, default=Path("results/dcp-search/study.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {checkpoint: load(checkpoint) for checkpoint in CHECKPOINTS}

    def value(trial: optuna.Trial) -> float:
        options = suggest(trial)
        methods = [
            Method(f"dcp@{text}", k, make_pruner("dcp", num_tokens=k, **options), text, "dcp") for k, text in SITUATIONS
        ]
        scores: list[float] = []
        for checkpoint, (model, processor) in models.items():
            seeds = TUNING[args.skip :]
            done = evaluate(
                model, processor, methods, seeds, args.questions, difficulty="crowded", checkpoint=checkpoint
            )
            for answers in done.answers:
                score = float(answers.correct.mean())
                trial.set_user_attr(f"{checkpoint} {answers.method.name} {answers.method.num_tokens}", score)
                scores.append(score)
        return sum(scores) / len(scores)

    study = optuna.create_study(
        study_name="dcp",
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0, multivariate=True),
        storage=JournalStorage(JournalFileBackend(str(args.study))),
        load_if_exists=True,
    )
    defaults = {field.name: default_of(field) for group in (ACGR, TATCS, Trigger) for field in fields(group)}
    if not study.trials:
        names = suggest(optuna.trial.FixedTrial(defaults)).keys()
        study.enqueue_trial({name: defaults[name] for name in names})
    study.optimize(value, n_trials=args.trials)
    print(f"defaults {study.trials[0].value:.4f}, best {study.best_value:.4f}: {study.best_params}")


if __name__ == "__main__":
    main()
