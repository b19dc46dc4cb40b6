"""Forms in which models take the features of images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling


def as_one_tensor(features: Iterable[Float[Tensor, "k d"]]) -> BaseModelOutputWithPooling:
    """For a `forward` that wants all images in one tensor: a row per image, `i k d`, or per token, `n 1 d`, where
    images keep different numbers of them; such models only lay tokens one behind the other."""
    rows = list(features)
    same = len({len(row) for row in rows}) == 1
    tensor = torch.stack(rows) if same else torch.cat(rows).unsqueeze(1)
    return BaseModelOutputWithPooling(pooler_output=tensor)  # type: ignore[arg-type]
