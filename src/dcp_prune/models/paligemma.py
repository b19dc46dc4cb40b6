"""PaliGemma: a SigLIP tower, a linear projector, and a prompt that reads images and question in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dcp_prune.errors import InvalidInputError
from dcp_prune.models.base import EncodedImages, ModelAdapter, Reduction
from dcp_prune.models.layout import ImageLayout, plain_layout
from dcp_prune.models.outputs import as_one_tensor
from dcp_prune.models.tower import Tower
from dcp_prune.tokens import Signal


class PaliGemmaAdapter(ModelAdapter):
    """Without [CLS], attention that a token receives takes the place of what [CLS] pays to it."""

    architecture = "PaliGemmaForConditionalGeneration"
    prunes_in_encoder = True
    checks_candidates = False
    image_inputs = ("pixel_values",)
    first_position = 1

    def __init__(self, model: Any) -> None:
        self.model = model
        tower = model.model.vision_tower
        self.tower = Tower(tower, len(tower.encoder.layers))

    def grid(self, pixel_values: Float[Tensor, "i c y x"] | None = None) -> tuple[int, int]:
        return self.tower.grid(pixel_values)

    def layouts(self, images: Mapping[str, Any]) -> list[ImageLayout]:
        pixels, side = images["pixel_values"], self.tower.module.config.image_size
        if pixels.ndim != 4 or pixels.shape[-2:] != (side, side):
            raise InvalidInputError(
                f"{self.architecture} takes pixel_values as images x channels x {side} x {side}, got shape "
                f"{tuple(pixels.shape)}; make them with the model's processor"
            )
        return [plain_layout(*self.grid(pixels))] * pixels.shape[0]

    def encode(
        self,
        images: Mapping[str, Any],
        stages: Sequence[Reduction] = (),
        signals: AbstractSet[Signal] = frozenset(),
        lap: Callable[[str], None] = lambda name: None,
        layouts: Sequence[ImageLayout] | None = None,
    ) -> EncodedImages:
        if layouts is None:
            layouts = self.layouts(images)
        walk = self.tower.walk(images["pixel_values"], self.check_stages(stages), signals, lap)
        features = self.model.model.multi_modal_projector(walk.normed(self.tower.module.post_layernorm))
        return walk.encoded(features, layouts, with_encoder=bool(signals))

    def hand_over(
        self, features: Iterable[Float[Tensor, "k d"]], deepstack: Sequence[Iterable[Float[Tensor, "k d"]]] = ()
    ) -> BaseModelOutputWithPooling:
        return as_one_tensor(features)
