"""Vision towers of the Qwen-VL kind, which read the patches of all images as one sequence and merge cells of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import (
    get_vision_attention_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from dcp_prune.models.tower import packed_signals
from dcp_prune.tokens import Signal


@dataclass(frozen=True)
class PackedWalk:
    """What a packed tower made of images; u units, which are the tokens behind the projector, in raster order.

    Attributes:
        features: behind the projector. `u d`.
        deepstack: behind the projectors of earlier layers. `u d` each.
        signals: fields of `EncoderTokens` by name, pooled over the patches of a unit. `u ...`.
    """

    features: Float[Tensor, "u d"]
    deepstack: tuple[Float[Tensor, "u d"], ...]
    signals: Mapping[str, Tensor]


@dataclass(frozen=True)
class PackedTower:
    """The same modules in the same order as in the tower's own `forward`, so features are bit-equal; see `Tower`.

    Attributes:
        module: with `patch_embed`, `rotary_pos_emb`, `blocks` (each with `norm1` and `attn.qkv`) and `merger`; windows,
            a table of positions and DeepStack where it has them.
    """

    module: Any

    @property
    def num_layers(self) -> int:
        return len(self.module.blocks)

    @property
    def cell(self) -> int:
        """Patches that a token behind the projector is made of."""
        return self.module.spatial_merge_size**2

    def walk(
        self,
        pixel_values: Float[Tensor, "p c"],
        grids: Int[Tensor, "i 3"],
        signals: AbstractSet[Signal],
        lap: Callable[[str], None],
    ) -> PackedWalk:
        """Encodes images or videos of any sizes.

        Args:
            pixel_values: patches of all images, cell by cell.
            grids: frames, rows and columns of patches of each image.
            signals: what to capture at the last layer.
            lap: as for `ModelAdapter.encode`.
        """
        tower, cell = self.module, self.cell
        weight = tower.patch_embed.proj.weight
        pixels = pixel_values.type(tower.dtype)
        pixels = pixels if weight.is_meta else pixels.to(weight.device)  # meta: offloaded, and loads itself
        grids = grids.to(pixels.device)
        hidden = tower.patch_embed(pixels)
        if hasattr(tower, "pos_embed"):
            hidden = hidden + self._positions(grids).to(hidden.dtype)
        rotary = tower.rotary_pos_emb(hidden, get_vision_position_ids(grids, tower.spatial_merge_size))
        frames, _ = get_vision_attention_seqlens(grids, tower.config)
        windows, order, full = frames, None, range(self.num_layers)
        if hasattr(tower, "fullatt_block_indexes"):
            full = tower.fullatt_block_indexes
            order, windows = get_vision_window_index(
                grids, tower.spatial_merge_size, tower.window_size, tower.patch_size
            )
            hidden, *rotary = (each.unflatten(0, (-1, cell))[order].flatten(0, 1) for each in (hidden, *rotary))
        deepstack: list[Tensor] = []
        captured: dict[str, Tensor] = {}
        for number, block in enumerate(tower.blocks):
            segments = frames if number in full else windows
            if number == self.num_layers - 1 and signals:
                lap("encode")
                captured = self._capture(block, hidden, tuple(rotary), segments, signals)
                lap("select")
            hidden = block(hidden, cu_seqlens=segments, position_embeddings=tuple(rotary))
            if number in getattr(tower, "deepstack_visual_indexes", ()):
                place = tower.deepstack_visual_indexes.index(number)
                deepstack.append(tower.deepstack_merger_list[place](hidden))
        if signals:
            captured["features"] = hidden.unflatten(0, (-1, cell)).mean(dim=1)
        features = tower.merger(hidden)
        if order is not None:
            raster = order.argsort()
            features = features[raster.to(features.device)]
            captured = {name: value[raster.to(value.device)] for name, value in captured.items()}
        return PackedWalk(features, tuple(deepstack), captured)

    def _positions(self, grids: Int[Tensor, "i 3"]) -> Float[Tensor, "p v"]:
        """The learned table of positions, resampled to each image."""
        tower = self.module
        taps, weights = get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.spatial_merge_size,
        )
        return (tower.pos_embed(taps) * weights[:, :, None]).sum(1)

    @torch.no_grad()
    def _capture(
        self,
        block: Any,
        hidden: Float[Tensor, "p v"],
        rotary: tuple[Tensor, ...],
        segments: Int[Tensor, " s"],
        wanted: AbstractSet[Signal],
    ) -> dict[str, Tensor]:
        """Signals of one layer from its own q, k and v, means over cells; attention stays within `segments`."""
        if not wanted - {Signal.ENCODER_FEATURES}:
            return {}
        attention = block.attn
        heads = attention.qkv(block.norm1(hidden)).unflatten(-1, (3, attention.num_heads, -1))
        queries, keys, values = heads.unbind(1)
        queries, keys = apply_rotary_pos_emb_vision(queries, keys, *(each.to(heads.device) for each in rotary))
        lengths = segments.diff().tolist()
        found = packed_signals(queries, keys, values, lengths, wanted, scale=attention.scaling)
        return {name: torch.cat(each).unflatten(0, (-1, self.cell)).mean(dim=1) for name, each in found.items()}
