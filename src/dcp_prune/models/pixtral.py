"""Pixtral: images of any size, packed into one sequence of a tower with 2-D rotary positions, without [CLS]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.pixtral.modeling_pixtral import (
    apply_rotary_pos_emb,
    generate_block_attention_mask,
    is_flash_attention_requested,
)

from dcp_prune.errors import InvalidInputError, UnsupportedModelError
from dcp_prune.models.base import EncodedImages, ModelAdapter, Reduction
from dcp_prune.models.layout import ImageLayout, pad_images, plain_layout
from dcp_prune.models.tower import asks_for_whole, feature_layers, merge_cells, packed_signals
from dcp_prune.tokens import Signal


@dataclass(frozen=True)
class PixtralTower:
    """The same modules in the same order as in the tower's own `forward`, so features are bit-equal; see `Tower`.

    Attributes:
        module: with `patch_conv`, `ln_pre`, `patch_positional_embedding` and `transformer.layers`.
        num_layers: layers up to and including the feature layer.
    """

    module: Any
    num_layers: int

    @property
    def one_by_one(self) -> bool:
        """Whether each image has to be a sequence by itself, since flash attention takes no mask between them."""
        return is_flash_attention_requested(self.module.config)

    def walk(
        self,
        pixel_values: Float[Tensor, "i c y x"],
        sizes: Sequence[tuple[int, int]],
        signals: AbstractSet[Signal],
        lap: Callable[[str], None],
    ) -> tuple[Float[Tensor, "1 n v"], dict[str, list[Tensor]]]:
        """What leaves the feature layer, and the signals of each image.

        Args:
            pixel_values: images, padded to the largest of them.
            sizes: (height, width) of each in pixels.
            signals: what to capture at the feature layer: fields of `EncoderTokens` by name.
            lap: as for `ModelAdapter.encode`.
        """
        tower = self.module
        grids = [(height // tower.patch_size, width // tower.patch_size) for height, width in sizes]
        lengths = [rows * cols for rows, cols in grids]
        weight = tower.patch_conv.weight
        pixels = pixel_values if weight.is_meta else pixel_values.to(weight.device)  # meta: offloaded, and loads itself
        positions = torch.cat([plain_layout(*grid).positions for grid in grids]).long()
        last = tower.transformer.layers[self.num_layers - 1]
        if asks_for_whole({"the vision tower": tower, "its encoder": tower.transformer}):
            output = tower(pixels, image_sizes=sizes, output_hidden_states=True, return_dict=True)
            hidden, after = output.hidden_states[self.num_layers - 1 : self.num_layers + 1]
            rotary, mask = tower.patch_positional_embedding(hidden, positions.to(hidden.device)), None
        else:
            patches = tower.patch_conv(pixels.to(weight.dtype))
            cut = [each[:, :rows, :cols].flatten(1).T for each, (rows, cols) in zip(patches, grids, strict=True)]
            hidden, after = tower.ln_pre(torch.cat(cut).unsqueeze(0)), None
            rotary = tower.patch_positional_embedding(hidden, positions.to(hidden.device))
            mask = None if self.one_by_one else generate_block_attention_mask(lengths, hidden)
            for layer in tower.transformer.layers[: self.num_layers - 1]:
                hidden = layer(hidden, mask, position_embeddings=rotary)
        lap("encode")
        captured = self._capture(last, hidden, rotary, lengths, signals)
        lap("select")
        hidden = last(hidden, mask, position_embeddings=rotary) if after is None else after
        if signals:
            captured["features"] = list(hidden.squeeze(0).split(lengths))
        return hidden, captured

    @torch.no_grad()
    def _capture(
        self,
        layer: Any,
        hidden: Float[Tensor, "1 n v"],
        rotary: tuple[Tensor, Tensor],
        lengths: Sequence[int],
        wanted: AbstractSet[Signal],
    ) -> dict[str, list[Tensor]]:
        """Signals of one layer from its own q, k and v."""
        if not wanted - {Signal.ENCODER_FEATURES}:
            return {}
        attention, states = layer.attention, layer.attention_norm(hidden)
        queries, keys, values = (
            project(states)[0].unflatten(-1, (attention.num_heads, -1))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = (each.to(hidden.device) for each in rotary)
        queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin, unsqueeze_dim=1)
        return packed_signals(queries, keys, values, lengths, wanted, scale=attention.scaling)


class PixtralAdapter(ModelAdapter):
    """LLaVA's class with Pixtral's tower, one placeholder per patch.

    In the prompt `[IMG_BREAK]` stands behind each row of an image's placeholders and goes with them; `[IMG_END]` behind
    the last one stays. Without [CLS], attention that a token receives takes the place of what [CLS] pays to it.
    """

    architecture = "LlavaForConditionalGeneration(pixtral)"
    prunes_in_encoder = False
    why_not_in_encoder = ", which sees all images as one sequence under one mask"
    image_inputs = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")
    image_details = ("image_sizes",)
    markers = True

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model = model
        tower = model.model.vision_tower
        self.cell = getattr(config, "spatial_merge_size", 1)
        """The patches that become one token are those of a cell x cell square."""
        self.tower = PixtralTower(tower, feature_layers(config.vision_feature_layer, len(tower.transformer.layers)))
        self.patch = tower.patch_size
        if getattr(config, "vision_feature_select_strategy", "full") != "full":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} drops the first patch of "
                "an encoder without [CLS]; set model.config.vision_feature_select_strategy to 'full'"
            )

    def grid(self, pixel_values: Float[Tensor, "i c y x"] | None = None) -> tuple[int, int]:
        size = (self.tower.module.config.image_size,) * 2 if pixel_values is None else pixel_values.shape[-2:]
        rows, cols = (int(length) // self.patch // self.cell for length in size)
        return rows, cols

    def layouts(self, images: Mapping[str, Any]) -> list[ImageLayout]:
        unit = self.patch * self.cell
        return [plain_layout(height // unit, width // unit) for height, width in self._sizes(images)]

    def encode(
        self,
        images: Mapping[str, Any],
        stages: Sequence[Reduction] = (),
        signals: AbstractSet[Signal] = frozenset(),
        lap: Callable[[str], None] = lambda name: None,
        layouts: Sequence[ImageLayout] | None = None,
    ) -> EncodedImages:
        self.check_stages(stages)
        layouts = self.layouts(images) if layouts is None else layouts
        pixels, sizes = images["pixel_values"], self._sizes(images)
        alone = self.tower.one_by_one
        packs = [slice(image, image + 1) for image in range(len(sizes))] if alone else [slice(None)]
        features: list[Tensor] = []
        captured: dict[str, list[Tensor]] = {}
        for pack in packs:
            hidden, found = self.tower.walk(pixels[pack], sizes[pack], signals, lap)
            features.extend(self.project(hidden, sizes[pack]).split([len(layout) for layout in layouts[pack]]))
            for name, values in found.items():
                captured.setdefault(name, []).extend(self._merge(values, sizes[pack]))
        return EncodedImages(pad_images(features, layouts, captured), tuple(layouts))

    def project(self, hidden: Float[Tensor, "1 n v"], sizes: Sequence[tuple[int, int]]) -> Float[Tensor, "m d"]:
        """What the language model reads of images of (height, width) pixels, one behind the other."""
        return self.model.model.multi_modal_projector(hidden).squeeze(0)

    def hand_over(
        self, features: Iterable[Float[Tensor, "k d"]], deepstack: Sequence[Iterable[Float[Tensor, "k d"]]] = ()
    ) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=list(features))  # type: ignore[arg-type]

    def _merge(self, values: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """A signal of patches, `n ...` an image, as that of tokens."""
        grids = [(height // self.patch, width // self.patch) for height, width in sizes]
        return [merge_cells(each.unsqueeze(0), grid, self.cell)[0] for each, grid in zip(values, grids, strict=True)]

    def _sizes(self, images: Mapping[str, Any]) -> list[tuple[int, int]]:
        """(height, width) in pixels of each image, without what pads it to the largest of the batch."""
        pixels, given = images["pixel_values"], images.get("image_sizes")
        if pixels.ndim != 4 or (given is not None and len(given) != len(pixels)):
            raise InvalidInputError(
                f"{type(self.model).__name__} takes pixel_values as images x channels x rows x columns with one of "
                f"image_sizes for each, got shape {tuple(pixels.shape)} and "
                f"{'none' if given is None else len(given)}; make both with the model's processor"
            )
        height, width = pixels.shape[-2:]
        if given is None:
            return [(height, width)] * len(pixels)
        unit = self.patch * self.cell
        sizes = [(int(h), int(w)) for h, w in torch.as_tensor(given).tolist()]
        wrong = next((each for each in sizes if not (unit <= each[0] <= height and unit <= each[1] <= width)), None)
        if wrong is not None:
            raise InvalidInputError(
                f"image_sizes has an image of {wrong[0]} x {wrong[1]} pixels, but a token shows {unit} x {unit} and "
                f"pixel_values hold {height} x {width}; make both in one call of the model's processor"
            )
        return sizes
