"""Vision towers of the ViT kind, walked layer by layer: CLIP and DINOv2 with a [CLS] token, SigLIP without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import create_bidirectional_mask

from dcp_prune.errors import InvalidInputError, UnsupportedModelError
from dcp_prune.functional.attention import cls_attention_row, folded_cls_attention_row, received_attention
from dcp_prune.models.base import EncodedImages, Reduction
from dcp_prune.models.layout import ImageLayout, join_images
from dcp_prune.tokens import EncoderTokens, Signal, VisualTokens, compose_assignments


@dataclass(frozen=True)
class Walk:
    """What a tower made of a stack of tiles.

    Attributes:
        encoder: what leaves the feature layer, with the signals that were asked for.
        assignment: original patch -> slot that absorbed it, -1 if it was dropped. `t N`.
        stages, stage_stats, stage_tokens: as in `EncodedImages`.
        prefix: [CLS], and registers behind it, as they leave the feature layer; None where there are none. `t p v`.
        output: what the tower itself handed on, where hooks made it run as a whole. `t m v`.
    """

    encoder: EncoderTokens
    assignment: Int[Tensor, "t N"]
    stages: tuple[Reduction, ...]
    stage_stats: tuple[Mapping[str, Tensor], ...]
    stage_tokens: tuple[int, ...]
    prefix: Float[Tensor, "t p v"] | None = None
    output: Float[Tensor, "t m v"] | None = None

    def normed(self, norm: Callable[[Tensor], Tensor]) -> Float[Tensor, "t n v"]:
        """Features behind the norm with which the tower ends."""
        return norm(self.encoder.features) if self.output is None else self.output

    def merged(self, grid: tuple[int, int], size: int) -> Walk:
        """With cells of size x size patches in the place of patches, where the projector makes one token of each.

        Args:
            grid: (rows, cols) of patches of a tile, none of which were dropped.
        """
        return self.pooled(lambda patches: merge_cells(patches, grid, size), (grid[0] // size, grid[1] // size))

    def pooled(self, pool: Callable[[Float[Tensor, "t n v"]], Float[Tensor, "t m v"]], grid: tuple[int, int]) -> Walk:
        """With what `pool` makes of all patches of a tile, none of which were dropped.

        Args:
            pool: `t n v` -> `t m v`.
            grid: (rows, cols) of what it makes.
        """
        signals: dict[str, Any] = {
            name: pool(value) if value.ndim == 3 else pool(value.unsqueeze(2)).squeeze(2)
            for name in ("features", "cls_attention", "keys", "values", "cls_value_affinity")
            if (value := getattr(self.encoder, name)) is not None
        }
        cells = VisualTokens.from_features(signals["features"], grid=grid)
        encoder = EncoderTokens(**signals, positions=cells.positions, indices=cells.indices)
        return replace(self, encoder=encoder, assignment=cells.assignment)

    def encoded(
        self,
        features: Float[Tensor, "t n d"],
        layouts: Sequence[ImageLayout],
        with_encoder: bool,
        separators: Float[Tensor, "t s d"] | None = None,
    ) -> EncodedImages:
        """With what the projector made of the encoder's features, tiles joined to images.

        Args:
            features: of the patches. `t n d`.
            layouts: of the images.
            with_encoder: keep the encoder's features and signals.
            separators: features of the separators of each tile. `t s d`.
        """
        device = features.device
        inner: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self.encoder).items() if isinstance(value, Tensor)
        }
        indices, mask = inner["indices"], inner.get("mask")
        tokens = VisualTokens(
            features=features,
            mask=torch.ones_like(indices, dtype=torch.bool) if mask is None else mask,
            positions=inner["positions"],
            indices=indices,
            num_original=self.assignment.shape[1],
            assignment=self.assignment.to(device),
            encoder=EncoderTokens(**inner) if with_encoder else None,
        )
        joined = join_images(tokens, layouts)
        if separators is not None:
            rows = separators.split([layout.num_tiles for layout in layouts])
            separators = pad_sequence([row.flatten(0, 1) for row in rows], batch_first=True)
        return EncodedImages(
            joined, tuple(layouts), self.stages, self.stage_stats, self.stage_tokens, separators=separators
        )


@dataclass(frozen=True)
class Tower:
    """The same modules in the same order as in the tower's own `forward`, so features are bit-equal, but nothing is
    installed on the model, threads share no state, gradient checkpointing and compiled layers keep working, and layers
    behind the feature layer are not computed.

    Attributes:
        module: with `embeddings` and `encoder.layers`, each with `layer_norm1` and `self_attn`; where the parts have
            other names, a subclass tells them.
        num_layers: layers up to and including the feature layer.
        over_all_heads: makes a mean over the heads of this process one over all heads, where tensor parallelism spreads
            them over several; None where they are all here.
        by_name: whether the model hands pixels to the tower as `pixel_values=`.
    """

    module: Any
    num_layers: int
    over_all_heads: Callable[[Tensor], Tensor] | None = None
    by_name: bool = False

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: [CLS], and registers where the tower has them."""
        return int(hasattr(self.module.embeddings, "class_embedding"))

    @property
    def layers(self) -> Any:
        return self.module.encoder.layers

    @property
    def patch_weight(self) -> Tensor:
        """Of the module that the pixels meet first."""
        return self.module.embeddings.patch_embedding.weight

    def attention(self, layer: Any) -> tuple[Any, Any]:
        """The attention of a layer, with its projections, and the norm in front of it."""
        return layer.self_attn, layer.layer_norm1

    def run(self, layer: Any, hidden: Float[Tensor, "t m v"], attention_mask: Any) -> Float[Tensor, "t m v"]:
        return layer(hidden, attention_mask=attention_mask)

    def grid(self, pixel_values: Float[Tensor, "t c y x"] | None = None) -> tuple[int, int]:
        """(rows, cols) of patches of such tiles; without any, of those that the tower was built for."""
        config = self.module.config
        height, width = _pair(config.image_size) if pixel_values is None else pixel_values.shape[-2:]
        rows, cols = _pair(config.patch_size)
        return height // rows, width // cols

    def walk(
        self,
        pixel_values: Float[Tensor, "t c y x"],
        stages: Sequence[Reduction],
        signals: AbstractSet[Signal],
        lap: Callable[[str], None],
        real: Bool[Tensor, "t rows cols"] | None = None,
    ) -> Walk:
        """Encodes tiles with reductions between layers; see `ModelAdapter.encode`.

        Args:
            real: False marks patches that pad a tile, where the tower's embeddings and layers take such a mask.

        Raises:
            InvalidInputError: there are stages, and hooks that ask for the whole tower.
        """
        plan = {stage.layer: stage for stage in stages}
        prefix = self.num_prefix_tokens
        embeddings = self.module.embeddings
        weight = self.patch_weight
        pixels = pixel_values if weight.is_meta else pixel_values.to(weight.device)  # meta: offloaded, and loads itself
        if asks_for_whole({"the vision tower": self.module, "its encoder": self.module.encoder}, stages):
            return self._run_whole(pixels, signals, lap, real)
        hidden = embeddings(pixels) if real is None else embeddings(pixels, real.to(pixels.device))
        if hasattr(self.module, "pre_layrnorm"):
            hidden = self.module.pre_layrnorm(hidden)
        blank = VisualTokens.from_features(hidden[:, prefix:], grid=self.grid(pixel_values))
        positions, indices, assignment = blank.positions, blank.indices, blank.assignment
        mask = attention_mask = None  # of padding, also where a stage keeps different numbers of tokens of images
        if real is not None:
            mask = real.flatten(1).to(hidden.device)
            attention_mask = self._attention_mask(hidden, prefix, mask)
            mask = None if attention_mask is None else mask
        state: Mapping[str, Tensor] = {}
        captured: dict[str, Any] = {}
        stats: list[Mapping[str, Tensor]] = []
        widths: list[int] = []
        for number in range(self.num_layers):
            layer = self.layers[number]
            stage = plan.get(number)
            wanted = signals if stage is None else stage.requires
            if stage is not None or number == self.num_layers - 1:
                lap("encode")
                own = None if mask is None else mask.to(hidden.device)
                captured = _capture(*self.attention(layer), hidden, prefix, wanted, own)
                if self.over_all_heads is not None:
                    captured = {name: self.over_all_heads(mean) for name, mean in captured.items()}
                lap("select")
            hidden = self.run(layer, hidden, attention_mask)
            if stage is not None:
                lap("encode")
                # Layers may live on several devices.
                positions, indices, assignment = (each.to(hidden.device) for each in (positions, indices, assignment))
                mask = None if mask is None else mask.to(hidden.device)
                state = {name: value.to(hidden.device) for name, value in state.items()}
                done = stage.reduce(
                    EncoderTokens(hidden[:, prefix:], positions, indices, mask=mask, state=state, **captured)
                )
                hidden = torch.cat((hidden[:, :prefix], done.features.to(hidden.dtype)), dim=1)
                positions = positions.gather(1, done.kept.unsqueeze(-1).expand(-1, -1, 2))
                indices = indices.gather(1, done.kept)
                assignment = compose_assignments(assignment, done.assignment)
                mask, state = done.mask, done.state
                # A tile by itself is never padded.
                attention_mask = None
                if mask is not None and len(mask) > 1:
                    attention_mask = self._attention_mask(hidden, prefix, mask)
                stats.append(done.stats)
                widths.append(indices.shape[1])
                lap("select")
        encoder = EncoderTokens(hidden[:, prefix:], positions, indices, mask=mask, **captured)
        first = hidden[:, :prefix] if prefix else None
        return Walk(encoder, assignment, tuple(plan.values()), tuple(stats), tuple(widths), first)

    def _run_whole(
        self,
        pixels: Float[Tensor, "t c y x"],
        signals: AbstractSet[Signal],
        lap: Callable[[str], None],
        real: Bool[Tensor, "t rows cols"] | None,
    ) -> Walk:
        """`walk` by the tower's own `forward`, which calls every hook with what the model itself would give it."""
        prefix = self.num_prefix_tokens
        masks = {} if real is None else {"patch_attention_mask": real.to(pixels.device)}
        given, named = ((), {"pixel_values": pixels}) if self.by_name else ((pixels,), {})
        output = self.module(*given, **named, **masks, output_hidden_states=True, return_dict=True)
        before, hidden = output.hidden_states[self.num_layers - 1 : self.num_layers + 1]
        mask = None
        if real is not None:
            mask = real.flatten(1).to(hidden.device)
            mask = None if self._attention_mask(before, prefix, mask) is None else mask
        lap("encode")
        captured: dict[str, Any] = _capture(
            *self.attention(self.layers[self.num_layers - 1]), before, prefix, signals, mask
        )
        if self.over_all_heads is not None:
            captured = {name: self.over_all_heads(mean) for name, mean in captured.items()}
        lap("select")
        blank = VisualTokens.from_features(hidden[:, prefix:], grid=self.grid(pixels))
        encoder = EncoderTokens(hidden[:, prefix:], blank.positions, blank.indices, mask=mask, **captured)
        first, last = hidden[:, :prefix] if prefix else None, output.last_hidden_state[:, prefix:]
        return Walk(encoder, blank.assignment, (), (), (), first, last)

    def _attention_mask(self, hidden: Float[Tensor, "b m v"], prefix: int, mask: Bool[Tensor, "b n"]) -> Any:
        """What keeps the layers from attending to padding, in the form of their attention implementation."""
        config = self.module.config
        whole = functional.pad(mask, (prefix, 0), value=True)
        found = create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=whole)
        if found is None and not whole.all():
            raise UnsupportedModelError(
                f"the attention implementation {config._attn_implementation!r} takes no padding mask, which "
                "images that keep different numbers of tokens need; encode them one by one, or use 'sdpa'"
            )
        return found


