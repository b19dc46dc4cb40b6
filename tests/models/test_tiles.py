"""Images of several tiles: which pixels the kept tokens show, budgets around the number of tiles, bad sizes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, Family, LlavaNext, LlavaOnevision, OddOnesPruner, make_picture
from PIL import Image

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import encode_images, prune, prune_inputs
from dcp_prune.models import get_adapter
from dcp_prune.registry import make_pruner

TILED = [f for f in FAMILIES if isinstance(f, LlavaNext | LlavaOnevision) and f.modality == "image"]
PLAIN = [family for family in TILED if family.staged]
SCALED = [family for family in TILED if not family.staged]
PROMPT = "USER: <image> what is this ASSISTANT:"


@pytest.fixture(params=PLAIN, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def blinded(family: Family) -> Any:
    """Whose tokens know the pixels of their own patch and nothing else."""
    model = copy.deepcopy(family.model)
    tower = model.model.vision_tower
    tower.embeddings.position_embedding.weight.data.zero_()
    for layer in tower.encoder.layers:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            linear.weight.data.zero_()
            linear.bias.data.zero_()
    return model


@pytest.mark.parametrize("tiled", TILED, ids=lambda family: family.name)
@pytest.mark.parametrize("size", [(112, 112), (60, 120), (120, 50), (100, 90)])
@pytest.mark.parametrize("spot", [(0.0, 0.0), (0.5, 0.1), (0.55, 0.55)])
def test_kept_tokens_map_back_to_the_pixels_that_differ(
    tiled: Family, size: tuple[int, int], spot: tuple[float, float]
) -> None:
    blind_model = blinded(tiled)
    height, width = size
    pixels = np.full((height, width, 3), 40, dtype=np.uint8)
    top, left = spot[0] * height, spot[1] * width
    bottom, right = top + 0.45 * height, left + 0.45 * width
    pixels[int(top) : int(bottom), int(left) : int(right)] = (250, 30, 90)
    inputs = tiled.make_inputs([PROMPT], [Image.fromarray(pixels)])
    (layout,) = get_adapter(blind_model).layouts(inputs)

    boxes = layout.boxes * torch.tensor([height, width, height, width])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    inside = torch.minimum(boxes[:, 2], torch.tensor(bottom)) - torch.maximum(boxes[:, 0], torch.tensor(top))
    across = torch.minimum(boxes[:, 3], torch.tensor(right)) - torch.maximum(boxes[:, 1], torch.tensor(left))
    share = inside.clamp(min=0) * across.clamp(min=0) / areas.clamp(min=1e-6)
    within = (share > 0.5) & (layout.source >= 0)

    record = prune_inputs(blind_model, inputs, OddOnesPruner(num_tokens=int(within.sum()))).record
    assert record is not None
    kept = record.indices[0]
    assert torch.equal(record.boxes(0), layout.boxes[kept])
    assert (share[kept] > 0.2).all(), "every kept token shows the spot"
    assert torch.isin(kept, within.nonzero()).float().mean() > 0.8
    tiles = layout.source[kept] // layout.tile_size
    assert tiles.min() == 0, "the overview shows it"
    assert tiles.max() > 0, "tiles of the grid show it too"


def test_positions_of_the_overview_lie_where_the_fine_patches_show_the_same(family: Family) -> None:
    inputs = family.make_inputs([PROMPT], [make_picture(0, (112, 112))])
    tokens = encode_images(
        family.model, inputs["pixel_values"], make_pruner("random", num_tokens=4), image_sizes=inputs["image_sizes"]
    ).tokens
    assert tokens.tiles is not None
    overview, fine = (tokens.positions[0][part] for part in (tokens.tiles[0] == 0, tokens.tiles[0] > 0))
    assert torch.equal(overview[0], fine[[0, 1, 8, 9]].mean(dim=0))
    torch.testing.assert_close(overview.mean(dim=0), fine.mean(dim=0))


def test_a_budget_below_the_number_of_tiles_is_kept(family: Family) -> None:
    inputs = family.make_inputs([PROMPT], [make_picture(0, (112, 112))])
    record = prune_inputs(family.model, inputs, make_pruner("dcp_progressive", num_tokens=2)).record
    assert record is not None
    assert record.layouts[0].num_tiles == 5
    assert record.tokens_per_image[0][1] == 2


def test_one_token_less_than_all_drops_the_separators_too(family: Family) -> None:
    inputs = family.make_inputs([PROMPT], [make_picture(0, (112, 112))])
    record = prune_inputs(family.model, inputs, make_pruner("random", num_tokens=79)).record
    assert record is not None
    assert record.tokens_per_image == [(80 + 8, 79)]


def test_an_image_that_fits_the_budget_keeps_its_separators_beside_one_that_does_not(family: Family) -> None:
    pruner = make_pruner("dcp", num_tokens=60)
    images = [make_picture(0, (56, 112)), make_picture(1, (112, 112))]
    batch = prune_inputs(family.model, family.make_inputs([PROMPT, PROMPT], images), pruner)
    assert batch.record is not None
    assert batch.record.tokens_per_image == [(48 + 4, 52), (88, 60)]
    with torch.no_grad():
        together = family.model(**batch.inputs).logits[:, -1]
        alone = family.model(**family.make_inputs([PROMPT], images[:1])).logits[:, -1]
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
    own = family.own_features(family.make_inputs([PROMPT], images[:1]))[0]
    assert batch.features is not None
    torch.testing.assert_close(batch.features[0, :52], own, rtol=1e-5, atol=1e-4)


def test_padding_of_the_picture_is_never_kept_even_where_stages_saw_it(family: Family) -> None:
    inputs = family.make_inputs([PROMPT], [make_picture(0, (112, 60))])
    record = prune_inputs(family.model, inputs, make_pruner("dcp_progressive", num_tokens=14)).record
    assert record is not None
    kept = record.indices[0][record.indices[0] >= 0]
    assert (record.layouts[0].source[kept] >= 0).all()
    assert torch.equal(record.assignment[0][kept], torch.arange(len(kept)))


def test_one_encoder_pass_serves_images_in_any_order(family: Family) -> None:
    pruner = make_pruner("dcp_progressive", num_tokens=6)
    images = [make_picture(0, (90, 90)), make_picture(1, (60, 120))]
    inputs = family.make_inputs(["<image> what"] * 2, images)
    encoded = encode_images(family.model, inputs["pixel_values"], pruner, image_sizes=inputs["image_sizes"])
    assert encoded.stage_stats[0]["kappa"].shape == (5 + 3,)
    swapped = encoded.select([1, 0])
    assert [layout.num_tiles for layout in swapped.layouts] == [3, 5]
    assert swapped.stage_stats[0]["kappa"].shape == (3 + 5,)
    assert torch.equal(swapped.stage_stats[0]["kappa"][:3], encoded.stage_stats[0]["kappa"][5:])
    prompt = family.make_inputs(["<image> what"] * 2, images[::-1])
    direct = prune_inputs(family.model, prompt, pruner)
    shared = prune_inputs(
        family.model, {name: prompt[name] for name in ("input_ids", "attention_mask")}, pruner, encoded=swapped
    )
    assert direct.record is not None
    assert shared.record is not None
    assert torch.equal(direct.record.indices, shared.record.indices)


def test_a_second_turn_on_the_cache_equals_the_turn_from_scratch(family: Family) -> None:
    model = copy.deepcopy(family.model)
    first = family.make_inputs([PROMPT], [make_picture(0, (60, 120))])
    words = torch.tensor([[21, 9, 12]])
    with prune(model, make_pruner("random", num_tokens=6)):
        one = model.generate(**first, max_new_tokens=3, return_dict_in_generate=True)
        ids = torch.cat((one.sequences, words), dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cached = model.generate(**turn, past_key_values=one.past_key_values, max_new_tokens=3)
        scratch = model.generate(**{**first, **turn}, max_new_tokens=3)
    assert torch.equal(cached, scratch)


def test_a_chat_template_and_a_picture_go_all_the_way() -> None:
    family = LlavaNext()
    processor = family.processor
    turn = [{"type": "image"}, {"type": "text", "text": "what is this"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=make_picture(0, (90, 90)), return_tensors="pt")
    with prune(copy.deepcopy(family.model), make_pruner("dcp", num_tokens=6), processor=processor) as handle:
        answer = handle.model.generate(**inputs, max_new_tokens=2)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("scaled", SCALED, ids=lambda family: family.name)
def test_stages_are_refused_for_images_that_the_model_scales_behind_the_encoder(scaled: Family) -> None:
    inputs = scaled.make_inputs([PROMPT], [make_picture(0, (112, 112))])
    (layout,) = get_adapter(scaled.model).layouts(inputs)
    assert (layout.num_tiles, sum(layout.tile_lengths)) == (5, 16 + 25)
    with pytest.raises(InvalidInputError, match=r"112 x 112 pixels has more patches .* pruner without such stages"):
        prune_inputs(scaled.model, inputs, make_pruner("dcp_progressive", num_tokens=6))
    small = scaled.make_inputs([PROMPT], [make_picture(0, (56, 112))])
    prune_inputs(scaled.model, small, make_pruner("dcp_progressive", num_tokens=6))


def test_images_that_share_a_prompt_are_counted_as_overviews() -> None:
    (family,) = (family for family in FAMILIES if family.name == "llava_onevision")
    inputs = family.make_inputs(["<image> <image> what", "<image> what"], [make_picture(n, (90, 90)) for n in range(3)])
    layouts = get_adapter(family.model).layouts(inputs)
    assert [layout.num_tiles for layout in layouts] == [1, 1, 5]
    with pytest.raises(InvalidInputError, match=r"batch_num_images counts 2 image\(s\), but 3 were given"):
        get_adapter(family.model).layouts(inputs | {"batch_num_images": [2]})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_sizes": None}, "one of image_sizes for each, got shape .* and none"),
        ({"image_sizes": torch.tensor([[90, 90], [60, 60]])}, "and 2; make both"),
        ({"pixel_values": torch.zeros(5, 3, 56, 56)}, "images x tiles x channels"),
        ({"pixel_values": torch.zeros(1, 2, 3, 56, 56)}, "is cut into 5 tiles, but pixel_values hold 2"),
    ],
)
def test_sizes_and_tiles_that_do_not_match_are_refused(family: Family, change: dict[str, Any], sentence: str) -> None:
    inputs = family.make_inputs([PROMPT], [make_picture(0, (90, 90))]) | change
    with pytest.raises(InvalidInputError, match=sentence):
        prune_inputs(family.model, inputs, make_pruner("random", num_tokens=6))
