"""What pictures will cost, from a model's config and processor alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import get_adapter
from dcp_prune.profiling.counting import Hollow
from dcp_prune.pruners.base import Pruner


@dataclass(frozen=True)
class PictureCost:
    """What one picture with one prompt costs.

    Attributes:
        image: its name.
        width, height: of the picture, in pixels.
        pruner: `none` without one.
        visual_tokens: that the language model reads.
        prompt_tokens: of the whole prompt, visual tokens included.
        kv_cache_bytes: behind the prefill.
        encoder_flops: operations of encoder and projector, with the stages whose numbers are fixed; None where the
            encoder cannot be counted without looking into the picture.
        prefill_flops: of the language model up to the first new token.
    """

    image: str
    width: int
    height: int
    pruner: str
    visual_tokens: int
    prompt_tokens: int
    kv_cache_bytes: int
    encoder_flops: int | None
    prefill_flops: int


def count_picture(
    hollow: Hollow,
    processor: Any,
    picture: Image.Image,
    prompt: str,
    pruners: Iterable[tuple[str, Pruner]],
    *,
    name: str = "",
) -> list[PictureCost]:
    """Counts a picture without a pruner and with each of these.

    Args:
        hollow: the model.
        processor: of the model.
        picture: RGB.
        prompt: with one image placeholder.
        pruners: by name.
        name: of the picture, for the result.

    Raises:
        InvalidInputError: a stage does not fit the encoder, or the processor makes no image of it.
    """
    adapter = get_adapter(hollow.model)
    inputs = dict(processor(images=[picture], text=[prompt], return_tensors="pt"))
    columns, total = inputs["input_ids"].shape[1], int((inputs["input_ids"] == adapter.image_token_id).sum())
    if total == 0:
        raise InvalidInputError(f"the processor makes no visual tokens of {name}; give the processor of this model")
    grid = adapter.grid(inputs[adapter.image_inputs[0]])

    def counted(label: str, kept: int, stages: Sequence[tuple[int, int]]) -> PictureCost:
        prompt_tokens = columns - total + kept
        prefill = hollow.prefill(1, prompt_tokens)
        return PictureCost(
            image=name,
            width=picture.width,
            height=picture.height,
            pruner=label,
            visual_tokens=kept,
            prompt_tokens=prompt_tokens,
            kv_cache_bytes=prefill.cache_bytes,
            encoder_flops=hollow.encoder_flops(inputs, stages),
            prefill_flops=prefill.flops,
        )

    costs = [counted("none", total, ())]
    for label, pruner in pruners:
        stages = adapter.check_stages(pruner.encoder_stages(grid[0] * grid[1], adapter.num_layers))
        fixed = [(stage.layer, stage.num_tokens) for stage in stages if stage.num_tokens is not None]
        costs.append(counted(label, pruner.budget.resolve(total), fixed))
    return costs
