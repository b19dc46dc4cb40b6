"""Measures a trained testbed with all its tokens; writes weights and card: `python -m dcp_prune.testbed.card`."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from dcp_prune.testbed import model as testbed_model
from dcp_prune.testbed.load import checkpoint_path
from dcp_prune.testbed.seeds import HELD_OUT
from dcp_prune.testbed.train import (
    ID,
    WEAK_ANGLE,
    Bundle,
    answer_questions,
    encode,
    in_order,
    pack_questions,
    pixels_of,
    read_checkpoint,
)
from dcp_prune.testbed.world import CLASSES, GRID, TASKS, Difficulty, Scene, make_scene

DIFFICULTIES: tuple[Difficulty, ...] = ("standard", "crowded")


@torch.inference_mode()
def measure(bundle: Bundle, seeds: Sequence[int], difficulty: Difficulty, batch: int = 8) -> dict:
    """Accuracy per task with all 576 tokens, and how well the word of an object finds the object's patches.

    `auc`: chance that a patch on the named object has a higher cosine to the word than a patch elsewhere.
    `cosine_on`, `cosine_off`: mean cosine on and off the object.
    """
    right: dict[str, list[float]] = defaultdict(list)
    found: dict[str, list[float]] = defaultdict(list)
    words = torch.nn.functional.normalize(bundle.language.embed_tokens.weight.float(), dim=-1)
    for start in range(0, len(seeds), batch):
        scenes = [make_scene(seed, difficulty) for seed in seeds[start : start + batch]]
        features, _ = encode(bundle, pixels_of(scenes))
        tokens = bundle.projector(features)
        _, _, metrics = answer_questions(bundle, tokens, pack_questions(scenes))
        for task in TASKS:
            right[task].append(metrics[task] * len(scenes))
        seen = torch.nn.functional.normalize(tokens.float(), dim=-1)
        for scene, row in zip(scenes, seen, strict=True):
            for name, value in alignment(scene, row @ words.T).items():
                found[name].append(value)
    per_task = {task: sum(right[task]) / len(seeds) for task in TASKS}
    return {
        "accuracy": {"all": float(np.mean(list(per_task.values()))), **per_task},
        "questions": 14 * len(seeds),
        **{name: float(np.mean(values)) for name, values in found.items()},
    }


def alignment(scene: Scene, cosines: torch.Tensor) -> dict[str, float]:
    """Mean over the scene's classes of AUC, cosine on and cosine off; `cosines` of patches to words, `n words`."""
    rows = []
    for name in {o.name for o in scene.objects}:
        on = np.zeros((GRID, GRID), dtype=bool)
        for i, o in enumerate(scene.objects):
            if o.name == name:
                on |= scene.patches(i)
        on = on.ravel()
        value = cosines[:, ID[name]].numpy()
        ranks = value.argsort().argsort() + 1
        hits = int(on.sum())
        auc = (ranks[on].sum() - hits * (hits + 1) / 2) / (hits * (on.size - hits))
        rows.append((auc, value[on].mean(), value[~on].mean()))
    auc, cosine_on, cosine_off = np.mean(rows, axis=0)
    return {"auc": float(auc), "cosine_on": float(cosine_on), "cosine_off": float(cosine_off)}


