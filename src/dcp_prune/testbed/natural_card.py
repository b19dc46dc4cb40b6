"""Measures a finished natural testbed with all its tokens and writes its model card beside the weights."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from dcp_prune.testbed.features import FEATURE_SCALE, encode
from dcp_prune.testbed.language import natural_vocabulary
from dcp_prune.testbed.natural import CLASSES, GRID, LEVELS, TASKS, NaturalScene, make_scene
from dcp_prune.testbed.seeds import HELD_OUT
from dcp_prune.testbed.train_natural import RECIPE, Bundle, answer_questions, pack_questions

ID = {word: i for i, word in enumerate(natural_vocabulary())}


@torch.inference_mode()
def measure(tower: Any, bundle: Bundle, seeds: Sequence[int], difficulty: Any, batch: int = 4) -> dict[str, Any]:
    """Accuracy per task with all 576 tokens and without any picture, and how well a thing's word finds its patches.

    `auc`: chance that a patch on the named thing has a higher cosine to the word than a patch elsewhere.
    `cosine_on`, `cosine_off`: mean cosine on and off the thing. `blind`: every visual token is the mean of its picture.
    """
    right: dict[str, list[float]] = defaultdict(list)
    blind: list[float] = []
    found: dict[str, list[float]] = defaultdict(list)
    words = normalize(bundle.language.embed_tokens.weight, dim=-1)
    for start in range(0, len(seeds), batch):
        scenes = [make_scene(seed, difficulty) for seed in seeds[start : start + batch]]
        tokens = bundle.project(encode(tower, np.stack([scene.image for scene in scenes])) / FEATURE_SCALE)
        questions = pack_questions(scenes)
        _, _, metrics = answer_questions(bundle, tokens, None, questions)
        for task in TASKS:
            right[task].append(metrics[task] * len(scenes))
        _, _, unseen = answer_questions(bundle, tokens.mean((0, 1)).expand_as(tokens), None, questions)
        blind.append(unseen["all"] * len(scenes))
        for scene, row in zip(scenes, normalize(tokens, dim=-1), strict=True):
            for name, value in alignment(scene, (row @ words.T).numpy()).items():
                found[name].append(value)
    per_task = {task: sum(right[task]) / len(seeds) for task in TASKS}
    return {
        "accuracy": {"all": float(np.mean(list(per_task.values()))), **per_task},
        "blind": sum(blind) / len(seeds),
        "questions": 2 * len(TASKS) * len(seeds),
        **{name: float(np.mean(values)) for name, values in found.items()},
    }


def alignment(scene: NaturalScene, cosines: np.ndarray) -> dict[str, float]:
    """Mean over the picture's classes of AUC, cosine on and cosine off; `cosines` of patches to words, `n words`."""
    rows = []
    for name in {o.name for o in scene.objects}:
        on = np.zeros((GRID, GRID), dtype=bool)
        for i, o in enumerate(scene.objects):
            if o.name == name:
                on |= scene.patches(i)
        on = on.ravel()
        value = cosines[:, ID[name]]
        ranks = value.argsort().argsort() + 1
        hits = int(on.sum())
        auc = (ranks[on].sum() - hits * (hits + 1) / 2) / (hits * (on.size - hits))
        rows.append((auc, value[on].mean(), value[~on].mean()))
    auc, cosine_on, cosine_off = np.mean(rows, axis=0)
    return {"auc": float(auc), "cosine_on": float(cosine_on), "cosine_off": float(cosine_off)}


