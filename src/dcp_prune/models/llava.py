"""LLaVA-1.5: a CLIP, DINOv2 or SigLIP tower, a per-token projector, one run of placeholders per image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dcp_prune.errors import UnsupportedModelError
from dcp_prune.models.base import WITHOUT_CLS, EncodedImages, ModelAdapter, Reduction
from dcp_prune.models.layout import ImageLayout, plain_layout, with_separators
from dcp_prune.models.tower import Walk, find_tower
from dcp_prune.tokens import Signal


class LlavaAdapter(ModelAdapter):
    """Walks the tower layer by layer instead of hooking into it; see `Tower`.

    A SigLIP tower has no [CLS]; attention that a token receives takes the place of what [CLS] pays to it. The registers
    of a DINOv2 tower reach the language model in front of the patches. They are never offered to a pruner, and like
    separators they go as soon as anything goes.
    """

    architecture = "LlavaForConditionalGeneration"
    prunes_in_encoder = True
    saliency = "[CLS]"
    signals = WITHOUT_CLS | {Signal.CLS_VALUE_AFFINITY}
    tower_name: ClassVar[str] = "vision_tower"
    needs_cls: ClassVar[bool | None] = None
    """Whether the architecture's towers have [CLS]; None where both kinds are met."""
    image_inputs = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model = model
        module = getattr(model.model, self.tower_name)
        tower = find_tower(module, config.vision_feature_layer)
        if tower is None or self.needs_cls not in (None, tower.num_prefix_tokens > 0):
            kinds = {None: "CLIP, DINOv2 or SigLIP encoder", True: "CLIP encoder with [CLS]", False: "SigLIP encoder"}
            raise UnsupportedModelError(
                f"the vision tower {type(module).__name__} is no {kinds[self.needs_cls]}, and no other tower of "
                f"{self.architecture} can be pruned so far"
            )
        self.tower = tower
        self.strategy = "default" if tower.num_prefix_tokens else "full"
        """`vision_feature_select_strategy` under which every feature is a patch or a register."""
        if config.vision_feature_select_strategy != self.strategy:
            done = "passes on [CLS] like a patch" if self.strategy == "default" else "drops the first patch"
            raise UnsupportedModelError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} {done}; "
                f"set model.config.vision_feature_select_strategy to {self.strategy!r}"
            )
        if not tower.num_prefix_tokens:
            self.saliency, self.signals = ModelAdapter.saliency, WITHOUT_CLS

    @property
    def num_registers(self) -> int:
        return max(0, self.tower.num_prefix_tokens - 1)

    def grid(self, pixel_values: Float[Tensor, "i c y x"] | None = None) -> tuple[int, int]:
        return self.tower.grid(pixel_values)

    def layouts(self, images: Mapping[str, Any]) -> list[ImageLayout]:
        pixels = images[self.image_inputs[0]]
        layout = plain_layout(*self.grid(pixels))
        if self.num_registers:
            layout = with_separators(layout, [0] * self.num_registers)
        return [layout] * pixels.shape[0]

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
        pixels = self.stack_tiles(images[self.image_inputs[0]], layouts)
        walk = self.tower.walk(pixels, self.check_stages(stages), signals, lap)
        return self.project(walk, layouts, with_encoder=bool(signals))

    def project(self, walk: Walk, layouts: Sequence[ImageLayout], with_encoder: bool) -> EncodedImages:
        """What the model does to the features of tiles behind the encoder; see `Walk.encoded`."""
        projector, count = self.model.model.multi_modal_projector, self.num_registers
        if not count or walk.prefix is None:
            return walk.encoded(projector(walk.encoder.features), layouts, with_encoder)
        # Together, as the model does it: products of other shapes may round differently.
        features = projector(torch.cat((walk.prefix[:, 1:], walk.encoder.features), dim=1))
        return walk.encoded(features[:, count:], layouts, with_encoder, separators=features[:, :count])

    def stack_tiles(self, pixel_values: Any, layouts: Sequence[ImageLayout]) -> Float[Tensor, "t c y x"]:
        """All tiles of all images, without those that only pad a batch."""
        return pixel_values

    def hand_over(
        self, features: Iterable[Float[Tensor, "k d"]], deepstack: Sequence[Iterable[Float[Tensor, "k d"]]] = ()
    ) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=list(features))  # type: ignore[arg-type]
