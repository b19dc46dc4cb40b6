"""Trains the testbed from nothing, stage by stage, resumable at any time: `python -m dcp_prune.testbed.train`.

The vision encoder learns what each patch shows; meanwhile the language model learns the questions on *oracle* tokens,
sums of its own word embeddings that describe each patch; a projector maps the one onto the other; then all are trained
together on pictures with all 576 tokens. The `weak` branch turns the oracle tokens away from the word embeddings, so
that words and patches no longer look alike, as in VLMs whose words were not built in.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dcp_prune.errors import InvalidInputError
from dcp_prune.testbed import model as testbed_model
from dcp_prune.testbed.language import ASSISTANT, BOS, EOS, USER, vocabulary
from dcp_prune.testbed.world import (
    CLASSES,
    COLORS,
    GRID,
    NUMBERS,
    PATCH,
    SIGN_SIZE,
    TASKS,
    WORDS,
    Scene,
    make_scene,
    make_small_picture,
)

ID = {word: i for i, word in enumerate(vocabulary())}
COLOR_NAMES = list(COLORS)
IGNORE = -100
PREFIX = (ID[BOS], ID[USER])


# --------------------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Stage:
    """One step of the recipe: what it trains, from which earlier stages, for how many optimiser steps.

    `first_seed` keeps the scenes of different stages apart; all lie in the training split.
    """

    name: str
    needs: tuple[str, ...]
    steps: int
    batch: int
    learning_rate: float
    first_seed: int


FAR_ANGLE = 86.0
"""Degrees by which the weak branch's visual tokens are turned away from the word embeddings while it learns to do
without them; little more than chance is left of the likeness."""
WEAK_ANGLE = 80.0
"""Degrees at which the weak checkpoint ends: words find their patches about as badly as in real models."""

RECIPE = (
    Stage("vision-small", (), 700, 32, 0.02, 0),
    Stage("vision", ("vision-small",), 2400, 8, 0.01, 100_000_000),
    Stage("language", (), 2000, 16, 0.01, 200_000_000),
    Stage("language-weak", ("language",), 1000, 16, 0.007, 300_000_000),
    Stage("projector", ("vision", "language"), 150, 8, 0.01, 400_000_000),
    Stage("projector-weak", ("vision", "language-weak"), 150, 8, 0.01, 500_000_000),
    Stage("weak-far", ("projector-weak",), 800, 4, 0.0004, 700_000_000),
    Stage("weak", ("weak-far",), 300, 4, 0.0004, 800_000_000),
)
STAGES = {stage.name: stage for stage in RECIPE}


class Bundle(nn.Module):
    """The model with the heads that only training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.llava: Any = testbed_model.make_model(attn_implementation="testbed")
        config = self.llava.config
        v, d = config.vision_config.hidden_size, config.text_config.hidden_size
        self.patch_head = nn.Linear(v, sum(PATCH_TARGETS.values()) + 2)
        self.cls_head = nn.Linear(v, len(CLASSES) + len(WORDS))
        self.ground_head = nn.Linear(d, 2 + len(COLORS) + len(NUMBERS) + 2 + 2 + len(WORDS))
        self.oracle_position = nn.Linear(d, d, bias=False)
        nn.init.normal_(self.oracle_position.weight, std=0.5 * d**-0.5 * d**-0.5)
        self.oracle_background = nn.Parameter(torch.randn(d) * d**-0.5)
        self.angle: Tensor
        self.register_buffer("angle", torch.zeros(()))

    @property
    def vision(self) -> Any:
        return self.llava.model.vision_tower

    @property
    def language(self) -> Any:
        return self.llava.model.language_model

    @property
    def projector(self) -> Any:
        return self.llava.model.multi_modal_projector


PATCH_TARGETS = {"class": len(CLASSES) + 2, "color": len(COLORS) + 1, "word": len(WORDS) + 1, "count": 5, "corner": 2}
"""What the vision encoder tells about each patch, and how many answers each has; 0 is always `nothing`."""

PATCH_LOSS = {"count": 2.0, "corner": 0.5}
"""Weights of these losses where they are not 1; counting is what is learned last."""


