"""vLLM's packed vision towers under the names by which `models.packed` walks those of transformers."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dcp_prune.integrations.vllm.tower import over_all_heads


class PackedTowerView:
    """A `Qwen2_5_VisionTransformer` of vLLM."""

    def __init__(self, tower: Any, config: Any) -> None:
        """Args:
        tower: of vLLM.
        config: the model's `vision_config`.
        """
        self.tower, self.config = tower, config
        self.spatial_merge_size = tower.spatial_merge_size
        self.window_size, self.patch_size = tower.window_size, tower.patch_size
        self.fullatt_block_indexes = tower.fullatt_block_indexes
        self.patch_embed = PatchEmbedView(tower)
        # All layers of a kind attend within the same segments, and laying these out for the attention reads them on the
        # host; the key is the tensor itself, as tensors hash by identity.
        lay_out = lru_cache(maxsize=2)(lambda segments: _lay_out(tower, segments))
        self.blocks = [BlockView(block, lay_out) for block in tower.blocks]

    @property
    def dtype(self) -> torch.dtype:
        return self.tower.dtype

    @property
    def over_all_heads(self) -> Callable[[Tensor], Tensor] | None:
        return over_all_heads(self.tower.tp_size)

    def rotary_pos_emb(self, hidden: Float[Tensor, "p v"], positions: Int[Tensor, "p 2"]) -> tuple[Tensor, Tensor]:
        """Cosines and sines, `p h` each, of the two halves that are turned together."""
        table = self.tower.rotary_pos_emb
        cos, sin = (
            part[positions.to(part.device)].flatten(1).to(hidden.device)
            for part in table.get_cos_sin(len(table.cos_sin_cache))
        )
        return torch.cat((cos, cos), dim=1), torch.cat((sin, sin), dim=1)

    def merger(self, hidden: Float[Tensor, "p v"]) -> Float[Tensor, "u d"]:
        if hidden.dtype == torch.float16:
            from vllm.model_executor.models.utils import cast_overflow_tensors

            hidden = cast_overflow_tensors(hidden)
        return self.tower.merger(hidden)


class PatchEmbedView:
    """What pixels meet first, which may have been left to be normalised on the device."""

    def __init__(self, tower: Any) -> None:
        self.tower, self.proj = tower, tower.patch_embed.proj

    def __call__(self, pixels: Float[Tensor, "p c"]) -> Float[Tensor, "p v"]:
        return self.tower.patch_embed(self.tower.input_norm(pixels, self.tower.dtype))


class BlockView:
    """One encoder layer; its attention gives queries, keys and values of the heads of this rank."""

    def __init__(self, block: Any, lay_out: Callable[[Int[Tensor, " s"]], dict[str, Any]]) -> None:
        self.block, self.lay_out, self.norm1 = block, lay_out, block.norm1
        attention = block.attn
        self.attn = SimpleNamespace(
            qkv=lambda states: attention.qkv(states)[0],
            num_heads=attention.num_attention_heads_per_partition,
            scaling=attention.attn.scale,
        )

    def __call__(
        self, hidden: Float[Tensor, "p v"], cu_seqlens: Int[Tensor, " s"], position_embeddings: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "p v"]:
        cos, sin = (each.chunk(2, dim=1)[0].contiguous() for each in position_embeddings)
        laid = self.lay_out(cu_seqlens)
        return self.block(hidden.unsqueeze(1), rotary_pos_emb_cos=cos, rotary_pos_emb_sin=sin, **laid).squeeze(1)


def _lay_out(tower: Any, segments: Int[Tensor, " s"]) -> dict[str, Any]:
    """Where each segment begins and the last one ends, as this attention backend wants it."""
    from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

    backend, device, bounds = tower.attn_backend, tower.device, segments.cpu().numpy()
    return {
        "cu_seqlens": MMEncoderAttention.maybe_recompute_cu_seqlens(
            backend,
            bounds,
            tower.hidden_size,
            tower.tp_size,
            device,
            fp8_padded_hidden_size=tower.fp8_padded_hidden_size,
        ),
        "max_seqlen": torch.tensor(MMEncoderAttention.compute_max_seqlen(backend, bounds), dtype=torch.int32),
        "sequence_lengths": MMEncoderAttention.maybe_compute_seq_lens(backend, bounds, device),
    }
