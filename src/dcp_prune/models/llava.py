"""LLaVA-1.5: a CLIP tower with [CLS], a per-token projector, one run of placeholders per image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dcp_prune.errors import UnsupportedModelError
from dcp_prune.models.base import WITHOUT_CLS, EncodedImages, ModelAdapter, Reduction
from dcp_prune.models.layout import ImageLayout, plain_layout
from dcp_prune.models.tower import Tower, Walk, feature_layers
from dcp_prune.tokens import Signal


class LlavaAdapter(ModelAdapter):
    """Walks the CLIP tower layer by layer instead of hooking into it; see `Tower`."""

    architecture = "LlavaForConditionalGeneration"
    prunes_in_encoder = True
    saliency = "[CLS]"
    signals = WITHOUT_CLS | {Signal.CLS_VALUE_AFFINITY}
    tower_name: ClassVar[str] = "vision_tower"
    strategy: ClassVar[str] = "default"
    """`vision_feature_select_strategy` under which every feature is a patch."""
    image_inputs = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model = model
        tower = getattr(model.model, self.tower_name)
        if config.vision_feature_select_strategy != self.strategy:
            done = "passes on [CLS] like a patch" if self.strategy == "default" else "drops the first patch"
            raise UnsupportedModelError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} {done}; "
                f"set model.config.vision_feature_select_strategy to {self.strategy!r}"
            )
        self.check_tower(tower)
        # An engine may have left out the layers behind it.
        num_layers = feature_layers(config.vision_feature_layer, tower.config.num_hidden_layers)
        self.tower = Tower(tower, num_layers, getattr(tower, "over_all_heads", None))

    def check_tower(self, tower: Any) -> None:
        """Refuses a tower that `Tower` cannot walk.

        Raises:
            UnsupportedModelError: it is of another kind.
        """
        embeddings = getattr(tower, "embeddings", None)
        if not hasattr(embeddings, "class_embedding") or not hasattr(tower, "pre_layrnorm"):
            raise UnsupportedModelError(
                f"the vision tower {type(tower).__name__} is no CLIP encoder with a [CLS] token, and no "
                f"other tower of {self.architecture} that can be pruned so far"
            )

    def grid(self, pixel_values: Float[Tensor, "i c y x"] | None = None) -> tuple[int, int]:
        return self.tower.grid(pixel_values)

    def layouts(self, images: Mapping[str, Any]) -> list[ImageLayout]:
        pixels = images[self.image_inputs[0]]
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
        pixels = self.stack_tiles(images[self.image_inputs[0]], layouts)
        walk = self.tower.walk(pixels, self.check_stages(stages), signals, lap)
        return self.project(walk, layouts, with_encoder=bool(signals))

    def project(self, walk: Walk, layouts: Sequence[ImageLayout], with_encoder: bool) -> EncodedImages:
        """What the model does to the features of tiles behind the encoder; see `Walk.encoded`."""
        return walk.encoded(self.model.model.multi_modal_projector(walk.encoder.features), layouts, with_encoder)

    def stack_tiles(self, pixel_values: Any, layouts: Sequence[ImageLayout]) -> Float[Tensor, "t c y x"]:
        """All tiles of all images, without those that only pad a batch."""
        return pixel_values

    def hand_over(
        self, features: Iterable[Float[Tensor, "k d"]], deepstack: Sequence[Iterable[Float[Tensor, "k d"]]] = ()
    ) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=list(features))  # type: ignore[arg-type]
