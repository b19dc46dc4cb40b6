"""What is asked of one image, on its way from the process that reads prompts to the one that runs the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dcp_prune.errors import InvalidInputError

FIELDS = ("dcp_num_tokens", "dcp_text_ids", "dcp_image_key")
"""Names of the model's inputs that carry it."""


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


def to_fields(requests: Sequence[ImageRequest]) -> dict[str, Any]:
    """The requests as tensors, one entry an image."""
    return {
        "dcp_num_tokens": torch.tensor([request.num_tokens for request in requests], dtype=torch.long),
        "dcp_text_ids": [torch.tensor(request.text_ids, dtype=torch.long) for request in requests],
        "dcp_image_key": torch.tensor([request.key for request in requests], dtype=torch.long).reshape(-1, 2),
    }


def from_fields(inputs: Mapping[str, Any]) -> list[ImageRequest]:
    """The requests of a batch of images, which vLLM put together from several prompts.

    Raises:
        InvalidInputError: they were lost on the way.
    """
    if any(name not in inputs for name in FIELDS):
        raise InvalidInputError(
            "images reached the model without their budget and question, so they cannot be pruned; this vLLM processes "
            "images in a way that dcp-prune does not know, install one of those that it names at the start"
        )
    budgets, texts, keys = (list(inputs[name]) for name in FIELDS)
    return [
        ImageRequest(int(budget), tuple(text.tolist()), (int(key[0]), int(key[1])))
        for budget, text, key in zip(budgets, texts, keys, strict=True)
    ]
