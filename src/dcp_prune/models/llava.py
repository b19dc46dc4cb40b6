"""LLaVA-1.5: a CLIP tower with [CLS], a per-token projector, one run of placeholders per image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dcp_prune.errors import UnsupportedModelError
from dcp_prune.functional.attention import cls_attention_row, folded_cls_attention_row
from dcp_prune.models.base import EncodedImages, ModelAdapter, Reduction
from dcp_prune.tokens import EncoderTokens, Signal, VisualTokens, compose_assignments


class LlavaAdapter(ModelAdapter):
    """Walks the CLIP tower layer by layer instead of hooking into it.

    The same modules run in the same order as in the model's own `get_image_features`, so features are bit-equal, but
    nothing is installed on the model, threads share no state, gradient checkpointing and compiled layers keep
    working, and the layers behind the feature layer, whose output the model throws away, are not computed.
    """

    architecture = "LlavaForConditionalGeneration"
    prunes_in_encoder = True
    signals = frozenset(
        {Signal.ENCODER_FEATURES, Signal.CLS_ATTENTION, Signal.KEYS, Signal.VALUES, Signal.CLS_VALUE_AFFINITY}
    )
    absent: ClassVar[Mapping[Signal, str]] = {
        Signal.CLIP_SIMILARITY: "it takes CLIP's text tower and projections, which LLaVA checkpoints do not hold"
    }
    image_inputs = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model = model
        self.tower = model.model.vision_tower
        layer = config.vision_feature_layer
        if not isinstance(layer, int):
            raise UnsupportedModelError(
                f"vision_feature_layer is the list {list(layer)}, and layers before and after a reduction differ in "
                "length; set model.config.vision_feature_layer to one layer"
            )
        if config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} passes on [CLS] like "
                "a patch; set model.config.vision_feature_select_strategy to 'default'"
            )
        embeddings = getattr(self.tower, "embeddings", None)
        if not hasattr(embeddings, "class_embedding") or not hasattr(self.tower, "pre_layrnorm"):
            raise UnsupportedModelError(
                f"the vision tower {type(self.tower).__name__} is no CLIP encoder with a [CLS] token, "
                "the only kind of LLaVA tower that can be pruned so far"
            )
        # hidden_states[0] is what enters layer 0, so hidden_states[i] is what leaves layer i - 1.
        depth = len(self.tower.encoder.layers)
        self._num_layers = layer if layer >= 0 else depth + 1 + layer
        if not 1 <= self._num_layers <= depth:
            raise UnsupportedModelError(
                f"vision_feature_layer {layer} is the output of no layer of an encoder of {depth} layers"
            )

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def num_layers(self) -> int:
        return self._num_layers

    def grid(self, pixel_values: Float[Tensor, "i c y x"] | None = None) -> tuple[int, int]:
        config = self.tower.config
        height, width = (config.image_size,) * 2 if pixel_values is None else pixel_values.shape[-2:]
        return height // config.patch_size, width // config.patch_size

    def encode(
        self,
        pixel_values: Float[Tensor, "i c y x"],
        stages: Sequence[Reduction] = (),
        signals: AbstractSet[Signal] = frozenset(),
        lap: Callable[[str], None] = lambda name: None,
    ) -> EncodedImages:
        plan = {stage.layer: stage for stage in self.check_stages(stages)}
        weight = self.tower.embeddings.patch_embedding.weight
        pixels = pixel_values if weight.is_meta else pixel_values.to(weight.device)  # meta: offloaded, and loads itself
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(pixels))
        rows, cols = self.grid(pixel_values)
        blank = VisualTokens.from_features(hidden[:, 1:], grid=(rows, cols))
        positions, indices, assignment = blank.positions, blank.indices, blank.assignment
        mask = attention_mask = None  # of padding, where a stage keeps different numbers of tokens of different images
        state: Mapping[str, Tensor] = {}
        captured: dict[str, Any] = {}
        stats: list[Mapping[str, Tensor]] = []
        widths: list[int] = []
        for number in range(self.num_layers):
            layer = self.tower.encoder.layers[number]
            stage = plan.get(number)
            wanted = signals if stage is None else stage.requires
            if stage is not None or number == self.num_layers - 1:
                lap("encode")
                captured = _capture(layer, hidden, wanted, mask)
                lap("select")
            hidden = layer(hidden, attention_mask=attention_mask)
            if stage is not None:
                lap("encode")
                # Layers may live on several devices.
                positions, indices, assignment = (each.to(hidden.device) for each in (positions, indices, assignment))
                mask = None if mask is None else mask.to(hidden.device)
                state = {name: value.to(hidden.device) for name, value in state.items()}
                done = stage.reduce(
                    EncoderTokens(hidden[:, 1:], positions, indices, mask=mask, state=state, **captured)
                )
                hidden = torch.cat((hidden[:, :1], done.features.to(hidden.dtype)), dim=1)
                positions = positions.gather(1, done.kept.unsqueeze(-1).expand(-1, -1, 2))
                indices = indices.gather(1, done.kept)
                assignment = compose_assignments(assignment, done.assignment)
                mask, state = done.mask, done.state
                attention_mask = None if mask is None else self._attention_mask(hidden, mask)
                stats.append(done.stats)
                widths.append(indices.shape[1])
                lap("select")
        features = self.model.model.multi_modal_projector(hidden[:, 1:])
        device = features.device
        mask = None if mask is None else mask.to(device)
        positions, indices = positions.to(device), indices.to(device)
        captured = {name: value.to(device) for name, value in captured.items()}
        tokens = VisualTokens(
            features=features,
            mask=torch.ones_like(indices, dtype=torch.bool) if mask is None else mask,
            positions=positions,
            indices=indices,
            num_original=rows * cols,
            assignment=assignment.to(device),
            encoder=EncoderTokens(hidden[:, 1:].to(device), positions, indices, mask=mask, **captured)
            if signals
            else None,
        )
        return EncodedImages(tokens, tuple(plan.values()), tuple(stats), tuple(widths))

    def _attention_mask(self, hidden: Float[Tensor, "b m v"], mask: Bool[Tensor, "b n"]) -> Any:
        """What keeps the tower's layers from attending to padding, in the form of its attention implementation."""
        with_cls = functional.pad(mask, (1, 0), value=True)
        found = create_bidirectional_mask(config=self.tower.config, inputs_embeds=hidden, attention_mask=with_cls)
        if found is None and not with_cls.all():
            raise UnsupportedModelError(
                f"the attention implementation {self.tower.config._attn_implementation!r} takes no padding mask, which "
                "images that keep different numbers of tokens need; encode them one by one, or use 'sdpa'"
            )
        return found

    def hand_over(self, features: Float[Tensor, "i k d"]) -> dict[str, Any]:
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(features))}}  # type: ignore[arg-type]