def describe(tower: Any, directory: Path, output: Path, seed: int, pictures: int) -> None:
    """Measures the last stage of a training run; writes `training.json` and the card, `README.md`.

    Args:
        tower: the vision encoder.
        directory: checkpoints of the stages.
        output: folder of the finished model.
        seed: of the run.
        pictures: held-out pictures of each difficulty to measure on.
    """
    bundle = Bundle(seed)
    stages = []
    for stage in RECIPE:
        saved = torch.load(directory / f"{stage.name}.pt", weights_only=True)
        bundle.load_state_dict(saved["model"])
        stages.append(
            {
                "stage": stage.name,
                "steps": saved["step"],
                "pictures": saved["step"] * stage.batch,
                "first_picture": stage.first_picture,
                "visual_tokens": stage.visual_tokens,
                "learning_rate": stage.learning_rate,
                "hours": round(saved["seconds"] / 3600, 3),
            }
        )
    seeds = list(HELD_OUT[:pictures])
    count = {
        "vision encoder": sum(p.numel() for p in tower.parameters()),
        "projector": sum(p.numel() for p in bundle.projector.parameters()),
        "language model": sum(p.numel() for part in (bundle.language, bundle.head) for p in part.parameters()),
    }
    record = {
        "checkpoint": output.name,
        "parameters": count,
        "seed": seed,
        "stages": stages,
        "held_out_seeds": [seeds[0], seeds[-1]],
        "measured": {difficulty: measure(tower, bundle, seeds, difficulty) for difficulty in LEVELS},
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (output / "README.md").write_text(card(record), encoding="utf-8")


def card(record: dict[str, Any]) -> str:
    """The model card, made from the measured record alone."""
    measured, count = record["measured"], record["parameters"]

    def row(*cells: object) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    def percent(values: Sequence[float]) -> list[str]:
        return [f"{100 * value:.1f}" for value in values]

    asked = measured["standard"]["questions"]
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "---",
        "",
        f"# dcp-prune testbed, `{record['checkpoint']}`",
        "",
        f"A LLaVA whose eyes are a pretrained DINOv2 ViT-S/14, frozen ({count['vision encoder'] / 1e6:.1f} million "
        f"parameters; eleven of its twelve layers are used), with a two-layer projector and a Llama of "
        f"{count['language model'] / 1e6:.1f} million parameters, trained on the natural world of this package: "
        "photographs with shaded things on them, asked about in nine tasks. It tells visual-token pruners apart. "
        f"It knows {len(CLASSES)} things and {len(ID)} words; it is no general model, and absolute numbers do not "
        "carry over to one. 336 x 336 pixels, 24 x 24 = 576 visual tokens, bfloat16.",
        "",
        f"## Accuracy with all 576 tokens, per cent ({asked:,} held-out questions each)",
        "",
        row("task", *measured),
        row(*["---"] * (1 + len(measured))),
        *(row(task, *percent([m["accuracy"][task] for m in measured.values()])) for task in ("all", *TASKS)),
        row("all, without the picture", *percent([m["blind"] for m in measured.values()])),
        "",
        "## How well the word of a thing finds its patches",
        "",
        row("", *measured),
        row(*["---"] * (1 + len(measured))),
        *(
            row(told, *(f"{m[name]:.3f}" for m in measured.values()))
            for name, told in (
                ("auc", "AUC"),
                ("cosine_on", "mean cosine on the thing"),
                ("cosine_off", "elsewhere"),
            )
        ),
        "",
        f"## Training (seed {record['seed']}, {sum(s['hours'] for s in record['stages']):.1f} hours on one CPU thread, "
        "without encoding)",
        "",
        row("stage", "steps", "pictures", "visual tokens", "learning rate", "hours"),
        row(*["---"] * 6),
        *(
            row(s["stage"], s["steps"], s["pictures"], s["visual_tokens"], s["learning_rate"], f"{s['hours']:.2f}")
            for s in record["stages"]
        ),
        "",
        "`language`: on tokens that tell the truth about each patch; the language model starts as that of `weak`. "
        "`projector`: from the encoder's features to such tokens. `joint`, `full` and `longer`: projector and language "
        "model, by answers and by what the words of a question have to know (place, colour, number, size of what they "
        "name). The encoder was never trained on this world. "
        f"Held-out pictures have seeds from {record['held_out_seeds'][0]}.",
        "",
        "Made by `make train-natural`. Origin and licences of the encoder are in NOTICE. These weights were trained "
        "while the recipe took shape: the size of things got more weight in the middle of `language`, `joint` and "
        "`full` were lengthened on the way (their learning rate rose again) and saw 4,000 pictures with the same "
        "questions each time, and `longer` began with new optimisers, in bfloat16, with 6,000 pictures and new "
        "questions at each visit. A rerun gives a model like this one, not this one.",
        "",
    ]
    return "\n".join(lines)
