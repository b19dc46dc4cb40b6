"""InternVL: runs of placeholders tell images apart, tiles of an unknown grid, [CLS] beside normed keys, frames."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from families import PATCH, InternVL, OddOnesPruner, expand_placeholders, make_picture, make_spot, share_of_spot
from transformers import DynamicCache

from dcp_prune.errors import InvalidInputError, UnsupportedModelError
from dcp_prune.integrations.transformers import encode_images, prune, prune_inputs
from dcp_prune.models import get_adapter
from dcp_prune.registry import make_pruner
from dcp_prune.tokens import Signal
from tiny_llava import IMAGE_ID

PROMPT = "USER: <image> what is this ASSISTANT:"
TWO = "USER: <image> where <image> is the cat"
CELL = 2
SIZES = ((90, 90), (60, 130), (150, 50))
"""(height, width) of pictures of one tile, and of two and three with a thumbnail."""


class PlainInternVL(InternVL):
    """As in the small models: layer norms, queries and keys as they are."""

    name = "internvl_plain"
    normed = False


@pytest.fixture(params=[InternVL(), PlainInternVL()], ids=lambda family: family.name, scope="module")
def family(request: pytest.FixtureRequest) -> InternVL:
    return request.param


def pictures(*which: int) -> list[Any]:
    return [make_picture(number, SIZES[number]) for number in which]


def test_tiles_belong_to_the_image_in_whose_run_of_placeholders_they_stand(family: InternVL) -> None:
    inputs = family.make_inputs([PROMPT, TWO], pictures(0, 1, 2))
    assert len(inputs["pixel_values"]) == 1 + 3 + 4
    layouts = get_adapter(family.model).layouts(inputs)
    assert [layout.num_tiles for layout in layouts] == [1, 3, 4]
    assert [layout.grid for layout in layouts] == [(4, 4)] * 3
    record = prune_inputs(family.model, inputs, make_pruner("dcp", num_tokens=5)).record
    assert record is not None
    assert record.tokens_per_image == [(16, 5), (48, 5), (64, 5)]
    record = prune_inputs(family.model, inputs, make_pruner("dcp", num_tokens=2, scope="tile")).record
    assert record is not None
    assert record.tokens_per_image == [(16, 2), (48, 6), (64, 8)]


def test_without_a_prompt_every_tile_is_an_image(family: InternVL) -> None:
    inputs = family.make_inputs([PROMPT], pictures(1))
    pruner = make_pruner("dcp", num_tokens=5)
    tiles = encode_images(family.model, inputs["pixel_values"], pruner)
    assert tiles.tokens.features.shape[:2] == (3, 16)
    short = prune_inputs(family.model, inputs, pruner, encoded=tiles)
    assert short.record is not None
    assert short.record.tokens_per_image == [(16, 5)] * 3
    whole = encode_images(family.model, inputs["pixel_values"], pruner, input_ids=inputs["input_ids"])
    assert whole.tokens.features.shape[:2] == (1, 48)


def test_frames_of_a_video_are_images(family: InternVL) -> None:
    frames = family.make_inputs([" ".join(["<image>"] * 3)], [make_picture(seed, (90, 90)) for seed in range(3)])
    spans = [family.span(1)] * 3
    ids = expand_placeholders(["USER: this <image> the <image> a <image> what is this"], spans)
    short = prune_inputs(family.model, ids | {"pixel_values": frames["pixel_values"]}, make_pruner("dcp", num_tokens=4))
    assert short.record is not None
    assert short.record.tokens_per_image == [(16, 4)] * 3
    kept = expand_placeholders(
        ["USER: this <image> the <image> a <image> what is this"],
        [[family.begin_id, *[IMAGE_ID] * 4, family.end_id]] * 3,
    )
    assert torch.equal(short.tensors["input_ids"], kept["input_ids"]), "the words that name the frames stay"


@pytest.mark.parametrize("again", [False, True], ids=["new pixels", "all pixels"])
def test_new_images_of_a_second_turn_are_counted_from_the_end(family: InternVL, again: bool) -> None:
    model = copy.deepcopy(family.model)
    first, later = family.make_inputs([PROMPT], pictures(1)), family.make_inputs(["<image> where"], pictures(2))
    cache = DynamicCache()
    with prune(model, make_pruner("uniform", num_tokens=6)) as handle:
        answer = model.generate(**first, max_new_tokens=3, past_key_values=cache)
        ids = torch.cat((answer, later["input_ids"]), dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        both = torch.cat((first["pixel_values"], later["pixel_values"]))
        pixels = both if again else later["pixel_values"]
        continued = model.generate(**turn, pixel_values=pixels, max_new_tokens=3, past_key_values=cache)
        assert handle.last is not None
        assert handle.last.tokens_per_image == [(64, 6)], "only the new image, with all of its tiles"
        scratch = model.generate(**turn, pixel_values=both, max_new_tokens=3)
    assert torch.equal(continued, scratch)


@pytest.mark.parametrize("corner", [(0.0, 0.0), (0.5, 0.25), (0.5, 0.5)])
def test_kept_tokens_map_back_to_the_pixels_of_the_tile_that_differ(
    family: InternVL, corner: tuple[float, float]
) -> None:
    blind = copy.deepcopy(family.model)
    for layer in blind.model.vision_tower.encoder.layer:
        layer.attention.projection_layer.weight.data.zero_()
        layer.attention.projection_layer.bias.data.zero_()
    blind.model.vision_tower.embeddings.position_embeddings.data.zero_()
    inputs = family.make_inputs([TWO], pictures(1, 2))
    blank, spot = (
        family.make_inputs([PROMPT], [make_spot((112, 112), corner, extent)])["pixel_values"][0] for extent in (0, 0.5)
    )
    inputs["pixel_values"][3:] = blank
    inputs["pixel_values"][5] = spot  # the third of four tiles of the second image
    layout = get_adapter(blind).layouts(inputs)[1]
    share = share_of_spot(layout.boxes[32:48], corner, 0.5)
    record = prune_inputs(blind, inputs, OddOnesPruner(num_tokens=int((share > 0.5).sum()))).record
    assert record is not None
    kept = record.indices[1]
    assert record.tiles(1).tolist() == [2] * len(kept)
    assert torch.equal(record.boxes(1), layout.boxes[kept])
    assert (share_of_spot(record.boxes(1), corner, 0.5) > 0.5).all(), "every kept token shows the spot"


def test_signals_are_means_over_cells_of_what_the_tower_itself_computes(family: InternVL) -> None:
    eager = copy.deepcopy(family.model)
    eager.set_attn_implementation("eager")
    inputs = family.make_inputs([PROMPT], pictures(1))
    adapter = get_adapter(eager)
    tiles = {"pixel_values": inputs["pixel_values"]}
    encoder = adapter.encode(tiles, (), adapter.signals).tokens.encoder
    assert encoder is not None
    with torch.no_grad():
        own = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    side = family.side // PATCH
    keys, values = [], []
    attention = eager.model.vision_tower.encoder.layer[-1].attention
    states = eager.model.vision_tower.encoder.layer[-1].layernorm_before(own.hidden_states[-2])
    keys = attention.k_norm(attention.k_proj(states)).unflatten(-1, (4, -1)).mean(dim=2)[:, 1:]
    values = attention.v_proj(states).unflatten(-1, (4, -1))
    affinity = torch.einsum("bhc,bshc->bhs", values[:, 0], values).softmax(dim=-1).mean(dim=1)[:, 1:]
    expected = {
        "cls_attention": own.attentions[-1][:, :, 0, 1:].mean(dim=1),
        "features": own.hidden_states[-1][:, 1:],
        "keys": keys,
        "values": values.mean(dim=2)[:, 1:],
        "cls_value_affinity": affinity,
    }
    for name, patches in expected.items():
        cells = patches.unflatten(1, (side, side)).unfold(1, CELL, CELL).unfold(2, CELL, CELL).mean(dim=(-1, -2))
        torch.testing.assert_close(getattr(encoder, name), cells.flatten(1, 2), rtol=1e-4, atol=1e-5)


def test_eager_and_sdpa_choose_the_same(family: InternVL) -> None:
    eager = copy.deepcopy(family.model)
    eager.set_attn_implementation("eager")
    inputs = family.make_inputs([PROMPT, TWO], pictures(0, 1, 2))
    for name in ("dcp", "visionzip", "cls_attention"):
        kept = [prune_inputs(model, inputs, make_pruner(name, num_tokens=5)).record for model in (family.model, eager)]
        assert kept[0] is not None
        assert kept[1] is not None
        assert torch.equal(kept[0].indices, kept[1].indices)


@pytest.mark.parametrize("layer", [-2, 3, 4])
@pytest.mark.parametrize("mean", [True, False], ids=["mean pooling", "last norm"])
def test_features_of_another_layer_are_the_models_own(family: InternVL, layer: int, mean: bool) -> None:
    model = copy.deepcopy(family.model)
    if not mean:
        model.model.vision_tower.layernorm = torch.nn.LayerNorm(64)
    inputs = family.make_inputs([PROMPT], pictures(0))
    for number in (layer, -1):
        model.config.vision_feature_layer = number
        with torch.no_grad():
            own = model.get_image_features(inputs["pixel_values"]).pooler_output
            found = get_adapter(model).encode(inputs).tokens.features
        assert torch.equal(own, found)


def test_a_strategy_that_keeps_cls_is_refused(family: InternVL) -> None:
    model = copy.deepcopy(family.model)
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedModelError, match=re.escape("passes on [CLS], which is part of no cell")):
        get_adapter(model)


def test_tiles_that_are_not_square_are_refused(family: InternVL) -> None:
    inputs = family.make_inputs([PROMPT], pictures(0))
    for shape in ((1, 3, 112, 56), (1, 3, 98, 98), (1, 1, 3, 112, 112)):
        with pytest.raises(InvalidInputError, match=re.escape(f"multiple of 2 patches, got shape {shape}")):
            prune_inputs(family.model, inputs | {"pixel_values": torch.zeros(shape)}, make_pruner("dcp", num_tokens=5))


def test_placeholders_that_are_no_whole_tiles_or_not_those_of_the_pixels_are_refused(family: InternVL) -> None:
    inputs = family.make_inputs([TWO], pictures(1, 2))
    pruner = make_pruner("dcp", num_tokens=5)
    with pytest.raises(InvalidInputError, match=r"holds \[48, 64\] image placeholders in a row, but .+ hold 8 tiles"):
        prune_inputs(
            family.model,
            inputs | {"pixel_values": torch.cat((inputs["pixel_values"], inputs["pixel_values"][:1]))},
            pruner,
        )
    with pytest.raises(InvalidInputError, match="hold 6 tiles of 16 visual tokens each"):
        prune_inputs(family.model, inputs | {"pixel_values": inputs["pixel_values"][1:]}, pruner)
    cut = {name: inputs[name][:, :-22] for name in ("input_ids", "attention_mask")}
    with pytest.raises(InvalidInputError, match=r"holds \[48, 46\] image placeholders in a row"):
        prune_inputs(family.model, inputs | cut, pruner)
    words = expand_placeholders(["what is this"], [])
    with pytest.raises(InvalidInputError, match="holds no image placeholder"):
        prune_inputs(family.model, words | {"pixel_values": inputs["pixel_values"]}, pruner)


def test_of_several_conversations_at_once_the_pixels_of_all_images_are_needed(family: InternVL) -> None:
    inputs = family.make_inputs([PROMPT, PROMPT], pictures(1, 2))
    later = inputs | {"pixel_values": inputs["pixel_values"][3:]}
    with pytest.raises(InvalidInputError, match="for several conversations at once pass the pixels of all"):
        prune_inputs(family.model, later, make_pruner("dcp", num_tokens=5))


def test_one_token_for_an_image_of_several_tiles_is_enough(family: InternVL) -> None:
    inputs = family.make_inputs([TWO], pictures(1, 2))
    for name in ("dcp", "random", "holov"):
        short = prune_inputs(family.model, inputs, make_pruner(name, num_tokens=1))
        assert short.record is not None
        assert [after for _, after in short.record.tokens_per_image] == [1, 1]
        with torch.no_grad():
            assert family.model(**short.inputs).logits.isfinite().all()


def test_every_signal_can_be_asked_for(family: InternVL) -> None:
    assert get_adapter(family.model).signals == set(Signal) - {Signal.TEXT, Signal.CLIP_SIMILARITY}
