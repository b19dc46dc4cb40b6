"""The LLaVA-1.5 adapter: what it encodes, what it captures, where its stages act."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from dcp_prune.errors import InvalidInputError, UnsupportedModelError
from dcp_prune.models import ModelAdapter, get_adapter
from dcp_prune.tokens import EncoderReduction, EncoderTokens, Signal

SIGNALS = frozenset({Signal.CLS_ATTENTION, Signal.KEYS, Signal.ENCODER_FEATURES})
VALUE_SIGNALS = frozenset({Signal.VALUES, Signal.CLS_VALUE_AFFINITY})


@dataclass(frozen=True)
class KeepMostAttended:
    """A stage that records what it saw."""

    layer: int
    num_tokens: int
    requires: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION, Signal.KEYS})
    seen: ClassVar[list[EncoderTokens]] = []

    def reduce(self, tokens: EncoderTokens) -> EncoderReduction:
        self.seen.append(tokens)
        assert tokens.cls_attention is not None
        kept = tokens.cls_attention.topk(self.num_tokens).indices.sort(dim=1).values
        slots = torch.arange(self.num_tokens).expand_as(kept)
        assignment = torch.full(tokens.indices.shape, -1).scatter(1, kept, slots)
        features = tokens.features.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.features.shape[-1]))
        return EncoderReduction(features, kept, assignment, {"number": torch.tensor(float(self.layer))})


@dataclass(frozen=True)
class KeepUneven:
    """A stage that keeps fewer tokens of one image than of another, and counts the stages before it."""

    layer: int
    fewer: int
    more: int
    num_tokens: int | None = None
    requires: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION}) | VALUE_SIGNALS
    seen: ClassVar[list[EncoderTokens]] = []

    def reduce(self, tokens: EncoderTokens) -> EncoderReduction:
        self.seen.append(tokens)
        assert tokens.cls_attention is not None
        b, n = tokens.indices.shape
        # A property of the image alone decides, as it must: where its most attended token lies.
        most = tokens.indices.gather(1, tokens.cls_attention.argmax(dim=1, keepdim=True))
        counts = torch.where(most % 2 == 0, self.fewer, self.more)
        kept, rank = tokens.cls_attention.argsort(dim=1, descending=True)[:, : int(counts.max())].sort(dim=1)
        real = rank < counts
        slots = torch.arange(kept.shape[1]).expand_as(kept).masked_fill(~real, -1)
        return EncoderReduction(
            tokens.features.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.features.shape[-1])),
            kept,
            torch.full((b, n), -1).scatter(1, kept, slots),
            mask=None if real.all() else real,
            state={"stages": tokens.state.get("stages", torch.zeros(())) + 1},
        )


@pytest.fixture
def pixels(make_inputs: Callable[..., dict[str, Any]]) -> Tensor:
    return make_inputs("<image> <image> what")["pixel_values"]


@pytest.fixture
def adapter(pristine_model: Any) -> ModelAdapter:
    KeepMostAttended.seen.clear()
    KeepUneven.seen.clear()
    return get_adapter(pristine_model)


def attention_by_the_model(model: Any, pixels: Tensor) -> tuple[Tensor, ...]:
    """Attention maps of all layers, as eager attention computes them. `b h s s` each."""
    model.set_attn_implementation("eager")
    return model.model.vision_tower(pixels, output_attentions=True).attentions


@pytest.mark.parametrize("layer", [-2, -1, -3, 2, 4])
def test_features_without_stages_are_bit_equal_to_the_models_own(model: Any, pixels: Tensor, layer: int) -> None:
    model.config.vision_feature_layer = layer
    own = torch.stack(tuple(model.get_image_features(pixels).pooler_output))
    tokens = get_adapter(model).encode({"pixel_values": pixels}).tokens
    assert torch.equal(tokens.features, own)
    assert tokens.encoder is None
    assert tokens.num_original == 36
    assert torch.equal(tokens.positions[0, 7], torch.tensor([1.0, 1.0]))


def test_layers_behind_the_feature_layer_are_not_computed(model: Any, pixels: Tensor) -> None:
    calls: list[int] = []
    for number, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    get_adapter(model).encode({"pixel_values": pixels})
    assert calls == [0, 1, 2]
    calls.clear()
    model.get_image_features(pixels)
    assert calls == [0, 1, 2, 3], "the model itself does compute the last layer"


def test_cls_attention_is_that_of_the_feature_layer_as_eager_attention_has_it(model: Any, pixels: Tensor) -> None:
    encoder = get_adapter(model).encode({"pixel_values": pixels}, signals=SIGNALS).tokens.encoder
    maps = attention_by_the_model(model, pixels)
    assert encoder is not None
    assert encoder.cls_attention is not None
    torch.testing.assert_close(encoder.cls_attention, maps[2].mean(dim=1)[:, 0, 1:])
    assert not torch.allclose(encoder.cls_attention, maps[3].mean(dim=1)[:, 0, 1:], rtol=1e-3)


def test_keys_are_averaged_over_heads_and_leave_cls_out(model: Any, pixels: Tensor) -> None:
    caught: list[Tensor] = []
    model.model.vision_tower.encoder.layers[2].self_attn.k_proj.register_forward_hook(lambda *a: caught.append(a[2]))
    model.get_image_features(pixels)
    encoder = get_adapter(model).encode({"pixel_values": pixels}, signals=SIGNALS).tokens.encoder
    assert encoder is not None
    assert encoder.keys is not None
    torch.testing.assert_close(encoder.keys, caught[0].view(2, 37, 4, 16).mean(dim=2)[:, 1:])


def test_the_folded_row_equals_the_row_from_keys(model: Any, pixels: Tensor) -> None:
    class Quantised(nn.Linear):
        """Stands for a layer whose weight must not be read."""

    folded = get_adapter(model).encode({"pixel_values": pixels}, signals=SIGNALS - {Signal.KEYS}).tokens.encoder
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.k_proj.__class__ = Quantised
    called = get_adapter(model).encode({"pixel_values": pixels}, signals=SIGNALS - {Signal.KEYS}).tokens.encoder
    assert folded is not None
    assert called is not None
    torch.testing.assert_close(folded.cls_attention, called.cls_attention)


def test_values_are_averaged_over_heads_and_compared_with_that_of_cls(model: Any, pixels: Tensor) -> None:
    caught: list[Tensor] = []
    model.model.vision_tower.encoder.layers[2].self_attn.v_proj.register_forward_hook(lambda *a: caught.append(a[2]))
    model.get_image_features(pixels)
    values = caught[0].view(2, 37, 4, 16)
    encoder = get_adapter(model).encode({"pixel_values": pixels}, signals=VALUE_SIGNALS).tokens.encoder
    assert encoder is not None
    assert encoder.values is not None
    assert encoder.cls_value_affinity is not None
    torch.testing.assert_close(encoder.values, values.mean(dim=2)[:, 1:])
    products = torch.einsum("bhc,bshc->bhs", values[:, 0], values)
    torch.testing.assert_close(encoder.cls_value_affinity, products.softmax(dim=2).mean(dim=1)[:, 1:])


def test_values_of_a_layer_whose_weight_cannot_be_read_are_the_same(model: Any, pixels: Tensor) -> None:
    class Quantised(nn.Linear):
        """Stands for a layer whose weight must not be read."""

    folded = get_adapter(model).encode({"pixel_values": pixels}, signals=VALUE_SIGNALS).tokens.encoder
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.v_proj.__class__ = Quantised
    called = get_adapter(model).encode({"pixel_values": pixels}, signals=VALUE_SIGNALS).tokens.encoder
    assert folded is not None
    assert called is not None
    torch.testing.assert_close(folded.values, called.values)
    torch.testing.assert_close(folded.cls_value_affinity, called.cls_value_affinity)


def test_nothing_is_captured_that_nobody_asked_for(model: Any, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcp_prune.models.tower.folded_cls_attention_row", lambda *a, **k: pytest.fail("captured"))
    get_adapter(model).encode({"pixel_values": pixels}, signals=frozenset({Signal.ENCODER_FEATURES}))


def test_a_stage_sees_its_own_layers_output_and_attention(model: Any, adapter: ModelAdapter, pixels: Tensor) -> None:
    adapter.encode({"pixel_values": pixels}, [KeepMostAttended(1, 12)])
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    maps = attention_by_the_model(model, pixels)
    (seen,) = KeepMostAttended.seen
    torch.testing.assert_close(seen.features, hidden[2][:, 1:])
    assert seen.cls_attention is not None
    torch.testing.assert_close(seen.cls_attention, maps[1].mean(dim=1)[:, 0, 1:])


def test_layers_behind_a_stage_read_cls_and_the_survivors_only(model: Any, pixels: Tensor) -> None:
    lengths: list[int] = []
    for layer in model.model.vision_tower.encoder.layers:
        layer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    tokens = (
        get_adapter(model).encode({"pixel_values": pixels}, [KeepMostAttended(1, 5), KeepMostAttended(0, 20)]).tokens
    )
    assert lengths == [37, 21, 6]
    assert tokens.features.shape == (2, 5, 48)


def test_a_stage_that_drops_nothing_changes_no_bit(adapter: ModelAdapter, pixels: Tensor) -> None:
    plain = adapter.encode({"pixel_values": pixels}).tokens
    staged = adapter.encode({"pixel_values": pixels}, [KeepMostAttended(1, 36)]).tokens
    assert torch.equal(plain.features, staged.features)


def test_indices_positions_and_assignment_follow_the_survivors_through_two_stages(
    adapter: ModelAdapter, pixels: Tensor
) -> None:
    encoded = adapter.encode({"pixel_values": pixels}, [KeepMostAttended(0, 20), KeepMostAttended(1, 5)], SIGNALS)
    tokens = encoded.tokens
    first, second = KeepMostAttended.seen
    assert torch.equal(first.indices, torch.arange(36).expand(2, 36))
    for row in range(2):
        assert set(tokens.indices[row].tolist()) < set(second.indices[row].tolist())
        assert torch.equal(tokens.positions[row], first.positions[row][tokens.indices[row]])
        assert torch.equal(tokens.assignment[row][tokens.indices[row]], torch.arange(5))
        assert int((tokens.assignment[row] >= 0).sum()) == 5
    assert [stats["number"].item() for stats in encoded.stage_stats] == [0.0, 1.0]


@pytest.mark.parametrize("layer", [2, 3, 7, -1])
def test_a_stage_at_or_past_the_feature_layer_is_refused(adapter: ModelAdapter, pixels: Tensor, layer: int) -> None:
    with pytest.raises(InvalidInputError, match=f"layer {layer} is at or past the feature layer 2.* layers 0 to 1"):
        adapter.encode({"pixel_values": pixels}, [KeepMostAttended(layer, 8)])


def test_two_stages_at_one_layer_are_refused(adapter: ModelAdapter, pixels: Tensor) -> None:
    with pytest.raises(InvalidInputError, match=r"share a layer in \[1, 1\]"):
        adapter.encode({"pixel_values": pixels}, [KeepMostAttended(1, 8), KeepMostAttended(1, 6)])


def test_selecting_images_equals_encoding_them_alone(adapter: ModelAdapter, pixels: Tensor) -> None:
    both = adapter.encode({"pixel_values": pixels}, [KeepMostAttended(1, 8)], SIGNALS).select([1, 1, 0]).tokens
    alone = adapter.encode({"pixel_values": pixels[1:]}, [KeepMostAttended(1, 8)], SIGNALS).tokens
    assert both.features.shape[0] == 3
    torch.testing.assert_close(both.features[:1], alone.features)
    assert both.encoder is not None
    assert alone.encoder is not None
    torch.testing.assert_close(both.encoder.cls_attention[1:2], alone.encoder.cls_attention)  # type: ignore[index]
    assert torch.equal(both.indices[:1], alone.indices)


UNEVEN = [KeepUneven(0, 20, 30), KeepUneven(1, 6, 9)]


@pytest.fixture
def uneven_pixels(make_inputs: Callable[..., dict[str, Any]]) -> Tensor:
    return make_inputs("<image> <image> <image> <image> what")["pixel_values"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_images_that_keep_different_numbers_equal_images_alone(
    model: Any, uneven_pixels: Tensor, implementation: str
) -> None:
    model.set_attn_implementation(implementation)
    adapter = get_adapter(model)
    together = adapter.encode({"pixel_values": uneven_pixels}, UNEVEN, SIGNALS).tokens
    assert not together.mask.all(), "this test needs images that differ"
    assert together.encoder is not None
    for row in range(4):
        alone = adapter.encode({"pixel_values": uneven_pixels[row : row + 1]}, UNEVEN, SIGNALS).tokens
        real = together.mask[row]
        assert alone.mask.all(), "one image has no padding"
        assert torch.equal(together.indices[row][real], alone.indices[0])
        torch.testing.assert_close(together.features[row][real], alone.features[0], rtol=1e-4, atol=1e-4)
        assert alone.encoder is not None
        for name in ("cls_attention", "keys"):
            ours, theirs = getattr(together.encoder, name)[row][real], getattr(alone.encoder, name)[0]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        slots = together.assignment[row][together.indices[row][real]]
        assert torch.equal(slots, real.nonzero().flatten())
        assert int((together.assignment[row] >= 0).sum()) == int(real.sum())


def test_a_stage_sees_the_state_of_the_one_before_and_padding_without_attention(
    adapter: ModelAdapter, uneven_pixels: Tensor
) -> None:
    encoded = adapter.encode({"pixel_values": uneven_pixels}, UNEVEN)
    first, second = KeepUneven.seen
    assert dict(first.state) == {}
    assert second.state["stages"].item() == 1
    assert first.mask is None
    assert second.mask is not None
    assert second.cls_attention is not None
    assert second.cls_value_affinity is not None
    assert not second.cls_attention[~second.mask].any()
    assert not second.cls_value_affinity[~second.mask].any()
    assert encoded.stage_tokens == (30, encoded.tokens.features.shape[1])


def test_stages_that_keep_a_fixed_number_never_see_a_mask(model: Any, pixels: Tensor) -> None:
    masks: list[Any] = []
    tower: Any = model.model.vision_tower
    for layer in tower.encoder.layers:
        layer.register_forward_pre_hook(lambda _, __, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    encoded = get_adapter(model).encode({"pixel_values": pixels}, [KeepMostAttended(0, 20), KeepMostAttended(1, 5)])
    assert masks == [None] * 3
    assert encoded.stage_tokens == (20, 5)


def test_an_attention_without_padding_masks_is_refused_where_images_differ(
    model: Any, uneven_pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcp_prune.models.tower.create_bidirectional_mask", lambda **_: None)
    adapter = get_adapter(model)
    with pytest.raises(UnsupportedModelError, match=r"'sdpa' takes no padding mask.* encode them one by one"):
        adapter.encode({"pixel_values": uneven_pixels}, UNEVEN)
    adapter.encode({"pixel_values": uneven_pixels[:1]}, UNEVEN)