def plain_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """Matrix product and softmax: on a CPU in bfloat16 faster than the fused kernels at these sizes."""
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (torch.softmax(scores, -1) @ value).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("testbed", plain_attention)


# ----------------------------------------------------------------------------------------------------------------- data


def scenes_of(stage: Stage, step: int) -> list[Scene]:
    """The batch of a step: a function of stage and step alone, half of it crowded."""
    seeds = [stage.first_seed + step * stage.batch + i for i in range(stage.batch)]
    if stage.name == "vision-small":
        return [make_small_picture(seed) for seed in seeds]
    return [make_scene(seed, "crowded" if seed % 2 else "standard") for seed in seeds]


def on_device(array: NDArray) -> Tensor:
    return torch.from_numpy(array).to(torch.get_default_device())


def pixels_of(scenes: Sequence[Scene]) -> Tensor:
    images = on_device(np.stack([scene.image for scene in scenes]))
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (pixels - testbed_model.PIXEL_MEAN) / testbed_model.PIXEL_STD


def patch_labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Truth about every patch. Each `b n`, 0 = nothing."""
    labels = {
        name: np.zeros((len(scenes), s.grid, s.grid), dtype=np.int64) for name in PATCH_TARGETS for s in scenes[:1]
    }
    for i, scene in enumerate(scenes):
        times = defaultdict(int)
        for o in scene.objects:
            times[o.name] += 1
        for o in scene.objects:
            window = (i, slice(o.row, o.row + o.size), slice(o.col, o.col + o.size))
            labels["class"][window] = 1 + CLASSES.index(o.name)
            labels["color"][window] = 1 + COLOR_NAMES.index(o.color)
            labels["count"][window] = times[o.name]
            labels["corner"][i, o.row, o.col] = 1
        row, col = scene.sign
        window = (i, slice(row, row + SIGN_SIZE[1] // PATCH), slice(col, col + SIGN_SIZE[0] // PATCH))
        labels["class"][window] = 1 + len(CLASSES)
        labels["word"][window] = 1 + WORDS.index(scene.word)
    return {name: on_device(value).flatten(1) for name, value in labels.items()}


@dataclass
class PackedQuestions:
    """All questions of each scene behind one image, as segments that do not see each other.

    ids, labels, offset (position within the segment), segment: `b s`, segment -1 marks padding. grounding rows are
    (batch, position, present, color, count, row, col, rows and cols from the object named before) with -1, or NaN for
    the last two, where something is not defined. said rows are (batch, position of the word `sign`, what it says).
    """

    ids: Tensor
    labels: Tensor
    offset: Tensor
    segment: Tensor
    task: Tensor
    grounding: Tensor
    said: Tensor


def pack_questions(scenes: Sequence[Scene]) -> PackedQuestions:
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
                    grounding.append(
                        (
                            b,
                            len(row) + k,
                            int(bool(found)),
                            COLOR_NAMES.index(once.color) if once else -1,
                            len(found) - 1,
                            once.center[0] / GRID if once else -1,
                            once.center[1] / GRID if once else -1,
                            (once.center[0] - named.center[0]) / GRID if once and named else math.nan,
                            (once.center[1] - named.center[1]) / GRID if once and named else math.nan,
                        )
                    )
                    named = once if question.task == "relation" else None
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


def encode(bundle: Bundle, pixels: Tensor, window: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Features that the projector reads `b n v`, and the last layer's [CLS] `b v`.

    `window` picks the position embeddings (`b n`) of pictures smaller than the full grid.
    """
    vision = bundle.vision
    patches = vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    table = vision.embeddings.position_embedding.weight
    positions = table[1:] if window is None else table[1:][window]
    cls = (vision.embeddings.class_embedding + table[0]).expand(len(pixels), 1, -1)
    x = vision.pre_layrnorm(torch.cat((cls, patches + positions), dim=1))
    features = x
    for layer in vision.encoder.layers:
        features = x
        x = layer(x, None)
    return features[:, 1:], x[:, 0]


