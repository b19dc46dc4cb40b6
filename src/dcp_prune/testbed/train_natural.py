"""Trains the natural testbed behind its frozen vision encoder: `python -m dcp_prune.testbed.train_natural`.

Five stages, resumable at any time. `language`: the language model of `weak` learns the new words and tasks on *oracle*
tokens, which tell the truth about each patch in the code that `weak` reads. `projector`: features of the pretrained
encoder are mapped to such tokens. `joint` and `full`: projector and language model together, by their answers alone, on
256 random visual tokens of each picture and then on all 576; `longer` goes on with that. The encoder itself is never
trained.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from dcp_prune.testbed.features import COUNT, FEATURE_SCALE, Features, encode_all, training_scene
from dcp_prune.testbed.language import ASSISTANT, BOS, EOS, USER, natural_vocabulary
from dcp_prune.testbed.load import load
from dcp_prune.testbed.model import sincos_positions
from dcp_prune.testbed.natural import (
    CLASSES,
    GRID,
    NUMBERS,
    PATCH,
    SCENES,
    TASKS,
    WORDS,
    NaturalScene,
    ask_anew,
)
from dcp_prune.testbed.natural_model import assemble, make_config, make_language_model, save
from dcp_prune.testbed.train import WEAK_ANGLE, patch_labels, pixels_of, random_stretch, rotate, schedule
from dcp_prune.testbed.world import COLORS
from dcp_prune.testbed.world import make_scene as make_first_scene

ID = {word: i for i, word in enumerate(natural_vocabulary())}
COLOR_NAMES = list(COLORS)
IGNORE = -100
PREFIX = (ID[BOS], ID[USER])
SIDE = GRID * PATCH


@dataclass(frozen=True)
class Stage:
    """One step of the recipe: optimiser steps, pictures a step, the first picture, and the peak learning rate.

    `visual_tokens` is how many of the 576 the language model sees.
    """

    name: str
    steps: int
    batch: int
    learning_rate: float
    first_picture: int
    visual_tokens: int = GRID * GRID


RECIPE = (
    Stage("language", 600, 12, 0.003, 100_000_000, 128),
    Stage("projector", 200, 8, 0.01, 0),
    Stage("joint", 1500, 8, 0.002, 0, 256),
    Stage("full", 750, 8, 0.001, 0),
    Stage("longer", 2400, 8, 0.0008, 0),
)
NAMES = [stage.name for stage in RECIPE]


# ---------------------------------------------------------------------------------------------------------------- model


class Bundle(nn.Module):
    """What is trained, and the heads and tables that only training needs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.language: Any
        self.language, self.head = make_language_model(seed)
        self.language.config._attn_implementation = "image_then_questions"
        config: Any = make_config()
        v, d = config.vision_config.hidden_size, config.text_config.hidden_size
        self.projector = nn.ModuleDict({"linear_1": nn.Linear(v, d), "linear_2": nn.Linear(d, d)})
        self.ground_head = nn.Linear(d, sum(GROUND.values()))
        noise = torch.Generator().manual_seed(1)
        self.oracle = nn.ParameterDict(
            {name: nn.Parameter(value, requires_grad=False) for name, value in weak_code().items()}
        )
        for name in ("size", "centre"):
            value = 3 * F.normalize(torch.randn(d, generator=noise), dim=0)
            self.oracle[name] = nn.Parameter(value, requires_grad=False)
        words = self.language.embed_tokens.weight.detach()
        for name, table in (("class", CLASSES), ("color", COLOR_NAMES), ("word", WORDS), ("scene", SCENES)):
            rows = words[[ID[w] for w in table]]
            self.oracle[name] = nn.Parameter(rotate(rows - rows.mean(0), WEAK_ANGLE), requires_grad=False)

    def project(self, features: Tensor) -> Tensor:
        return self.projector["linear_2"](F.gelu(self.projector["linear_1"](features)))

    def parts(self) -> dict[str, Tensor]:
        """What the finished model takes over."""
        return {k: v for k, v in self.state_dict().items() if k.startswith(("projector.", "language.", "head."))}