def asks_for_whole(modules: Mapping[str, Any], stages: Sequence[Reduction] = ()) -> bool:
    """Whether somebody hung a hook on one of these, which a walk passes by; what transformers hangs there itself, to
    collect outputs, does not count.

    Raises:
        InvalidInputError: yes, and tokens are to be dropped inside.
    """

    def is_hooked(module: Any) -> bool:
        kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        hooks = [hook for kind in kinds for hook in getattr(module, kind, {}).values()]
        return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)

    hooked = [name for name, module in modules.items() if is_hooked(module)]
    if hooked and stages:
        raise InvalidInputError(
            f"there are hooks on {' and '.join(hooked)}, which run only where it runs as a whole, and this pruner "
            "drops tokens inside it; remove the hooks, or choose a pruner without stages in the encoder"
        )
    return bool(hooked)


@dataclass(frozen=True)
class Dinov2Attention:
    """The attention of a DINOv2 layer under the names that CLIP's has."""

    attention: Any

    def __getattr__(self, name: str) -> Any:
        names = {"num_heads": "num_attention_heads", "scale": "scaling"}
        return getattr(self.attention, names.get(name, name))


class Dinov2Tower(Tower):
    """DINOv2: [CLS], then registers where the tower has them, then patches."""

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + getattr(self.module.config, "num_register_tokens", 0)

    @property
    def layers(self) -> Any:
        return self.module.encoder.layer

    @property
    def patch_weight(self) -> Tensor:
        return self.module.embeddings.patch_embeddings.projection.weight

    def attention(self, layer: Any) -> tuple[Any, Any]:
        return Dinov2Attention(layer.attention), layer.norm1