def vision_loss(bundle: Bundle, scenes: Sequence[Scene], features: Tensor, cls: Tensor) -> tuple[Tensor, dict]:
    """Dense labels on the patches, presence of classes and the sign's word on [CLS]."""
    labels = patch_labels(scenes)
    logits = bundle.patch_head(features).float()
    object_patch = labels["class"] > 0
    weight = torch.where(object_patch, 1.0, 0.15)
    weight = weight / weight.sum()
    loss, metrics, start = torch.zeros(()), {}, 0
    for name, size in PATCH_TARGETS.items():
        part = logits[..., start : start + size]
        start += size
        wrong = F.cross_entropy(part.flatten(0, 1), labels[name].flatten(), reduction="none").view_as(weight)
        loss = loss + (wrong * weight).sum() * PATCH_LOSS.get(name, 1.0)
        relevant = labels[name] > 0 if name == "word" else object_patch
        metrics[name] = (part.argmax(-1) == labels[name])[relevant].float().mean().item()
    grid = scenes[0].grid
    steps = torch.arange(grid * grid)
    truth = torch.stack((steps // grid, steps % grid), dim=-1) / grid - 0.5
    if grid == GRID:
        loss = loss + F.mse_loss(logits[..., start:], truth.expand(len(scenes), -1, -1)) * 10
    presence = torch.zeros(len(scenes), len(CLASSES))
    for i, scene in enumerate(scenes):
        presence[i, [CLASSES.index(o.name) for o in scene.objects]] = 1
    said = bundle.cls_head(cls).float()
    loss = loss + 2 * F.binary_cross_entropy_with_logits(said[:, : len(CLASSES)], presence)
    words = torch.tensor([WORDS.index(scene.word) for scene in scenes])
    loss = loss + 0.5 * F.cross_entropy(said[:, len(CLASSES) :], words)
    metrics["cls recall"] = (said[:, : len(CLASSES)] > 0)[presence > 0].float().mean().item()
    return loss, metrics


def oracle_tokens(bundle: Bundle, scenes: Sequence[Scene]) -> Tensor:
    """What a perfect encoder would hand to the language model: words true of each patch plus its place. `b n d`."""
    labels = patch_labels(scenes)
    table = bundle.language.embed_tokens.weight
    nothing = torch.zeros(1, table.shape[1])

    def words(names: Sequence[str]) -> Tensor:
        return torch.cat((nothing, table[[ID[name] for name in names]]))

    tokens = (
        torch.cat((words(CLASSES), nothing))[labels["class"]]
        + words(COLOR_NAMES)[labels["color"]]
        + words(WORDS)[labels["word"]]
        + 0.7 * (labels["word"] > 0).unsqueeze(-1) * table[ID["sign"]]
        + 0.7 * words(NUMBERS)[labels["count"]]
        + (labels["class"] == 0).unsqueeze(-1) * bundle.oracle_background
    )
    positions = testbed_model.sincos_positions(GRID, table.shape[1])
    return rotate(tokens + bundle.oracle_position(positions), float(bundle.angle))


def rotate(tokens: Tensor, degrees: float) -> Tensor:
    """Turns every token by an angle in d/2 fixed random planes: the cosine to any word falls by cos(angle)."""
    if degrees == 0:
        return tokens
    d = tokens.shape[-1]
    noise = torch.randn(d, d, generator=torch.Generator().manual_seed(0), device="cpu")
    basis = torch.linalg.qr(noise).Q.to(tokens.device)
    planes = tokens.float() @ basis
    x, y = planes[..., : d // 2], planes[..., d // 2 :]
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.cat((c * x - s * y, s * x + c * y), dim=-1) @ basis.T


@torch.no_grad()
def turn(bundle: Bundle, degrees: float) -> None:
    """Turns what the projector puts out from its present angle to `degrees`, inside its last layer."""
    last = bundle.projector.linear_2
    change = degrees - float(bundle.angle)
    last.weight.copy_(rotate(last.weight.T, change).T)
    last.bias.copy_(rotate(last.bias, change))
    bundle.angle.fill_(degrees)


def answer_questions(
    bundle: Bundle, image: Tensor, questions: PackedQuestions, rng: np.random.Generator | None = None
) -> tuple[Tensor, Tensor, dict]:
    """Losses of all questions behind `image` (`b n d`), grounding loss, share of right answers per task.

    With `rng`, images take a random stretch of positions, so that text behind 16 visual tokens is as familiar as behind
    576; without, they take one position a token.
    """
    language = bundle.language
    b, n, _ = image.shape
    s = questions.ids.shape[1]
    lead = len(PREFIX)
    prefix = language.embed_tokens(torch.tensor(PREFIX)).expand(b, -1, -1)
    embedded = torch.cat((prefix, image.to(prefix.dtype), language.embed_tokens(questions.ids)), dim=1)
    stretch = torch.tensor([float(n) if rng is None else random_stretch(rng) for _ in range(b)])
    image_positions = (torch.arange(n) * (stretch[:, None] / n)).floor().long() + lead
    text_positions = questions.offset + stretch.floor().long()[:, None] + lead
    positions = torch.cat((torch.arange(lead).expand(b, -1), image_positions, text_positions), dim=1)

    length = lead + n + s
    order = torch.arange(length)
    segment = torch.cat((torch.full((b, lead + n), -2), questions.segment), dim=1)
    causal = order[:, None] >= order[None, :]
    same = segment[:, :, None] == segment[:, None, :]
    shared = (segment == -2)[:, None, :]
    mask = torch.where(causal & (same | shared), 0.0, -1e4)[:, None].to(torch.bfloat16)

    hidden = embedded
    rope = language.rotary_emb(hidden, positions)
    for layer in language.layers:
        hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rope)
    hidden = language.norm(hidden)[:, lead + n :]

    asked = questions.labels != IGNORE
    logits = bundle.llava.lm_head(hidden[asked]).float()
    target = questions.labels[asked]
    first = target != ID[EOS]
    losses = F.cross_entropy(logits, target, reduction="none")
    loss = losses[first].mean() + 0.1 * losses[~first].mean()
    right = (logits.argmax(-1) == target)[first]
    tasks = questions.task[asked][first]
    metrics = {task: right[tasks == i].float().mean().item() for i, task in enumerate(TASKS)}
    metrics["all"] = right.float().mean().item()

    g = questions.grounding
    said = bundle.ground_head(hidden[g[:, 0].long(), g[:, 1].long()]).float()
    present, color, count, place, step, _ = said.split((2, len(COLORS), len(NUMBERS), 2, 2, len(WORDS)), dim=-1)
    truth = g[:, 2:5].long()
    ground = F.cross_entropy(present, truth[:, 0])
    ground = ground + F.cross_entropy(color, truth[:, 1], ignore_index=-1)
    ground = ground + F.cross_entropy(count, truth[:, 2], ignore_index=-1)
    placed = g[:, 5] >= 0
    ground = ground + 20 * F.mse_loss(place[placed], g[placed, 5:7])
    paired = ~g[:, 7].isnan()
    ground = ground + 20 * F.mse_loss(step[paired], g[paired, 7:])
    signs = bundle.ground_head(hidden[questions.said[:, 0], questions.said[:, 1]]).float()[:, -len(WORDS) :]
    ground = ground + F.cross_entropy(signs, questions.said[:, 2])
    return loss, ground, metrics


def random_stretch(rng: np.random.Generator) -> float:
    """Positions that an image takes: all 576 half of the time, else anything down to 16."""
    full = GRID * GRID
    return full if rng.random() < 0.5 else math.exp(rng.uniform(math.log(16), math.log(full)))


def keep_some(scenes: Sequence[Scene], rng: np.random.Generator, count: int) -> Tensor:
    """A few patches of every object and of the sign, the rest at random, in raster order. `b count`."""
    chosen = []
    for scene in scenes:
        priority = rng.random(GRID * GRID)
        for i in range(len(scene.objects)):
            inside = np.flatnonzero(scene.patches(i))
            priority[rng.permutation(inside)[:6]] += 1
        priority[rng.permutation(np.flatnonzero(scene.sign_patches()))[:6]] += 1
        chosen.append(np.sort(np.argsort(-priority)[:count]))
    return on_device(np.stack(chosen))


# ----------------------------------------------------------------------------------------------------------- one stage


def losses_of(stage: Stage, bundle: Bundle, step: int) -> tuple[Tensor, dict]:
    """The loss of one step of a stage, and what to show of it."""
    scenes = scenes_of(stage, step)
    rng = np.random.default_rng((stage.first_seed, step))
    if stage.name == "vision-small":
        side = scenes[0].grid
        row, col = rng.integers(0, GRID - side + 1, (2, len(scenes)))
        steps = np.arange(side * side)
        window = on_device((row[:, None] + steps // side) * GRID + col[:, None] + steps % side)
        return vision_loss(bundle, scenes, *encode(bundle, pixels_of(scenes), window))
    if stage.name == "vision":
        return vision_loss(bundle, scenes, *encode(bundle, pixels_of(scenes)))
    if stage.name.startswith("language"):
        if stage.name == "language-weak":
            bundle.angle.fill_(FAR_ANGLE * min(1.0, step / (0.5 * stage.steps)))
        tokens = oracle_tokens(bundle, scenes)
        noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(step), device="cpu")
        tokens = tokens + 0.02 * noise.to(tokens.device)
        kept = keep_some(scenes, rng, 112)
        tokens = tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        loss, ground, metrics = answer_questions(bundle, tokens, pack_questions(scenes), rng)
        return loss + ground, metrics
    if stage.name.startswith("projector"):
        with torch.no_grad():
            features, _ = encode(bundle, pixels_of(scenes))
            truth = oracle_tokens(bundle, scenes)
        weight = torch.where(patch_labels(scenes)["class"] > 0, 1.0, 0.15).unsqueeze(-1)
        wrong = (bundle.projector(features).float() - truth).pow(2) * weight / weight.mean()
        spread = ((truth - truth.mean((0, 1))).pow(2) * weight / weight.mean()).mean()
        loss = wrong.mean() / spread
        return loss, {"unexplained": loss.item()}
    features, cls = encode(bundle, pixels_of(scenes))
    dense, seen = vision_loss(bundle, scenes, features, cls)
    loss, ground, metrics = answer_questions(bundle, bundle.projector(features), pack_questions(scenes), rng)
    return loss + 0.3 * ground + 0.3 * dense, metrics | {"patch " + k: v for k, v in seen.items() if k != "corner"}


def trained_parts(stage: Stage, bundle: Bundle) -> list[tuple[list[nn.Module | nn.Parameter], float]]:
    """Modules that a stage trains, with the factor on its learning rate."""
    heads: list = [bundle.patch_head, bundle.cls_head]
    oracle: list = [bundle.oracle_position, bundle.oracle_background]
    match stage.name:
        case "vision-small" | "vision":
            return [([bundle.vision, *heads], 1.0)]
        case "language":
            return [([bundle.language, bundle.llava.lm_head, bundle.ground_head, *oracle], 1.0)]
        case "language-weak":
            return [([*bundle.language.layers, bundle.language.norm, bundle.llava.lm_head, bundle.ground_head], 1.0)]
        case "projector" | "projector-weak":
            return [([bundle.projector], 1.0)]
        case _:
            text = [*bundle.language.layers, bundle.language.norm, bundle.llava.lm_head, bundle.ground_head]
            return [([*text, bundle.projector], 1.0), ([bundle.vision, *heads], 0.5)]


def make_optimizers(stage: Stage, bundle: Bundle) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for embeddings, heads, norms and biases.

    Raises:
        InvalidInputError: this PyTorch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise InvalidInputError(f"training needs the Muon optimizer of torch 2.9 or newer, this is {torch.__version__}")
    muon, adam = [], []
    for parts, factor in trained_parts(stage, bundle):
        for part in parts:
            named = [("", part)] if isinstance(part, nn.Parameter) else list(part.named_parameters())
            head = part in (bundle.patch_head, bundle.cls_head, bundle.ground_head, bundle.llava.lm_head)
            for name, parameter in named:
                block = parameter.ndim == 2 and not head and "embed" not in name and part is not bundle.oracle_position
                lr = stage.learning_rate * factor
                (muon if block else adam).append({"params": [parameter], "lr": lr if block else min(lr, 0.01) * 0.2})
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=0.0)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, momentum=0.95, weight_decay=0.01, ns_steps=4))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: short rise, hold, linear fall over the last half."""
    return min(1.0, (step + 1) / 20) * min(1.0, 2 * (steps - step) / steps)


def checkpoint_of(directory: Path, name: str) -> Path:
    return directory / f"{name}.pt"


def read_checkpoint(directory: Path, name: str) -> dict:
    """The saved state of a stage: `model`, `optimizers`, `step`, `seconds`, `metrics`.

    Raises:
        InvalidInputError: the stage has no checkpoint there.
    """
    file = checkpoint_of(directory, name)
    if not file.exists():
        raise InvalidInputError(f"stage {name!r} has no checkpoint in {directory}; train it first: --stage {name}")
    return torch.load(file, weights_only=True, map_location=torch.get_default_device())


def train_stage(stage: Stage, directory: Path, device: str = "cpu", save_every: float = 60.0) -> None:
    """Runs a stage to its end, from where its last checkpoint left it; a checkpoint every `save_every` seconds.

    Data depend on seed and step alone; with one thread on a CPU a resumed run ends in the very weights of an unbroken
    one, with more threads gradients are added up in varying order.
    """
    torch.set_default_device(device)
    bundle = Bundle().to(device)
    file = checkpoint_of(directory, stage.name)
    step, spent = 0, 0.0
    running: dict[str, float] = {}
    resumed = torch.load(file, weights_only=True, map_location=device) if file.exists() else None
    if resumed is not None and resumed["step"] >= stage.steps:
        print(f"{stage.name}: done ({stage.steps} steps)", flush=True)
        return
    for name in () if resumed else stage.needs:
        load_parts(bundle, read_checkpoint(directory, name)["model"], name)
    if stage.name == "weak" and not resumed:
        turn(bundle, WEAK_ANGLE)
    optimizers = make_optimizers(stage, bundle)
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    for parameter in bundle.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    if resumed:
        bundle.load_state_dict(resumed["model"])
        for optimizer, state in zip(optimizers, resumed["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, spent, running = resumed["step"], resumed["seconds"], resumed["metrics"]

    def save() -> None:
        state = {
            "model": bundle.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "step": step,
            "seconds": spent + time.monotonic() - began,
            "metrics": running,
        }
        torch.save(state, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)

    began = saved = shown = time.monotonic()
    first = step
    while step < stage.steps:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, stage.steps)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss, metrics = losses_of(stage, bundle, step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        for name, value in (metrics | {"loss": loss.item()}).items():
            if not math.isnan(value):
                running[name] = value if name not in running else 0.97 * running[name] + 0.03 * value
        now = time.monotonic()
        if now - shown > 15 or step == stage.steps:
            shown = now
            left = (stage.steps - step) * (now - began) / (step - first)
            told = "  ".join(f"{name} {value:.3f}" for name, value in running.items())
            print(f"{stage.name} {step}/{stage.steps}  {left / 60:.1f} min left  {told}", flush=True)
        if now - saved > save_every or step == stage.steps:
            saved = now
            save()


def load_parts(bundle: Bundle, state: dict[str, Tensor], stage: str) -> None:
    """Takes from an earlier stage what that stage trained: the vision side, the language side, or all."""
    vision = ("llava.model.vision_tower.", "patch_head.", "cls_head.")
    if stage.startswith("vision"):
        state = {k: v for k, v in state.items() if k.startswith(vision)}
    elif stage.startswith("language"):
        state = {k: v for k, v in state.items() if not k.startswith(vision)}
    bundle.load_state_dict(state, strict=False)


def in_order(names: Sequence[str]) -> Iterator[Stage]:
    """The wanted stages and all they need, in the order of the recipe."""
    wanted = set(names)
    for stage in reversed(RECIPE):
        if stage.name in wanted:
            wanted.update(stage.needs)
    return (stage for stage in RECIPE if stage.name in wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="append", choices=list(STAGES), help="train this stage and what it needs")
    parser.add_argument("--runs", type=Path, default=Path("runs/testbed"), help="where checkpoints of stages are kept")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.runs.mkdir(parents=True, exist_ok=True)
    for stage in in_order(args.stage or [stage.name for stage in RECIPE]):
        train_stage(stage, args.runs, args.device)


if __name__ == "__main__":
    main()
