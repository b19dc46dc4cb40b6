"""InternVL 2.5 to 3.5: tiles through a ViT with [CLS], whose patches a projector merges to one token per 2 x 2 cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dcp_prune.errors import InvalidInputError, UnsupportedModelError
from dcp_prune.models.base import WITHOUT_CLS, EncodedImages, ModelAdapter, Reduction
from dcp_prune.models.layout import ImageLayout, plain_layout, stacked_layout, tile_rows
from dcp_prune.models.outputs import as_one_tensor
from dcp_prune.models.tower import Tower, feature_layers
from dcp_prune.tokens import Signal


class InternVLTower(Tower):
    """The same parts as in CLIP under names of its own; queries and keys may be normed, and no layer takes a mask."""

    @property
    def num_prefix_tokens(self) -> int:
        return 1

    @property
    def layers(self) -> Any:
        return self.module.encoder.layer

    @property
    def patch_weight(self) -> Tensor:
        return self.module.embeddings.patch_embeddings.projection.weight

    def attention(self, layer: Any) -> tuple[Any, Any]:
        return layer.attention, layer.layernorm_before

    def run(self, layer: Any, hidden: Float[Tensor, "t m v"], attention_mask: Any) -> Float[Tensor, "t m v"]:
        return layer(hidden)


class InternVLAdapter(ModelAdapter):
    """Which tiles make up an image stands in the prompt only: one run of placeholders holds all of them, the thumbnail
    last. How they lie in the picture stands nowhere, so boxes of an image with several tiles are shares of a tile,
    right for the picture in its thumbnail only; the record's `tiles` says which tile. Signals are means over cells.

    A frame of a video has a run of its own, behind words such as `Frame1:`, and is pruned as an image.
    """

    architecture = "InternVLForConditionalGeneration"
    prunes_in_encoder = False
    why_not_in_encoder = ", whose projector merges whole cells of patches"
    saliency = "[CLS]"
    cuts_tiles = True
    signals = WITHOUT_CLS | {Signal.CLS_VALUE_AFFINITY}
    image_inputs = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")

    def __init__(self, model: Any) -> None:
        config, tower = model.config, model.model.vision_tower
        self.model = model
        self.tower = InternVLTower(
            tower, feature_layers(config.vision_feature_layer, len(tower.encoder.layer)), by_name=True
        )
        self.cell = round(1 / config.downsample_ratio)
        """Side of a cell in patches."""
        if config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} passes on [CLS], which is "
                "part of no cell; set model.config.vision_feature_select_strategy to 'default'"
            )

    def grid(self, pixel_values: Float[Tensor, "t c y x"] | None = None) -> tuple[int, int]:
        rows, cols = self.tower.grid(pixel_values)
        return rows // self.cell, cols // self.cell

    def layouts(self, images: Mapping[str, Any]) -> list[ImageLayout]:
        pixels, ids = images["pixel_values"], images.get("input_ids")
        rows, cols = self.tower.grid(pixels)
        if pixels.ndim != 4 or rows != cols or rows % self.cell:
            raise InvalidInputError(
                f"{self.architecture} takes pixel_values as tiles x channels x rows x columns, of square tiles of "
                f"a multiple of {self.cell} patches, got shape {tuple(pixels.shape)}; make them with the model's "
                "processor"
            )
        grid = self.grid(pixels)
        tiles = [1] * len(pixels)
        if ids is not None:
            tiles = _read_images(ids, self.image_token_id, grid[0] * grid[1], len(pixels))
        return [plain_layout(*grid) if count == 1 else stacked_layout(count, *grid) for count in tiles]

    def take(self, images: Mapping[str, Any], layouts: Sequence[ImageLayout], which: Sequence[int]) -> dict[str, Any]:
        return {"pixel_values": images["pixel_values"][tile_rows(layouts, which)]}

    def encode(
        self,
        images: Mapping[str, Any],
        stages: Sequence[Reduction] = (),
        signals: AbstractSet[Signal] = frozenset(),
        lap: Callable[[str], None] = lambda name: None,
        layouts: Sequence[ImageLayout] | None = None,
    ) -> EncodedImages:
        planned = self.check_stages(stages)
        layouts = self.layouts(images) if layouts is None else layouts
        pixels, inner = images["pixel_values"].to(self.model.dtype), self.model.model
        walk = self.tower.walk(pixels, planned, signals, lap)
        hidden = walk.encoder.features
        if self.model.config.vision_feature_layer == -1:
            hidden = walk.normed(self.tower.module.layernorm)
        grid = self.tower.grid(pixels)
        shuffled = inner.pixel_shuffle(hidden.unflatten(1, grid), scale_factor=self.model.config.downsample_ratio)
        features = inner.multi_modal_projector(shuffled.flatten(1, 2))
        return walk.merged(grid, self.cell).encoded(features, layouts, with_encoder=bool(signals))

    def hand_over(
        self, features: Iterable[Float[Tensor, "k d"]], deepstack: Sequence[Iterable[Float[Tensor, "k d"]]] = ()
    ) -> BaseModelOutputWithPooling:
        return as_one_tensor(features)


def _read_images(ids: Int[Tensor, "b l"], image_token_id: int, size: int, given: int) -> list[int]:
    """Tiles of each image; a prompt by itself may begin with images whose pixels are not there any more.

    Args:
        ids: prompts, in which images are apart from each other.
        size: placeholders of a tile.
        given: tiles of all images.

    Raises:
        InvalidInputError: tiles and placeholders do not match.
    """
    places = ids == image_token_id
    starts = places & ~functional.pad(places, (1, 0))[:, :-1]
    runs = torch.bincount(starts.flatten().cumsum(0)[places.flatten()])[1:].tolist()
    if not runs:
        return [1] * given  # the prompt holds no placeholder, which is refused for all models alike
    ends = [0, *accumulate(run // size for run in runs)]
    first = ends[-1] - given
    if any(run % size for run in runs) or first not in ends or (first and len(ids) > 1):
        raise InvalidInputError(
            f"the prompt holds {runs} image placeholders in a row, but pixel_values hold {given} tiles of {size} "
            "visual tokens each; make both in one call of the model's processor, do not truncate them, and for several "
            "conversations at once pass the pixels of all their images"
        )
    return [run // size for run in runs[ends.index(first) :]]
