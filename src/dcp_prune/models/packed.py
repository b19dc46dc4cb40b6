"""Vision towers of the Qwen-VL kind, which read the patches of all images as one sequence and merge cells of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import (
    get_vision_attention_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from dcp_prune.models.base import Reduction
from dcp_prune.models.tower import Walk, asks_for_whole, packed_signals
from dcp_prune.tokens import EncoderTokens, Signal, compose_assignments


@dataclass(frozen=True)
class PackedWalk:
    """What a packed tower made of images; a unit is a cell of patches, which is a token behind the projector.

    Attributes:
        features: behind the projector, of the u units that are left, frame by frame in raster order. `u d`.
        deepstack: behind the projectors of earlier layers, zero for units that were gone by then. `U d` each.
        signals: fields of `EncoderTokens` by name, means over the patches of a unit. `u ...`.
        reduced: the same with a row per frame, where stages dropped units.
    """

    features: Float[Tensor, "u d"]
    deepstack: tuple[Float[Tensor, "U d"], ...]
    signals: Mapping[str, Tensor]
    reduced: Walk | None


@dataclass
class _Pack:
    """The sequence in a walk, which works window by window where the tower has windows.

    Attributes:
        hidden: patches, unit by unit. `(u c) v`.
        rotary: cosines and sines of their positions. `(u c) h` each.
        order: which of the U units of all frames each one is. `u`.
        frames, windows: where each frame and each window begins, and the last one ends, in patches.
        homes: window of each of the U units, ascending from frame to frame.
    """

    hidden: Tensor
    rotary: tuple[Tensor, ...]
    order: Int[Tensor, " u"]
    frames: Int[Tensor, " f"]
    windows: Int[Tensor, " w"]
    homes: Int[Tensor, " U"] | None

    def by_frame(self, value: Float[Tensor, "(u c) v"], num_frames: int) -> Float[Tensor, "f n cv"]:
        """Units of frames of equal length in raster order, their patches one behind the other."""
        rows = value.view(num_frames, len(self.order) // num_frames, -1)
        rank = self.order.to(value.device).view(num_frames, -1).argsort(dim=1)
        return rows.gather(1, rank.unsqueeze(-1).expand_as(rows))

    def keep(
        self, units: Float[Tensor, "f m cv"], kept: Int[Tensor, "f m"], indices: Int[Tensor, "f m"], size: int
    ) -> None:
        """Goes on with some units.

        Args:
            units: what they hold now.
            kept: their places in what `by_frame` gives.
            indices: their places among the `size` units of the frame.
        """
        f, m = kept.shape
        cell = len(self.hidden) // len(self.order)
        order = indices + torch.arange(f, device=indices.device).unsqueeze(1) * size
        rank = torch.arange(m, device=indices.device).expand(f, m)
        if self.homes is not None:
            homes = self.homes.to(order.device)
            rank = homes[order].argsort(dim=1, stable=True)
            lengths = homes[order].flatten().bincount() * cell
            self.windows = functional.pad(lengths[lengths > 0].cumsum(0, dtype=torch.int32), (1, 0))

        def lay(value: Float[Tensor, "f m cv"]) -> Float[Tensor, "(f m c) v"]:
            return value.gather(1, rank.unsqueeze(-1).expand_as(value)).view(f * m * cell, -1)

        wide = (self.by_frame(each.to(units.device), f) for each in self.rotary)
        self.rotary = tuple(lay(each.gather(1, kept.unsqueeze(-1).expand(-1, -1, each.shape[2]))) for each in wide)
        self.hidden = lay(units)
        self.order = order.gather(1, rank).flatten()
        self.frames = torch.arange(f + 1, device=indices.device, dtype=torch.int32) * (m * cell)
        self.windows = self.frames if self.homes is None else self.windows


@dataclass(frozen=True)
class PackedTower:
    """The same modules in the same order as in the tower's own `forward`, so features are bit-equal; see `Tower`.

    Attributes:
        module: with `patch_embed`, `rotary_pos_emb`, `blocks` (each with `norm1` and `attn.qkv`) and `merger`; windows,
            a table of positions and DeepStack where it has them.
        over_all_heads: as for `Tower`.
    """

    module: Any
    over_all_heads: Callable[[Tensor], Tensor] | None = None

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
        stages: Sequence[Reduction],
        signals: AbstractSet[Signal],
        lap: Callable[[str], None],
        positions: Float[Tensor, "f n 2"] | None = None,
    ) -> PackedWalk:
        """Encodes images or videos of any sizes; with stages, of frames of n units each.

        Args:
            pixel_values: patches of all images, cell by cell.
            grids: frames, rows and columns of patches of each image.
            stages: reductions of each frame by itself. To them a unit is a token, whose features are those of its
                patches one behind the other.
            signals: what to capture at the last layer.
            lap: as for `ModelAdapter.encode`.
            positions: (row, col) of each unit in its frame, for stages.
        """
        tower, plan = self.module, {stage.layer: stage for stage in stages}
        if asks_for_whole({"the vision tower": tower}, stages):
            return self._run_whole(pixel_values, grids, signals, lap)
        pack = self._embed(pixel_values, grids)
        total = len(pack.order)
        captured: dict[str, Tensor] = {}
        deepstack: list[Tensor] = []
        reduced = None if positions is None else _Reduced(positions.to(pack.hidden.device))
        for number, block in enumerate(tower.blocks):
            stage = plan.get(number)
            segments = pack.windows if number not in self._full else pack.frames
            if stage is not None or number == self.num_layers - 1:
                lap("encode")
                captured = self._capture(block, pack, segments, signals if stage is None else stage.requires)
                lap("select")
            pack.hidden = block(pack.hidden, cu_seqlens=segments, position_embeddings=pack.rotary)
            if number in getattr(tower, "deepstack_visual_indexes", ()):
                merger = tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(number)]
                merged = merger(pack.hidden)
                deepstack.append(
                    merged.new_zeros(total, merged.shape[1]).index_copy(0, pack.order.to(merged.device), merged)
                )
            if stage is not None and reduced is not None:
                lap("encode")
                reduced.apply(stage, pack, captured)
                lap("select")
        if signals:
            captured["features"] = pack.hidden.unflatten(0, (-1, self.cell)).mean(dim=1)
        features = tower.merger(pack.hidden)
        rank = pack.order.argsort()
        features, *values = (each[rank.to(each.device)] for each in (features, *captured.values()))
        captured = dict(zip(captured, values, strict=True))
        walk = None if reduced is None else reduced.walk(captured, features, tuple(stages))
        return PackedWalk(features, tuple(deepstack), captured, walk)

    def _run_whole(
        self,
        pixel_values: Float[Tensor, "p c"],
        grids: Int[Tensor, "i 3"],
        signals: AbstractSet[Signal],
        lap: Callable[[str], None],
    ) -> PackedWalk:
        """`walk` by the tower's own `forward`, which calls every hook with what the model itself would give it."""
        tower, last = self.module, self.num_layers - 1
        weight = tower.patch_embed.proj.weight
        pixels = pixel_values.type(tower.dtype)
        pixels = pixels if weight.is_meta else pixels.to(weight.device)
        grids = grids.to(pixels.device)
        output = tower(pixels, grid_thw=grids, output_hidden_states=True, return_dict=True)
        lap("encode")
        pack = self._pack(output.hidden_states[last], grids, in_windows=True)
        segments = pack.windows if last not in self._full else pack.frames
        captured = self._capture(tower.blocks[last], pack, segments, signals)
        if signals:
            captured["features"] = output.last_hidden_state.unflatten(0, (-1, self.cell)).mean(dim=1)
        rank = pack.order.argsort()
        captured = {name: value[rank.to(value.device)] for name, value in captured.items()}
        lap("select")
        return PackedWalk(
            output.pooler_output, tuple(getattr(output, "deepstack_features", None) or ()), captured, None
        )

    @property
    def _full(self) -> Sequence[int]:
        """Layers that attend to whole frames."""
        return getattr(self.module, "fullatt_block_indexes", range(self.num_layers))

    def _embed(self, pixel_values: Float[Tensor, "p c"], grids: Int[Tensor, "i 3"]) -> _Pack:
        tower = self.module
        weight = tower.patch_embed.proj.weight
        pixels = pixel_values.type(tower.dtype)
        pixels = pixels if weight.is_meta else pixels.to(weight.device)  # meta: offloaded, and loads itself
        grids = grids.to(pixels.device)
        hidden = tower.patch_embed(pixels)
        if hasattr(tower, "pos_embed"):
            taps, weights = get_vision_interpolation_indices_and_weights(
                grids,
                num_grid_per_side=tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                spatial_merge_size=tower.spatial_merge_size,
            )
            hidden = hidden + (tower.pos_embed(taps) * weights[:, :, None]).sum(1).to(hidden.dtype)
        return self._pack(hidden, grids)

    def _pack(self, hidden: Float[Tensor, "p v"], grids: Int[Tensor, "i 3"], in_windows: bool = False) -> _Pack:
        """The sequence of embedded patches, cell by cell, or already window by window."""
        tower = self.module
        rotary = tower.rotary_pos_emb(hidden, get_vision_position_ids(grids, tower.spatial_merge_size))
        frames, _ = get_vision_attention_seqlens(grids, tower.config)
        if not hasattr(tower, "fullatt_block_indexes"):
            order = torch.arange(len(hidden) // self.cell, device=hidden.device)
            return _Pack(hidden, tuple(rotary), order, frames, frames, None)
        order, windows = get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
        before, *rotary = (each.unflatten(0, (-1, self.cell))[order].flatten(0, 1) for each in (hidden, *rotary))
        hidden = hidden if in_windows else before
        order = order.to(hidden.device)
        lengths = windows.diff().long().to(hidden.device) // self.cell
        homes = torch.arange(len(lengths), device=hidden.device).repeat_interleave(lengths)[order.argsort()]
        return _Pack(hidden, tuple(rotary), order, frames, windows, homes)

    @torch.no_grad()
    def _capture(
        self, block: Any, pack: _Pack, segments: Int[Tensor, " s"], wanted: AbstractSet[Signal]
    ) -> dict[str, Tensor]:
        """Signals of one layer from its own q, k and v, means over units; attention stays within `segments`."""
        if not wanted - {Signal.ENCODER_FEATURES}:
            return {}
        attention = block.attn
        heads = attention.qkv(block.norm1(pack.hidden)).unflatten(-1, (3, attention.num_heads, -1))
        queries, keys, values = heads.unbind(1)
        queries, keys = apply_rotary_pos_emb_vision(queries, keys, *(each.to(heads.device) for each in pack.rotary))
        lengths = segments.diff().tolist()
        found = packed_signals(queries, keys, values, lengths, wanted, scale=attention.scaling)
        over_all_heads = self.over_all_heads or (lambda mean: mean)
        joined = {name: torch.cat(each).unflatten(0, (-1, self.cell)).mean(dim=1) for name, each in found.items()}
        return {name: over_all_heads(mean) for name, mean in joined.items()}


class _Reduced:
    """What stages have done to f frames of n units so far."""

    def __init__(self, positions: Float[Tensor, "f n 2"]) -> None:
        self.positions = positions
        self.indices = torch.arange(positions.shape[1], device=positions.device).expand(positions.shape[:2])
        self.assignment = self.indices
        self.state: Mapping[str, Tensor] = {}
        self.stats: list[Mapping[str, Tensor]] = []
        self.widths: list[int] = []

    def apply(self, stage: Reduction, pack: _Pack, captured: Mapping[str, Tensor]) -> None:
        """Lets a stage choose and `pack` go on with the rest."""
        f, size = self.assignment.shape
        self.to(pack.hidden.device)
        signals: dict[str, Any] = {
            name: rows.squeeze(-1) if value.ndim == 1 else rows
            for name, value in captured.items()
            for rows in [pack.by_frame(value, f)]
        }
        units = pack.by_frame(pack.hidden, f)
        done = stage.reduce(EncoderTokens(units, self.positions, self.indices, state=self.state, **signals))
        self.positions = self.positions.gather(1, done.kept.unsqueeze(-1).expand(-1, -1, 2))
        self.indices = self.indices.gather(1, done.kept)
        self.assignment = compose_assignments(self.assignment, done.assignment)
        self.state = done.state
        self.stats.append(done.stats)
        self.widths.append(done.kept.shape[1])
        pack.keep(done.features.to(pack.hidden.dtype), done.kept, self.indices, size)

    def to(self, device: torch.device) -> None:
        """Layers may live on several devices."""
        self.positions, self.indices, self.assignment = (
            each.to(device) for each in (self.positions, self.indices, self.assignment)
        )
        self.state = {name: value.to(device) for name, value in self.state.items()}

    def walk(
        self, signals: Mapping[str, Tensor], features: Float[Tensor, "u d"], stages: tuple[Reduction, ...]
    ) -> Walk:
        f, m = self.indices.shape
        found: dict[str, Any] = {name: value.unflatten(0, (f, m)) for name, value in signals.items()}
        found.setdefault("features", features.unflatten(0, (f, m)))
        encoder = EncoderTokens(**found, positions=self.positions, indices=self.indices)
        return Walk(encoder, self.assignment, stages, tuple(self.stats), tuple(self.widths))