def find_tower(module: Any, feature_layer: Any) -> Tower | None:
    """How to walk a vision tower of CLIP's, SigLIP's or DINOv2's kind; None for any other.

    Args:
        feature_layer: the config's `vision_feature_layer`.

    Raises:
        UnsupportedModelError: it is a list, or the output of no layer.
    """
    embeddings = getattr(module, "embeddings", None)
    # An engine may have left out the layers behind the feature layer.
    over_all_heads = getattr(module, "over_all_heads", None)
    has_cls = hasattr(embeddings, "class_embedding")
    if hasattr(embeddings, "cls_token") and hasattr(getattr(module, "encoder", None), "layer"):
        kind = Dinov2Tower
    elif hasattr(module, "pre_layrnorm") if has_cls else hasattr(embeddings, "patch_embedding"):
        kind = Tower
    else:
        return None
    return kind(module, feature_layers(feature_layer, module.config.num_hidden_layers), over_all_heads)


@torch.no_grad()
def _capture(
    attention: Any,
    norm: Any,
    hidden: Float[Tensor, "b m v"],
    prefix: int,
    wanted: AbstractSet[Signal],
    mask: Bool[Tensor, "b n"] | None,
) -> dict[str, Tensor]:
    """Signals of one layer from its own q, k and v, without [CLS] and registers, and without any attention map."""
    if not wanted - {Signal.ENCODER_FEATURES}:
        return {}
    states, shape = norm(hidden), (attention.num_heads, -1)
    row: dict[str, Any] = {"num_prefix_tokens": prefix, "mask": mask}
    q_norm, k_norm = (getattr(attention, name, nn.Identity()) for name in ("q_norm", "k_norm"))
    captured: dict[str, Tensor] = {}
    keys = None
    plain = _is_plain(attention.k_proj) and isinstance(k_norm, nn.Identity)
    if Signal.KEYS in wanted or not plain or not prefix:
        keys = k_norm(attention.k_proj(states)).unflatten(-1, shape)
    if Signal.KEYS in wanted and keys is not None:
        captured["keys"] = keys[:, prefix:].mean(dim=2)
    if Signal.CLS_ATTENTION in wanted and keys is not None and not prefix:
        queries = q_norm(attention.q_proj(states)).unflatten(-1, shape)
        captured["cls_attention"] = received_attention(queries, keys, scale=attention.scale, mask=mask)
    elif Signal.CLS_ATTENTION in wanted:
        query = q_norm(attention.q_proj(states[:, 0])).unflatten(-1, shape)
        captured["cls_attention"] = (
            folded_cls_attention_row(states, query, attention.k_proj.weight, scale=attention.scale, **row)
            if keys is None
            else cls_attention_row(query, keys, scale=attention.scale, **row)
        )
    if wanted & {Signal.VALUES, Signal.CLS_VALUE_AFFINITY}:
        captured |= _capture_values(attention.v_proj, states, prefix, shape, wanted, mask)
    return captured


