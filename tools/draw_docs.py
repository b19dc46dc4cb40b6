"""Draws the pictures of docs/method.md and docs/methods/README.md: what each step does to one held-out picture.

`python tools/draw_docs.py` writes docs/images/*.png. The steps are those of the library, called one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dcp_prune.assistant import Assistant, View
from dcp_prune.functional.clustering import assign, facility_location
from dcp_prune.functional.distribution import kappa
from dcp_prune.functional.selection import farthest_point
from dcp_prune.functional.similarity import cosine_similarity, gather_tokens, in_patches
from dcp_prune.integrations.transformers import embed_question, encode_images
from dcp_prune.pruners.dcp import DCPPruner
from dcp_prune.pruners.dcp_progressive import ProgressiveDCPPruner
from dcp_prune.registry import get_pruner, list_pruners, make_pruner
from dcp_prune.testbed.worlds import world_of
from dcp_prune.tokens import EncoderReduction, EncoderTokens, Signal, VisualTokens
from dcp_prune.viz.overlay import Grid, Tile, absorption_map, enlarged, heat_map, kept_tokens, sheet

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "images"
SEED = 1_000_000_000
"""The first held-out one, so that nobody chose it."""
TASK = "position"
SIDE = 288
BUDGET = 16
COLUMNS = 3


@dataclass(frozen=True, eq=False)
class Watched:
    """A stage inside the encoder, and what it did: the tokens it saw, and what it made of them."""

    stage: Any
    seen: list[tuple[EncoderTokens, EncoderReduction]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stage, name)

    def reduce(self, tokens: EncoderTokens) -> EncoderReduction:
        self.seen.append((tokens, self.stage.reduce(tokens)))
        return self.seen[-1][1]


class WatchedPruner(ProgressiveDCPPruner):
    """`dcp_progressive`, whose stages are watched."""

    def encoder_stages(self, num_original: int, num_layers: int) -> tuple[Any, ...]:
        return tuple(map(Watched, super().encoder_stages(num_original, num_layers)))


def main() -> None:
    """Draws all pictures."""
    assistant = Assistant.load("testbed")
    scene = world_of("natural").make_scene(SEED, "crowded")
    image = Image.fromarray(scene.image)
    question, other = (each.text for each in scene.questions if each.task == TASK)
    view = assistant.look(image)
    OUTPUT.mkdir(exist_ok=True)
    pages = {
        "method-signals": signals(assistant, view, question, other),
        "method-stages": stages(assistant, view),
        "method-selection": selection(assistant, view, question),
        "pruners": every_pruner(assistant, image, question),
    }
    for name, page in pages.items():
        page.quantize(256, dither=Image.Dither.NONE).save(OUTPUT / f"{name}.png", optimize=True)


@torch.no_grad()
def signals(assistant: Assistant, view: View, question: str, other: str) -> Image.Image:
    """What a pruner can go by: saliency, and relevance to either question."""
    grid = Grid.fit(*view.shape, SIDE)
    assert view.saliency is not None
    panels = [
        Tile(enlarged(view.image, grid), ("What the model saw", f"{grid.rows} x {grid.cols} patches")),
        Tile(heat_map(view.image, view.saliency, grid), ("Saliency", "attention of [CLS]")),
    ]
    for text in (question, other):
        relevance = DCPPruner(num_tokens=BUDGET).tatcs.read(asked(assistant, view, text)).relevance[0]
        panels.append(Tile(heat_map(view.image, relevance.numpy(), grid), ("Relevance", text)))
    return sheet(in_rows(panels, 2), title="")


@torch.no_grad()
def stages(assistant: Assistant, view: View) -> Image.Image:
    """What each stage inside the encoder keeps, and which anchor its context goes to."""
    grid = Grid.fit(*view.shape, SIDE - 48)  # cells too small for numbers, of which there would be too many
    encoded = encode_images(assistant.model, view.seen.pixels, WatchedPruner(num_tokens=BUDGET))
    panels = []
    for stage in encoded.stages:
        ((tokens, reduction),) = stage.seen
        places = tokens.indices[0]  # of the tokens that came in, in the raster of the picture
        kept = places[reduction.kept[0]].tolist()
        assignment = np.full(grid.rows * grid.cols, -1)
        assignment[places.numpy()] = reduction.assignment[0].numpy()
        panels += [
            Tile(kept_tokens(view.image, kept, grid), (f"After layer {stage.layer + 1}", f"{len(kept)} anchors")),
            Tile(absorption_map(view.image, kept, assignment, grid), ("", "which anchor each context goes to")),
        ]
    return sheet(in_rows(panels, 2), title="")


@torch.no_grad()
def selection(assistant: Assistant, view: View, question: str) -> Image.Image:
    """The steps after the encoder: first choice, demand, centres, clusters, kept tokens."""
    grid, pruner = Grid.fit(*view.shape, SIDE), DCPPruner(num_tokens=BUDGET)
    tokens, tatcs = asked(assistant, view, question), pruner.tatcs
    similarity = cosine_similarity(tokens.encoder.features)
    words = tatcs.read(tokens)
    demand = tatcs.demand(tokens, None, words)
    shares = tatcs.representation(tokens, similarity, words, in_patches(tokens.positions, pruner.time_weight))
    first = farthest_point(similarity, BUDGET)
    centres = facility_location(shares, BUDGET, demand=demand)
    affinity = tatcs.affinity(similarity, words)
    clusters = assign(affinity, centres)[0].numpy()
    result = pruner(tokens)
    kept = result.indices[0].tolist()

    def kappa_of(chosen: Any) -> str:
        return f"kappa {float(kappa(gather_tokens(tokens.features, chosen), tokens.features)):.2f}"

    panels = [
        Tile(kept_tokens(view.image, first[0].tolist(), grid), ("1 First choice", kappa_of(first))),
        Tile(
            heat_map(view.image, (demand - demand.min())[0].numpy(), grid), ("2 Demand", "what the question adds to it")
        ),
        Tile(kept_tokens(view.image, centres[0].tolist(), grid), ("3 Centres", kappa_of(centres))),
        Tile(absorption_map(view.image, centres[0].tolist(), clusters, grid), ("4 Clusters", "one around each centre")),
        Tile(kept_tokens(view.image, kept, grid), ("5 Kept tokens", kappa_of(result.indices))),
    ]
    return sheet(in_rows(panels, COLUMNS), title="")


def every_pruner(assistant: Assistant, image: Image.Image, question: str) -> Image.Image:
    """What every pruner that the model can give its signals keeps of the same picture, with the answer."""
    absent = {name for name in list_pruners() if Signal.CLIP_SIMILARITY in get_pruner(name).requires}
    chosen = {name: make_pruner(name, num_tokens=BUDGET) for name in list_pruners() if name not in absent}
    view = assistant.look(image, *chosen.values())
    grid, prompt = Grid.fit(*view.shape, SIDE), assistant.prompt(question)
    full = assistant.ask(view, prompt).text
    panels = [Tile(enlarged(view.image, grid), ("all tokens", f"answer: {full}"))]
    for name, pruner in chosen.items():
        reply = assistant.ask(view, prompt, pruner)
        panel = kept_tokens(view.image, reply.record.indices[0].tolist(), grid)
        panels.append(Tile(panel, (name, f"answer: {reply.text}, kappa {reply.kappa:.2f}")))
    return sheet(
        in_rows(panels, COLUMNS),
        title="",
        footer=f"{question} {BUDGET} of {view.num_tokens} visual tokens, testbed (natural)",
    )


def in_rows(panels: list[Tile], columns: int) -> list[list[Tile]]:
    """The panels from left to right in rows, so that a page need not make them smaller."""
    return [panels[start : start + columns] for start in range(0, len(panels), columns)]


def asked(assistant: Assistant, view: View, question: str) -> VisualTokens:
    """All tokens of the picture, with the words of a question."""
    text, mask = embed_question(assistant.model, assistant.processor, [question])
    return replace(view.seen.full, text=text, text_mask=mask)


if __name__ == "__main__":
    main()