def export(runs: Path, checkpoint: str, scenes: int) -> LlavaForConditionalGeneration:
    """Measures the checkpoint on held-out scenes, then writes weights, processor, `training.json` and the card."""
    bundle = Bundle()
    bundle.load_state_dict(read_checkpoint(runs, checkpoint)["model"])
    directory = checkpoint_path(checkpoint)
    directory.mkdir(parents=True, exist_ok=True)
    testbed_model.save(bundle.llava, directory)
    half = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, attn_implementation="testbed")
    bundle.llava = half.eval()
    seeds = list(HELD_OUT[:scenes])
    stages = []
    for stage in in_order([checkpoint]):
        saved = read_checkpoint(runs, stage.name)
        stages.append(
            {
                "stage": stage.name,
                "steps": saved["step"],
                "of": stage.steps,
                "images": saved["step"] * stage.batch,
                "first_seed": stage.first_seed,
                "hours": round(saved["seconds"] / 3600, 3),
            }
        )
    record = {
        "checkpoint": checkpoint,
        "parameters": sum(p.numel() for p in half.parameters()),
        "angle": WEAK_ANGLE,
        "stages": stages,
        "held_out_seeds": [seeds[0], seeds[-1]],
        "measured": {difficulty: measure(bundle, seeds, difficulty) for difficulty in DIFFICULTIES},
    }
    (directory / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(card(record), encoding="utf-8")
    return half


def card(record: dict) -> str:
    """The model card, made from the measured record alone."""
    measured = record["measured"]
    hours = sum(stage["hours"] for stage in record["stages"])
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "---",
        "",
        f"# dcp-prune testbed, `{record['checkpoint']}`",
        "",
        f"A LLaVA of {record['parameters'] / 1e6:.1f} million parameters (CLIP vision encoder, two-layer projector, "
        "Llama), trained from nothing on a procedural visual-question world, for telling visual-token pruners apart. "
        f"It knows {len(CLASSES)} objects and {len(ID)} words; it is no general model, and absolute numbers do not "
        "carry over to one. 192 x 192 pixels, 24 x 24 = 576 visual tokens, bfloat16.",
        "",
        f"Words and patches: before the last training stages the visual tokens were turned by {record['angle']:g} "
        "degrees away from the word embeddings, so a word hardly looks like its patches, as in real VLMs.",
        "",
        f"## Accuracy with all 576 tokens ({measured['standard']['questions']} held-out questions each)",
        "",
        "| task | " + " | ".join(DIFFICULTIES) + " |",
        "|---|" + "---|" * len(DIFFICULTIES),
    ]
    for task in ("all", *TASKS):
        lines.append(f"| {task} | " + " | ".join(f"{measured[d]['accuracy'][task]:.3f}" for d in DIFFICULTIES) + " |")
    lines += [
        "",
        "## How well the word of an object finds the object's patches",
        "",
        "| | " + " | ".join(DIFFICULTIES) + " |",
        "|---|" + "---|" * len(DIFFICULTIES),
    ]
    for name, told in (("auc", "AUC"), ("cosine_on", "mean cosine on the object"), ("cosine_off", "elsewhere")):
        lines.append(f"| {told} | " + " | ".join(f"{measured[d][name]:.3f}" for d in DIFFICULTIES) + " |")
    lines += [
        "",
        f"## Training ({hours:.1f} hours in all, one CPU thread a stage)",
        "",
        "| stage | steps | pictures | first seed | hours |",
        "|---|---|---|---|---|",
    ]
    for s in record["stages"]:
        steps = str(s["steps"]) if s["steps"] == s["of"] else f"{s['steps']} of {s['of']}"
        lines.append(f"| {s['stage']} | {steps} | {s['images']} | {s['first_seed']} | {s['hours']:.2f} |")
    lines += [
        "",
        f"Held-out scenes have seeds from {record['held_out_seeds'][0]}; training seeds stay below 900000000. The "
        "vision encoder is supervised with labels of every patch and language training uses a grounding loss, so "
        "features are cleaner than CLIP's. One training seed.",
        "",
        "Recipe: `make train-testbed`. These weights were trained while it took its shape: the vision and the language "
        "stage were lengthened on the way (their learning rate rose again each time), and the losses for counting and "
        "for the sign came in part of the way through. A rerun gives a model like this one, not this one.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/testbed"), help="where checkpoints of stages are kept")
    parser.add_argument("--scenes", type=int, default=400, help="held-out scenes of each difficulty to measure on")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    export(args.runs, "weak", args.scenes)
    print(card(json.loads((checkpoint_path("weak") / "training.json").read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