def _capture_values(
    v_proj: Any,
    states: Float[Tensor, "b m v"],
    prefix: int,
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
            captured["values"] = functional.linear(
                states[:, prefix:].float(), weight.unflatten(0, shape).mean(dim=0), bias
            )
        else:
            captured["values"] = values[:, prefix:].float().mean(dim=2)
    if Signal.CLS_VALUE_AFFINITY in wanted:
        # The attention row of the value of [CLS] to all values, unscaled.
        captured["cls_value_affinity"] = (
            folded_cls_attention_row(states, own, v_proj.weight, scale=1.0, num_prefix_tokens=prefix, mask=mask)
            if values is None
            else cls_attention_row(own, values, scale=1.0, num_prefix_tokens=prefix, mask=mask)
        )
    return captured


def feature_layers(layer: Any, depth: int) -> int:
    """Layers up to and including the one whose output becomes the features.

    Args:
        layer: the config's `vision_feature_layer`.
        depth: layers of the encoder.

    Raises:
        UnsupportedModelError: it is a list, or the output of no layer.
    """
    if not isinstance(layer, int):
        raise UnsupportedModelError(
            f"vision_feature_layer is the list {list(layer)}, and layers before and after a reduction differ in "
            "length; set model.config.vision_feature_layer to one layer"
        )
    # hidden_states[0] is what enters layer 0, so hidden_states[i] is what leaves layer i - 1.
    num_layers = layer if layer >= 0 else depth + 1 + layer
    if not 1 <= num_layers <= depth:
        raise UnsupportedModelError(
            f"vision_feature_layer {layer} is the output of no layer of an encoder of {depth} layers"
        )
    return num_layers


@torch.no_grad()
def packed_signals(
    queries: Float[Tensor, "n h c"],
    keys: Float[Tensor, "n h c"],
    values: Float[Tensor, "n h c"],
    lengths: Sequence[int],
    wanted: AbstractSet[Signal],
    *,
    scale: float,
) -> dict[str, list[Tensor]]:
    """Signals of images that a tower without [CLS] sees as one sequence: fields of `EncoderTokens`, image by image.

    Args:
        queries, keys, values: of one layer, norms and rotary embedding applied.
        lengths: patches of each image, which attend to each other only.
        wanted: what to capture; [CLS] attention is then the attention that a patch receives.
        scale: of the logits.
    """
    found: dict[str, list[Tensor]] = {}
    if Signal.CLS_ATTENTION in wanted:
        pairs = zip(queries.split(lengths), keys.split(lengths), strict=True)  # type: ignore[arg-type]
        found["cls_attention"] = [
            received_attention(query.unsqueeze(0), key.unsqueeze(0), scale=scale)[0] for query, key in pairs
        ]
    for signal, name, heads in ((Signal.KEYS, "keys", keys), (Signal.VALUES, "values", values)):
        if signal in wanted:
            found[name] = list(heads.float().mean(dim=1).split(lengths))  # type: ignore[arg-type]
    return found


def merge_cells(patches: Float[Tensor, "t n *v"], grid: tuple[int, int], size: int) -> Float[Tensor, "t m *v"]:
    """Means over cells of size x size patches, in raster order, where a projector makes one token of each; patches that
    fill no cell, at the right and lower edge, are left out."""
    if size == 1:
        return patches
    rows, cols = grid[0] // size, grid[1] // size
    raster = patches.unflatten(1, grid)[:, : rows * size, : cols * size]
    return raster.unflatten(2, (cols, size)).unflatten(1, (rows, size)).mean(dim=(2, 4)).flatten(1, 2)


def _pair(size: Any) -> tuple[int, int]:
    """(height, width) of what configs give as one number or as two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _is_plain(linear: nn.Module) -> bool:
    """Whether the weight can be read: not quantised, adapted by LoRA, or kept elsewhere."""
    return type(linear) is nn.Linear and linear.weight.is_floating_point() and not linear.weight.is_meta
