"""vLLM's vision towers under the names by which `models.tower` walks those of transformers."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dcp_prune.errors import UnsupportedModelError


@dataclass(frozen=True)
class AttentionView:
    """One layer's attention: queries, keys and values of the heads of this rank, out of their joint projection."""

    attention: Any

    @property
    def num_heads(self) -> int:
        return self.attention.num_heads_per_partition

    @property
    def scale(self) -> float:
        return self.attention.scale

    @property
    def q_proj(self) -> Callable[[Tensor], Tensor]:
        return self._part(0)

    @property
    def k_proj(self) -> Callable[[Tensor], Tensor]:
        return self._part(1)

    @property
    def v_proj(self) -> Callable[[Tensor], Tensor]:
        return self._part(2)

    def _part(self, part: int) -> Callable[[Tensor], Tensor]:
        """A plain linear layer on the same storage, so that a mean over heads need not compute all of them; where the
        weight is quantised or packed, all three projections and a third of what they give."""
        joint = self.attention.qkv_proj
        weight = getattr(joint, "weight", None)
        width = self.num_heads * self.attention.head_dim
        if weight is None or weight.shape != (3 * width, self.attention.embed_dim) or not weight.is_floating_point():
            return lambda states: joint(states)[0].chunk(3, dim=-1)[part]
        rows = slice(part * width, (part + 1) * width)
        linear = nn.Linear(self.attention.embed_dim, width, bias=joint.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight[rows], requires_grad=False)
        if joint.bias is not None:
            linear.bias = nn.Parameter(joint.bias[rows], requires_grad=False)
        return linear


@dataclass(frozen=True)
class LayerView:
    """One encoder layer."""

    layer: Any

    @property
    def layer_norm1(self) -> Any:
        return self.layer.layer_norm1

    @property
    def self_attn(self) -> AttentionView:
        return AttentionView(self.layer.self_attn)

    def __call__(self, hidden: Float[Tensor, "b m v"], attention_mask: None = None) -> Float[Tensor, "b m v"]:
        return self.layer(hidden)


class TowerView:
    """A CLIP tower of vLLM, which holds no layer behind the feature layer."""

    def __init__(self, tower: Any) -> None:
        self.config = tower.config
        self.embeddings = tower.embeddings
        if hasattr(tower, "pre_layrnorm"):
            self.pre_layrnorm = tower.pre_layrnorm
        self.encoder = SimpleNamespace(layers=[LayerView(layer) for layer in tower.encoder.layers])
        self._tp_size = tower.encoder.layers[0].self_attn.tp_size

    @property
    def over_all_heads(self) -> Callable[[Tensor], Tensor] | None:
        return over_all_heads(self._tp_size)


def over_all_heads(tp_size: int) -> Callable[[Tensor], Tensor] | None:
    """Makes a mean over this rank's heads one over the heads of all ranks; None where this rank has them all."""
    if tp_size == 1:
        return None
    from vllm.distributed import tensor_model_parallel_all_reduce

    return lambda mean: tensor_model_parallel_all_reduce(mean.contiguous()) / tp_size


def view_tower(model: Any) -> Any:
    """The view of a model's CLIP tower.

    Raises:
        UnsupportedModelError: the tower is of another kind.
    """
    tower = getattr(model.vision_tower, "vision_model", None)
    if tower is None:
        raise UnsupportedModelError(
            f"the vision tower {type(model.vision_tower).__name__} is not a CLIP encoder with a [CLS] token, the only "
            f"kind of tower of {', '.join(model.config.architectures)} that can be pruned so far"
        )
    return TowerView(tower)


def stack_pixels(pixels: Any) -> Float[Tensor, "i c y x"]:
    """The pixels of all images as one tensor; vLLM hands a list where prompts came apart."""
    return torch.stack(list(pixels)) if isinstance(pixels, list | tuple) else pixels
