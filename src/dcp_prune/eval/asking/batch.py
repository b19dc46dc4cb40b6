"""Questions about images as tensors: prompts, the words that pruners read of them, and what to measure against."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.asking.distances import Reference
from dcp_prune.eval.specs import QUESTION, Method, TextCondition
from dcp_prune.integrations.transformers import embed_question
from dcp_prune.tokens import Signal, TextSpace, VisualTokens


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        key: its id; noise is drawn from it.
        image: position of its image in the batch.
        text: the question itself, as a pruner may read it; None lets it read the words of the prompt, as `prune_inputs`
            finds them, where answers are generated.
        prompt: what the language model reads, with one image placeholder.
        wrong: the question of the same slot of another image; needed by the condition `wrong` only.
        picture, task, truths: what its record says: the image's name, the task, and what would be right.
    """

    key: str
    image: int
    text: str | None
    prompt: str
    wrong: str | None = None
    picture: str = ""
    task: str = ""
    truths: tuple[str, ...] = ()


class Batch:
    """Questions that are answered together, and what methods share of them.

    Args:
        model: with an adapter.
        processor: its processor.
        images: RGB.
        questions: about them.
    """

    def __init__(self, model: Any, processor: Any, images: Sequence[Any], questions: Sequence[Question]) -> None:
        self.model = model
        self.processor = processor
        self.images = images
        self.questions = questions
        self.index: Int[Tensor, "q"] = torch.tensor([question.image for question in questions], device=model.device)
        self._texts: dict[tuple[TextCondition, TextSpace], tuple[Tensor | None, Tensor | None]] = {}
        self._references: dict[tuple[int, TextCondition], Reference] = {}
        self._inputs: dict[bool, dict[str, Any]] = {}

    @cached_property
    def ids(self) -> list[list[int]]:
        """Every prompt with one placeholder for its image."""
        prompts = [question.prompt for question in self.questions]
        return self.processor.tokenizer(prompts, **self._special_tokens)["input_ids"]

    def inputs(self, *, with_image: bool) -> dict[str, Any]:
        """What the processor makes of the prompts, padded on the left."""
        if with_image not in self._inputs:
            prompts = [question.prompt for question in self.questions]
            settings = {"return_tensors": "pt", "padding": True, "padding_side": "left", **self._special_tokens}
            if with_image:
                images = [self.images[question.image] for question in self.questions]
                made = self.processor(images=images, text=prompts, **settings)
            else:
                marker = self.processor.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
                bare = [" ".join(prompt.replace(marker, " ").split()) for prompt in prompts]
                made = self.processor.tokenizer(bare, **settings)
            made = made.to(self.model.device)
            if "pixel_values" in made:
                made["pixel_values"] = made["pixel_values"].to(self.model.dtype)
            self._inputs[with_image] = dict(made)
        return dict(self._inputs[with_image])

    def text(self, method: Method) -> tuple[Tensor | None, Tensor | None]:
        """The words that this method's pruner reads, `q t d`, and which are words, `q t`; None for no text, or where
        the questions are only given as prompts, in which the pruner finds them."""
        looks_up = method.text.kind == "lookup" or (method.pruner is not None and method.pruner.text_space == "lookup")
        found = self._text(method.text, "lookup" if looks_up else "embeddings")
        embeddings = self._text(QUESTION)[0]
        if (
            found[0] is None
            and embeddings is not None
            and method.pruner is not None
            and Signal.TEXT in method.pruner.requires
        ):
            # A pruner that cannot do without a text gets one without words.
            return torch.zeros_like(embeddings[:, :1]), torch.zeros_like(embeddings[:, :1, 0], dtype=torch.bool)
        return found

    def reference(self, tokens: VisualTokens, condition: TextCondition = QUESTION) -> Reference:
        """Full tokens to measure distances from, with a question that says what counts in them."""
        key = (id(tokens.features), condition)  # the tokens live as long as the batch
        if key not in self._references:
            self._references[key] = Reference(tokens, self.index, *self._text(condition))
        return self._references[key]

    @property
    def _special_tokens(self) -> dict[str, bool]:
        """Some chat templates write the first token themselves; it is not to stand there twice."""
        first = self.processor.tokenizer.bos_token
        return {"add_special_tokens": False} if first and self.questions[0].prompt.startswith(first) else {}

    def _text(self, condition: TextCondition, space: TextSpace = "embeddings") -> tuple[Tensor | None, Tensor | None]:
        if (condition, space) not in self._texts:
            self._texts[condition, space] = self._read(condition, space)
        return self._texts[condition, space]

    def _read(self, condition: TextCondition, space: TextSpace) -> tuple[Tensor | None, Tensor | None]:
        if condition.kind == "none":
            return None, None
        wrong = condition.kind == "wrong"
        lines = [question.wrong if wrong else question.text for question in self.questions]
        if wrong and None in lines:
            raise InvalidInputError(
                "the condition @wrong needs questions about another image, but there is no other; leave it out"
            )
        if None in lines:
            return None, None
        text, words = embed_question(self.model, self.processor, [str(line) for line in lines], space)
        if condition.kind == "noise" and text is not None:
            text = blend_with_noise(text, condition.noise, [question.key for question in self.questions])
        return text, words


def blend_with_noise(text: Float[Tensor, "q t d"], share: float, keys: Sequence[str]) -> Float[Tensor, "q t d"]:
    """Word embeddings turned towards noise: (1 - share) * direction + share * random direction, norms kept.

    The noise of a question is drawn from its key, so it is the same for every share and on every device.
    """
    noise = torch.empty(text.shape, dtype=torch.float32)
    for row, key in zip(noise, keys, strict=True):
        row.normal_(generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    direction = torch.nn.functional.normalize(text.float(), dim=-1)
    mixed = (1.0 - share) * direction + share * torch.nn.functional.normalize(noise.to(text.device), dim=-1)
    return (torch.nn.functional.normalize(mixed, dim=-1) * text.float().norm(dim=-1, keepdim=True)).to(text.dtype)


def padded(rows: Sequence[Sequence[int]], fill: int, device: Any) -> tuple[Int[Tensor, "r l"], Bool[Tensor, "r l"]]:
    """Rows of ids padded on the right, and what is real of them."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths.unsqueeze(1)


def groups_of_similar_length(lengths: Sequence[int], pass_tokens: int) -> list[list[int]]:
    """Places of rows that share a pass, so that padding and the passes' own cost, in tokens, are least together."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    cuts = [0] + [at for at in range(1, len(order)) if lengths[order[at]] > lengths[order[at - 1]]] + [len(order)]
    best: dict[int, tuple[float, int]] = {0: (0.0, 0)}  # cut -> least cost of all before it, and the cut before it
    for number, end in enumerate(cuts[1:], start=1):
        best[end] = min(
            (best[start][0] + pass_tokens + (end - start) * lengths[order[end - 1]], start) for start in cuts[:number]
        )
    groups: list[list[int]] = []
    end = len(order)
    while end > 0:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups
