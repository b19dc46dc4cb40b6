"""Loading the shipped checkpoints; each is an ordinary LLaVA folder that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dcp_prune.errors import InvalidInputError
from dcp_prune.testbed.language import prompt

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["CHECKPOINTS", "DEFAULT_CHECKPOINT", "checkpoint_path", "load", "prompt"]

CHECKPOINTS = ("natural", "weak")
"""`natural`: a pretrained vision encoder looks at photographs with things on them. `weak`: small and fast, trained from
nothing on sprites; words and patches hardly look alike."""
DEFAULT_CHECKPOINT = "natural"

WEIGHTS = Path(__file__).parent / "weights"


def checkpoint_path(checkpoint: str = DEFAULT_CHECKPOINT) -> Path:
    """The folder of a shipped checkpoint.

    Raises:
        InvalidInputError: there is no checkpoint of that name.
    """
    if checkpoint not in CHECKPOINTS:
        raise InvalidInputError(
            f"there is no testbed checkpoint {checkpoint!r}; choose one of {', '.join(CHECKPOINTS)}"
        )
    return WEIGHTS / checkpoint


def load(
    checkpoint: str = DEFAULT_CHECKPOINT, *, dtype: torch.dtype | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model (in float32 unless told otherwise) and processor of a shipped checkpoint, in evaluation mode.

    Raises:
        InvalidInputError: there is no checkpoint of that name.
    """
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    path = checkpoint_path(checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype or torch.float32, local_files_only=True)
    return model.eval(), LlavaProcessor.from_pretrained(path, local_files_only=True)
