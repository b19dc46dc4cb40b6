"""The synthetic inputs behind the golden files: a function of shape and seed, checked by hash.

Draws come from one stream in a fixed order, and only sums, products and `exp` follow, so features are bit-identical on
every machine; the softmax of the attention may differ in the last place.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Shape:
    """Sizes of one family of inputs; `crops` images of `side` x `side` patches that share what they may show."""

    crops: int = 1
    side: int = 24
    width: int = 1024
    heads: int = 16
    key_width: int = 64
    text_width: int = 768
    questions: int = 1
    regions: int = 14
    salient: int = 4


SHAPES = {
    "llava15": Shape(),
    "next": Shape(crops=5),
    "small": Shape(side=8, width=32, heads=4, key_width=16, text_width=24, questions=2, regions=6, salient=2),
}


@dataclass(frozen=True)
class Inputs:
    """float32; row 0 of `hidden`, `keys` and `cls_attn` is [CLS].

    Attributes:
        hidden: encoder features, c x (n + 1) x width.
        cls_attn: attention row of [CLS] per head, c x heads x 1 x (n + 1).
        keys: keys averaged over heads, c x (n + 1) x key_width.
        proj: features after the projector, c x n x width.
        image_embed: patches in CLIP's joint space, c x n x text_width.
        text_embed: questions in CLIP's joint space, questions x text_width.
    """

    hidden: Array
    cls_attn: Array
    keys: Array
    proj: Array
    image_embed: Array
    text_embed: Array


@cache
def make_inputs(shape_name: str, seed: int) -> Inputs:
    """Patches in Voronoi regions with a common mean, a few of them salient."""
    shape = SHAPES[shape_name]
    draw = np.random.default_rng(seed)
    n, width = shape.side**2, shape.width
    row, column = np.divmod(np.arange(n), shape.side)
    patches = np.stack([row / shape.side, column / shape.side], axis=1)
    common, common_projected = draw.normal(size=width), draw.normal(size=width)
    centres = draw.normal(size=(shape.regions, width))
    key_centres = draw.normal(size=(shape.regions, shape.key_width))
    projected_centres = draw.normal(size=(shape.regions, width))
    embedded_centres = draw.normal(size=(shape.regions, shape.text_width))
    text = draw.normal(size=(shape.questions, shape.text_width))
    crops = []
    for _ in range(shape.crops):
        sites = draw.uniform(size=(shape.regions, 2))
        region = ((patches[:, None] - sites) ** 2).sum(-1).argmin(1)
        spread = draw.uniform(0.6, 1.6, size=(n, 1))
        hidden = 0.7 * common + 0.9 * centres[region] + 0.8 * spread * draw.normal(size=(n, width))
        cls_hidden = 0.7 * common + draw.normal(size=width)
        keys = key_centres[region] + 0.7 * draw.normal(size=(n, shape.key_width))
        cls_key = draw.normal(size=shape.key_width)
        proj = 0.7 * common_projected + 0.9 * projected_centres[region] + 0.8 * spread * draw.normal(size=(n, width))
        embed = 0.8 * embedded_centres[region] + draw.normal(size=(n, shape.text_width))
        embed = embed + 0.4 * text.mean(0) * draw.normal(size=(n, 1))
        saliency, salient = np.zeros(shape.regions), draw.uniform(0.8, 2.0, size=shape.salient)
        saliency[draw.permutation(shape.regions)[: shape.salient]] = salient
        logits = saliency[region][None] + 0.5 * draw.normal(size=(shape.heads, n)) + 0.9 * draw.normal(size=(1, n))
        logits = np.concatenate([1.0 + draw.normal(size=(shape.heads, 1)), logits], axis=1)
        mass = np.exp(logits - logits.max(1, keepdims=True))
        crops.append(
            {
                "hidden": np.concatenate([cls_hidden[None], hidden]),
                "cls_attn": (mass / mass.sum(1, keepdims=True))[:, None],
                "keys": np.concatenate([cls_key[None], keys]),
                "proj": proj,
                "image_embed": embed,
            }
        )
    stacked = {name: np.stack([crop[name] for crop in crops]).astype(np.float32) for name in crops[0]}
    return Inputs(**stacked, text_embed=text.astype(np.float32))


@dataclass(frozen=True)
class MiniEncoder:
    """Random weights of a small pre-norm CLIP encoder, and what enters its first layer.

    Attributes:
        layers: for each layer its arrays `ln1_w`, `ln1_b`, `q_w`, ..., `fc2_b`, weights as out x in.
        tokens: behind the first norm, [CLS] first, 1 x (n + 1) x width.
    """

    layers: list[dict[str, Array]]
    tokens: Array


def make_mini_encoder(seed: int, layers: int, width: int, mlp: int, n: int) -> MiniEncoder:
    """Patches in ten runs that look alike, and weights at which attention is neither even nor concentrated."""
    draw = np.random.default_rng(seed)
    scale = width**-0.5

    def norm() -> tuple[Array, Array]:
        return 1 + 0.1 * draw.normal(size=width), 0.05 * draw.normal(size=width)

    def linear(gain: float, bias: float, out: int = width, into: int = width) -> tuple[Array, Array]:
        return gain * draw.normal(size=(out, into)), bias * draw.normal(size=out)

    made = []
    for _ in range(layers):
        layer = {
            "ln1": norm(),
            "q": linear(2.0 * scale, 0.05),
            "k": linear(2.0 * scale, 0.05),
            "v": linear(scale, 0.02),
            "o": linear(0.5 * scale, 0.02),
            "ln2": norm(),
            "fc1": linear(scale, 0.02, mlp),
            "fc2": linear(0.5 * mlp**-0.5, 0.02, width, mlp),
        }
        made.append(
            {
                f"{name}_{kind}": value.astype(np.float32)
                for name, pair in layer.items()
                for kind, value in zip("wb", pair, strict=True)
            }
        )
    centres = draw.normal(size=(10, width))
    run = np.sort(draw.integers(0, 10, size=n))
    tokens = np.concatenate([draw.normal(size=(1, width)), centres[run] + 0.6 * draw.normal(size=(n, width))])
    return MiniEncoder(made, tokens[None].astype(np.float32))


def make_words(seed: int, inputs: Inputs, count: int) -> Array:
    """Word embeddings in the projector's space that each lean towards some patch, count x width."""
    draw = np.random.default_rng(seed + 10**6)
    patches = inputs.proj.reshape(-1, inputs.proj.shape[-1])
    chosen = patches[draw.integers(0, len(patches), size=count)]
    return (0.5 * chosen + draw.normal(size=(count, patches.shape[1]))).astype(np.float32)


def sha256(values: Array) -> str:
    """Of the raw bytes."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
