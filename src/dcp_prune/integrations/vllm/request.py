"""What is asked of one image, on its way from the process that reads prompts to the one that runs the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dcp_prune.errors import InvalidInputError

FIELD = "dcp_request"
"""Name of the model's input that carries it: of each image its budget, its key and its words in one row, for every
input of its own costs each request time on the way."""


@dataclass(frozen=True)
class ImageRequest:
    """A budget and a question for one image.

    Attributes:
        num_tokens: visual tokens that the prompt holds for it: all that stock vLLM would give, or those to keep.
        text_ids: the words of the question as token ids; none where the pruner reads none.
        key: what tells the image from others, whatever is asked about it; zeros for an image that nobody asks about.
    """

    num_tokens: int
    text_ids: tuple[int, ...]
    key: tuple[int, int]

    @classmethod
    def of(cls, num_tokens: int, text_ids: Sequence[int], image: str | None) -> ImageRequest:
        """With the key of an image that vLLM knows by this string; None if vLLM made it to measure itself."""
        if image is None:
            return cls(num_tokens, tuple(text_ids), (0, 0))
        first, second = np.frombuffer(hashlib.blake2b(image.encode(), digest_size=16).digest(), dtype=np.int64)
        return cls(num_tokens, tuple(text_ids), (int(first), int(second)))

    @property
    def is_real(self) -> bool:
        """Whether someone asked, or vLLM only measures what an image takes."""
        return self.key != (0, 0)


def to_inputs(requests: Sequence[ImageRequest]) -> dict[str, Any]:
    """The requests as an input of the model, one row an image."""
    rows = [(request.num_tokens, *request.key, *request.text_ids) for request in requests]
    return {FIELD: [torch.tensor(row, dtype=torch.long) for row in rows]}


def from_inputs(inputs: Mapping[str, Any]) -> list[ImageRequest]:
    """The requests of a batch of images, which vLLM put together from several prompts.

    Raises:
        InvalidInputError: they were lost on the way.
    """
    if FIELD not in inputs:
        raise InvalidInputError(
            "images reached the model without their budget and question, so they cannot be pruned; this vLLM processes "
            "images in a way that dcp-prune does not know, install one of those that it names at the start"
        )
    rows = [row.tolist() for row in inputs[FIELD]]
    return [ImageRequest(budget, tuple(text), (first, second)) for budget, first, second, *text in rows]