@torch.no_grad()
def weak_code(scenes: int = 64) -> dict[str, Tensor]:
    """How `weak` writes a place (`position`, `n d`), and background, thing and sign (`d` each), read off its tokens."""
    model: Any = load("weak")[0]
    tokens, labels = [], []
    for start in range(0, scenes, 8):
        batch = [make_first_scene(seed) for seed in range(start, start + 8)]
        tower, projector = model.model.vision_tower, model.model.multi_modal_projector
        layers = tower(pixels_of(batch), output_hidden_states=True).hidden_states
        tokens.append(projector(layers[-2][:, 1:]))
        labels.append(patch_labels(batch)["class"])
    seen, kind = torch.cat(tokens), torch.cat(labels)
    background = kind == 0
    table = sincos_positions(GRID, seen.shape[-1])
    mean = (seen * background[..., None]).sum(0) / background.sum(0)[:, None]
    position = table @ torch.linalg.lstsq(table - table.mean(0), mean - mean.mean(0), driver="gelsd").solution
    position = position - position.mean(0)
    rest = seen - position
    sign = kind == kind.max()
    return {
        "position": position,
        "background": rest[background].mean(0),
        "thing": rest[~background & ~sign].mean(0),
        "sign": rest[sign].mean(0),
    }


# ----------------------------------------------------------------------------------------------------------------- data


def patch_truth(scene: NaturalScene) -> dict[str, np.ndarray]:
    """What each patch shows. `kind`: object's index, `len(objects)` for the sign, -1; `centre`: of an object. `n`."""
    kind = np.full((GRID, GRID), -1)
    best = np.full((GRID, GRID), 0.0)
    centre = np.zeros((GRID, GRID), dtype=bool)
    for i in range(len(scene.objects) + 1):
        shares = scene.shares(i)
        inside = (scene.sign_patches() if i == len(scene.objects) else scene.patches(i)) & (shares > best)
        kind[inside], best[inside] = i, shares[inside]
    for o in scene.objects:
        y, x = (int(c // PATCH) for c in o.center)
        centre[y, x] = True
    return {"kind": kind.ravel(), "centre": centre.ravel()}


def oracle_tokens(bundle: Bundle, scenes: Sequence[NaturalScene]) -> tuple[Tensor, Tensor]:
    """What a perfect encoder would hand to `weak`'s language model, `b n d`, and where something is, `b n`."""
    code = bundle.oracle
    rows, shown = [], []
    for scene in scenes:
        truth = patch_truth(scene)
        of = torch.tensor(
            [[CLASSES.index(o.name), COLOR_NAMES.index(o.color)] for o in scene.objects], dtype=torch.long
        )
        size = torch.tensor([math.log(o.size / 60) for o in scene.objects])
        things = code["thing"] + code["class"][of[:, 0]] + code["color"][of[:, 1]] + size[:, None] * code["size"]
        sign = code["sign"] + code["word"][WORDS.index(scene.word)]
        background = code["background"] + code["scene"][SCENES.index(scene.background)]
        kinds = torch.cat((things, sign[None], background[None]))
        rows.append(
            kinds[torch.from_numpy(truth["kind"])]
            + code["position"]
            + torch.from_numpy(truth["centre"])[:, None] * code["centre"]
        )
        shown.append(torch.from_numpy(truth["kind"] >= 0))
    return torch.stack(rows), torch.stack(shown)


def keep_some(scenes: Sequence[NaturalScene], rng: np.random.Generator, count: int) -> Tensor:
    """The centre and a few patches of every object and of the sign, the rest at random, in raster order. `b count`."""
    chosen = []
    for scene in scenes:
        truth = patch_truth(scene)
        priority = rng.random(GRID * GRID) + 2 * truth["centre"]
        for i in range(len(scene.objects) + 1):
            inside = np.flatnonzero(truth["kind"] == i)
            priority[rng.permutation(inside)[:6]] += 1
        chosen.append(np.sort(np.argsort(-priority)[:count]))
    return torch.from_numpy(np.stack(chosen))


GROUND = {
    "present": 2,
    "color": len(COLORS),
    "count": len(NUMBERS),
    "place": 2,
    "size": 1,
    "step": 3,
    "word": len(WORDS),
}
"""What the language model has to know at the words of a question, and how many numbers tell it."""


@dataclass
class PackedQuestions:
    """All questions of each picture behind one image, as segments that do not see each other.

    ids, labels, offset (position within the segment), segment, task: `b s`; segment -1 marks padding. grounding rows
    are (batch, position, present, color, count, y, x, log size, and y, x, log size from the object named before), -1 or
    NaN where something is not defined. said rows are (batch, position of the word `sign`, what it says).
    """

    ids: Tensor
    labels: Tensor
    offset: Tensor
    segment: Tensor
    task: Tensor
    grounding: Tensor
    said: Tensor


def pack_questions(scenes: Sequence[NaturalScene]) -> PackedQuestions:
    rows, grounding, said = [], [], []
    for b, scene in enumerate(scenes):
        by_name = defaultdict(list)
        for o in scene.objects:
            by_name[o.name].append(o)
        row: list[tuple[int, int, int, int, int]] = []
        for s, question in enumerate(scene.questions):
            words = question.text.split()
            tokens = [ID[w] for w in (*words, ASSISTANT, question.answer)] + [ID[EOS]]
            named = None
            for k, word in enumerate(words):
                if word == "sign":
                    said.append((b, len(row) + k, WORDS.index(scene.word)))
                if word in CLASSES:
                    found = by_name[word]
                    once = found[0] if len(found) == 1 else None
                    own = (*(c / SIDE for c in once.center), math.log(once.size / 60)) if once else (math.nan,) * 3
                    before = named if once and named else (math.nan,) * 3
                    grounding.append(
                        (
                            b,
                            len(row) + k,
                            int(bool(found)),
                            COLOR_NAMES.index(once.color) if once else -1,
                            len(found) - 1,
                            *own,
                            *(mine - other for mine, other in zip(own, before, strict=True)),
                        )
                    )
                    named = own if question.task in ("relation", "size") and once else None
            for k, token in enumerate(tokens):
                answer = k >= len(words) and k < len(tokens) - 1
                row.append((token, tokens[k + 1] if answer else IGNORE, k, s, TASKS.index(question.task)))
        rows.append(row)
    width = max(map(len, rows))
    packed = torch.tensor([row + [(0, IGNORE, 0, -1, -1)] * (width - len(row)) for row in rows])
    ids, labels, offset, segment, task = packed.unbind(-1)
    return PackedQuestions(
        ids, labels, offset, segment, task, torch.tensor(grounding, dtype=torch.float32), torch.tensor(said)
    )


# -------------------------------------------------------------------------------------------------------------- forward


def image_then_questions(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """Attention in which only the last rows, the questions, have a mask; the image before them is plainly causal.

    In blocks of rows that see no columns behind them: half the work of one mask over all. `b h n d`, mask
    `b 1 s n` -> `b n h d`.
    """
    image, block, out = query.shape[2] - attention_mask.shape[2], 144, []
    for start in range(0, image, block):
        end = min(start + block, image)
        later = torch.full((end - start, end), -1e4, dtype=query.dtype).triu(start + 1)
        scores = query[:, :, start:end] @ key[:, :, :end].mT * module.scaling + later
        out.append(scores.softmax(-1) @ value[:, :, :end])
    scores = query[:, :, image:] @ key.mT * module.scaling + attention_mask.to(query.dtype)
    out.append(scores.softmax(-1) @ value)
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register("image_then_questions", image_then_questions)


def answer_questions(
    bundle: Bundle,
    image: Tensor,
    places: Tensor | None,
    questions: PackedQuestions,
    rng: np.random.Generator | None = None,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss of all answers behind `image` (`b n d`), grounding loss, share of right answers per task.

    With `rng`, images take a random stretch of positions, so that text behind 16 visual tokens is as familiar as behind
    576; without, they take one position a token. `places` (`b n`) are those of the tokens among the 576; None if all
    are there.
    """
    language = bundle.language
    b, n, _ = image.shape
    lead, s = len(PREFIX), questions.ids.shape[1]
    prefix = language.embed_tokens(torch.tensor(PREFIX)).expand(b, -1, -1)
    hidden = torch.cat((prefix, image, language.embed_tokens(questions.ids)), dim=1)
    stretch = torch.tensor([float(n) if rng is None else random_stretch(rng) for _ in range(b)])
    where = torch.arange(n).expand(b, -1) / n if places is None else places / (GRID * GRID)
    image_positions = (where * stretch[:, None]).floor().long() + lead
    text_positions = questions.offset + stretch.floor().long()[:, None] + lead
    positions = torch.cat((torch.arange(lead).expand(b, -1), image_positions, text_positions), dim=1)

    order = torch.arange(lead + n + s)
    segment = torch.cat((torch.full((b, lead + n), -2), questions.segment), dim=1)
    seen = (questions.segment[:, :, None] == segment[:, None, :]) | (segment == -2)[:, None, :]
    mask = torch.where((order[lead + n :, None] >= order) & seen, 0.0, -1e4)[:, None]
    rope = language.rotary_emb(hidden, positions)
    for layer in language.layers:
        hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rope)
    hidden = language.norm(hidden)[:, lead + n :]

    asked = questions.labels != IGNORE
    logits, target = bundle.head(hidden[asked]), questions.labels[asked]
    first = target != ID[EOS]
    losses = F.cross_entropy(logits, target, reduction="none")
    loss = losses[first].mean() + 0.1 * losses[~first].mean()
    right = (logits.argmax(-1) == target)[first]
    tasks = questions.task[asked][first]
    metrics = {task: right[tasks == i].float().mean().item() for i, task in enumerate(TASKS)}
    metrics["all"] = right.float().mean().item()
    return loss, ground_loss(bundle, hidden, questions), metrics


def ground_loss(bundle: Bundle, hidden: Tensor, questions: PackedQuestions) -> Tensor:
    """How far the words of a question are from knowing what they name: whether it is there, its colour, place, size."""
    g = questions.grounding
    said = bundle.ground_head(hidden[g[:, 0].long(), g[:, 1].long()])
    present, color, count, place, size, step, _ = said.split(list(GROUND.values()), dim=-1)
    truth = g[:, 2:5].long()
    loss = F.cross_entropy(present, truth[:, 0])
    loss = loss + F.cross_entropy(color, truth[:, 1], ignore_index=-1)
    loss = loss + F.cross_entropy(count, truth[:, 2], ignore_index=-1)
    once, paired = ~g[:, 5].isnan(), ~g[:, 8].isnan()
    loss = loss + 20 * F.mse_loss(place[once], g[once, 5:7]) + 20 * F.mse_loss(size[once], g[once, 7:8])
    loss = loss + 20 * F.mse_loss(step[paired, :2], g[paired, 8:10]) + 20 * F.mse_loss(step[paired, 2], g[paired, 10])
    words = bundle.ground_head(hidden[questions.said[:, 0], questions.said[:, 1]])[:, -len(WORDS) :]
    return loss + F.cross_entropy(words, questions.said[:, 2])


def losses_of(stage: Stage, bundle: Bundle, step: int, features: Features, seed: int) -> tuple[Tensor, dict]:
    """The loss of one step of a stage, and what to show of it; a function of stage, step and seed alone."""
    rng = np.random.default_rng((NAMES.index(stage.name), step, seed))
    numbers = [stage.first_picture + step * stage.batch + i for i in range(stage.batch)]
    if stage.name == "language":
        numbers = [number + seed * 10_000_000 for number in numbers]
    else:  # one round after another through the pictures that are encoded
        numbers = [(number + 1777 * seed) % COUNT for number in numbers]
    scenes = [ask_anew(training_scene(number), rng) for number in numbers]
    if stage.name == "language":
        with torch.no_grad():
            tokens, _ = oracle_tokens(bundle, scenes)
            places = keep_some(scenes, rng, stage.visual_tokens)
            tokens = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
            tokens = tokens + 0.1 * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(step))
        loss, ground, metrics = answer_questions(bundle, tokens, places, pack_questions(scenes), rng)
        return loss + ground, metrics
    seen = features(numbers)
    if stage.name == "projector":
        truth, shown = oracle_tokens(bundle, scenes)
        weight = torch.where(shown, 1.0, 0.15).unsqueeze(-1)
        wrong = ((bundle.project(seen) - truth).pow(2) * weight).sum()
        loss = wrong / ((truth - truth.mean((0, 1))).pow(2) * weight).sum()
        return loss, {"unexplained": loss.item()}
    places = None
    if stage.visual_tokens < GRID * GRID:
        order = rng.random((stage.batch, GRID * GRID)).argsort(axis=1)[:, : stage.visual_tokens]
        places = torch.from_numpy(np.sort(order, axis=1))
        seen = seen.gather(1, places[..., None].expand(-1, -1, seen.shape[-1]))
    loss, ground, metrics = answer_questions(bundle, bundle.project(seen), places, pack_questions(scenes), rng)
    return loss + 0.3 * ground, metrics


# ----------------------------------------------------------------------------------------------------------- one stage


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by five Newton-Schulz steps (Jordan et al. 2024), in float32.

    PyTorch's own takes these steps in bfloat16, which is fifty times slower on CPUs without such instructions.
    """

    def __init__(self, params: list[dict[str, Any]], momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                x = parameter.grad.lerp(buffer, group["momentum"])
                tall = x.shape[0] > x.shape[1]
                x = x.mT if tall else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.mT if tall else x
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(x, alpha=group["lr"] * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5)


def make_optimizers(stage: Stage, bundle: Bundle) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for embeddings, heads, norms and biases."""
    parts: list[nn.Module] = {
        "language": [bundle.language, bundle.head, bundle.ground_head],
        "projector": [bundle.projector],
    }.get(stage.name, [bundle.language, bundle.head, bundle.ground_head, bundle.projector])
    muon, adam = [], []
    for part in parts:
        for name, parameter in part.named_parameters():
            block = parameter.ndim == 2 and part not in (bundle.head, bundle.ground_head) and "embed" not in name
            lr = stage.learning_rate if block else 0.3 * stage.learning_rate
            (muon if block else adam).append({"params": [parameter], "lr": lr, "peak": lr})
    return [torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=0.0), Muon(muon)]


def train_stage(
    stage: Stage,
    directory: Path,
    features: Features,
    seed: int = 0,
    save_every: float = 60.0,
    bfloat16: bool = False,
) -> None:
    """Runs a stage to its end, from where its last checkpoint left it; a checkpoint every `save_every` seconds."""
    file = directory / f"{stage.name}.pt"
    resumed = torch.load(file, weights_only=True) if file.exists() else None
    if resumed is not None and resumed["step"] >= stage.steps:
        print(f"{stage.name}: done ({stage.steps} steps)", flush=True)
        return
    bundle = Bundle(seed)
    before = NAMES.index(stage.name)
    if before and not resumed:
        bundle.load_state_dict(torch.load(directory / f"{RECIPE[before - 1].name}.pt", weights_only=True)["model"])
    optimizers = make_optimizers(stage, bundle)
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    for parameter in bundle.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    step, spent, running = 0, 0.0, {}
    if resumed:
        bundle.load_state_dict(resumed["model"])
        for optimizer, state in zip(optimizers, resumed["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, spent, running = resumed["step"], resumed["seconds"], resumed["metrics"]
    began = saved = shown = time.monotonic()
    first = step
    while step < stage.steps:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, stage.steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss, metrics = losses_of(stage, bundle, step, features, seed)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        for name, value in (metrics | {"loss": loss.item()}).items():
            if not math.isnan(value):
                running[name] = value if name not in running else 0.95 * running[name] + 0.05 * value
        now = time.monotonic()
        if now - shown > 15 or step == stage.steps:
            shown = now
            left = (stage.steps - step) * (now - began) / (step - first)
            told = "  ".join(f"{name} {value:.3f}" for name, value in running.items())
            print(f"{stage.name} {step}/{stage.steps}  {left / 60:.1f} min left  {told}", flush=True)
        if now - saved > save_every or step == stage.steps:
            saved = now
            state = {
                "model": bundle.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step,
                "seconds": spent + now - began,
                "metrics": running,
            }
            torch.save(state, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)


def export(tower: Any, checkpoint: Path, output: Path) -> None:
    """Writes tower, projector and language model as one ordinary LLaVA folder."""
    bundle = Bundle(0)
    bundle.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    output.mkdir(parents=True, exist_ok=True)
    save(assemble(tower, FEATURE_SCALE, bundle.parts()), output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/natural"), help="where features and stages are kept")
    parser.add_argument("--tower", type=Path, default=Path("runs/tower"), help="folder of the vision encoder")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    parser.add_argument("--until", choices=NAMES, default=NAMES[-1], help="the last stage to run")
    parser.add_argument("--output", type=Path, default=None, help="where the finished model goes")
    parser.add_argument("--scenes", type=int, default=300, help="held-out pictures of each difficulty to measure it on")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--bfloat16", action="store_true", help="multiply matrices in bfloat16 (avx512_bf16, AMX)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    directory = args.runs / f"seed-{args.seed}"
    directory.mkdir(parents=True, exist_ok=True)
    for stage in RECIPE[: NAMES.index(args.until) + 1]:
        if stage.name == "projector":
            encode_all(args.tower, args.runs / "features", bfloat16=args.bfloat16)
        train_stage(stage, directory, Features(args.runs / "features"), args.seed, bfloat16=args.bfloat16)
    if args.output:
        from transformers import Dinov2Model

        from dcp_prune.testbed.natural_card import describe

        tower = Dinov2Model.from_pretrained(args.tower, dtype=torch.float32).eval()
        export(tower, directory / f"{NAMES[-1]}.pt", args.output)
        describe(tower, directory, args.output, args.seed, args.scenes)


if __name__ == "__main__":
    main()