@torch.no_grad()
def _capture(
    layer: Any, hidden: Float[Tensor, "b m v"], wanted: AbstractSet[Signal], mask: Bool[Tensor, "b n"] | None
) -> dict[str, Tensor]:
    """Signals of one layer from its own q, k and v, without [CLS] as a token, and without any attention map."""
    if not wanted - {Signal.ENCODER_FEATURES}:
        return {}
    attention, states = layer.self_attn, layer.layer_norm1(hidden)
    shape = (attention.num_heads, -1)
    captured: dict[str, Tensor] = {}
    keys = None
    if Signal.KEYS in wanted or not _is_plain(attention.k_proj):
        keys = attention.k_proj(states).unflatten(-1, shape)
    if Signal.KEYS in wanted and keys is not None:
        captured["keys"] = keys[:, 1:].mean(dim=2)
    if Signal.CLS_ATTENTION in wanted:
        query = attention.q_proj(states[:, 0]).unflatten(-1, shape)
        captured["cls_attention"] = (
            folded_cls_attention_row(states, query, attention.k_proj.weight, scale=attention.scale, mask=mask)
            if keys is None
            else cls_attention_row(query, keys, scale=attention.scale, mask=mask)
        )
    if wanted & {Signal.VALUES, Signal.CLS_VALUE_AFFINITY}:
        captured |= _capture_values(attention.v_proj, states, shape, wanted, mask)
    return captured


def _capture_values(
    v_proj: Any,
    states: Float[Tensor, "b m v"],
    shape: tuple[int, int],
    wanted: AbstractSet[Signal],
    mask: Bool[Tensor, "b n"] | None,
) -> dict[str, Tensor]:
    """Values averaged over heads, and their affinity to that of [CLS]; where the weight can be read, both are computed
    without the values of all heads, which would be as large as the features."""
    captured: dict[str, Tensor] = {}
    values = None if _is_plain(v_proj) else v_proj(states).unflatten(-1, shape)
    own = v_proj(states[:, 0]).unflatten(-1, shape) if values is None else values[:, 0]
    if Signal.VALUES in wanted:
        if values is None:
            weight, bias = v_proj.weight.float(), v_proj.bias
            bias = None if bias is None else bias.float().unflatten(0, shape).mean(dim=0)
            captured["values"] = functional.linear(states[:, 1:].float(), weight.unflatten(0, shape).mean(dim=0), bias)
        else:
            captured["values"] = values[:, 1:].float().mean(dim=2)
    if Signal.CLS_VALUE_AFFINITY in wanted:
        # The attention row of the value of [CLS] to all values, unscaled.
        captured["cls_value_affinity"] = (
            folded_cls_attention_row(states, own, v_proj.weight, scale=1.0, mask=mask)
            if values is None
            else cls_attention_row(own, values, scale=1.0, mask=mask)
        )
    return captured


def _is_plain(linear: nn.Module) -> bool:
    """Whether the weight can be read: not quantised, adapted by LoRA, or kept elsewhere."""
    return type(linear) is nn.Linear and linear.weight.is_floating_point() and not linear.weight.is_meta
