"""Idefics3 and SmolVLM: tiles that only the prompt puts together to images, markers between them, cells of patches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import Idefics3, OddOnesPruner, SmolVLM, make_picture, make_spot, share_of_spot

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import encode_images, prune, prune_inputs
from dcp_prune.models import get_adapter
from dcp_prune.models.idefics3 import Idefics3Adapter, SmolVLMAdapter
from dcp_prune.registry import make_pruner
from dcp_prune.tokens import Signal
from tiny_llava import IMAGE_ID

PROMPT = "USER: <image> what is this ASSISTANT:"
TWO = "USER: <image> where is <image> the cat"
WIDE, TALL, SQUARE = (60, 120), (120, 50), (90, 90)
SIGNALS = frozenset({Signal.ENCODER_FEATURES, Signal.CLS_ATTENTION, Signal.KEYS, Signal.VALUES})


class Unsplit(Idefics3):
    split = False


@pytest.fixture(params=[Idefics3(), SmolVLM()], ids=lambda family: family.name, scope="module")
def family(request: pytest.FixtureRequest) -> Idefics3:
    return request.param


def pictures(*sizes: tuple[int, int]) -> list[Any]:
    return [make_picture(number, size) for number, size in enumerate(sizes)]


def grids(family: Idefics3, inputs: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Tiles, rows and columns of tiles of each image, as the positions of its tokens tell."""
    found = []
    for layout in get_adapter(family.model).layouts(inputs):
        rows, cols = (layout.positions.amax(dim=0) + 1).long().tolist()
        found.append((layout.num_tiles, rows // layout.grid[0], cols // layout.grid[1]))
    return found


def test_each_architecture_has_its_adapter(family: Idefics3) -> None:
    assert type(get_adapter(family.model)) is (Idefics3Adapter if family.name == "idefics3" else SmolVLMAdapter)


def test_the_prompt_says_which_tiles_make_up_an_image_and_how_they_lie(family: Idefics3) -> None:
    prompts = [TWO, "what is the dog here", f"{PROMPT} <image> <image>"]
    inputs = family.make_inputs(prompts, pictures(WIDE, SQUARE, TALL, TALL, WIDE))
    assert grids(family, inputs) == [(3, 1, 2), (5, 2, 2), (3, 2, 1), (3, 2, 1), (3, 1, 2)]


def test_images_of_one_tile_are_overviews() -> None:
    family = Unsplit()
    inputs = family.make_inputs([TWO, PROMPT], pictures(WIDE, SQUARE, TALL))
    assert grids(family, inputs) == [(1, 1, 1)] * 3
    short = prune_inputs(family.model, inputs, make_pruner("dcp", num_tokens=3))
    assert (short.inputs["input_ids"] == IMAGE_ID).sum(dim=1).tolist() == [6, 3]


def test_a_prompt_without_newlines_has_its_tiles_in_one_column(family: Idefics3) -> None:
    inputs = family.make_inputs([PROMPT], pictures(SQUARE))
    newline = family.processor.tokenizer.convert_tokens_to_ids("\n")
    keep = inputs["input_ids"][0] != newline
    plain = inputs | {name: inputs[name][:, keep] for name in ("input_ids", "attention_mask")}
    assert grids(family, plain) == [(5, 4, 1)]


@pytest.mark.parametrize("corner", [(0.0, 0.0), (0.5, 0.1), (0.5, 0.5)])
@pytest.mark.parametrize("size", [WIDE, TALL, SQUARE])
def test_kept_tokens_map_back_to_the_pixels_that_differ(
    family: Idefics3, size: tuple[int, int], corner: tuple[float, float]
) -> None:
    blind = copy.deepcopy(family.model)
    tower = blind.model.vision_model
    tower.embeddings.position_embedding.weight.data.zero_()
    for layer in tower.encoder.layers:
        layer.self_attn.out_proj.weight.data.zero_()
    extent = 0.5
    inputs = family.make_inputs([TWO], [make_picture(0, SQUARE), make_spot(size, corner, extent)])
    _, layout = get_adapter(blind).layouts(inputs)
    share = share_of_spot(layout.boxes, corner, extent)
    record = prune_inputs(blind, inputs, OddOnesPruner(num_tokens=int((share > 0.6).sum()))).record
    assert record is not None
    kept = record.indices[1]
    kept = kept[kept >= 0]
    assert torch.equal(record.boxes(1), layout.boxes[kept])
    assert (share[kept] > 0).all(), "every kept token shows the spot"
    assert (share[kept] > 0.5).float().mean() > 0.7
    assert record.tiles(1).max() == layout.num_tiles - 1, "the overview shows it"
    assert record.tiles(1).min() < layout.num_tiles - 1, "so do finer tiles"


def test_the_overview_lies_where_the_finer_tiles_show_the_same(family: Idefics3) -> None:
    (layout,) = get_adapter(family.model).layouts(family.make_inputs([PROMPT], pictures(WIDE)))
    fine, overview = layout.positions.split([2 * layout.tile_size, layout.tile_size])
    torch.testing.assert_close(overview.mean(dim=0), fine.mean(dim=0))
    middle = (layout.boxes[:, :2] + layout.boxes[:, 2:]) / 2
    extent = torch.tensor([layout.grid[0], 2 * layout.grid[1]])
    torch.testing.assert_close(middle * extent - 0.5, layout.positions)


def test_eager_and_sdpa_capture_the_same_signals_and_choose_the_same(family: Idefics3) -> None:
    eager = copy.deepcopy(family.model)
    eager.set_attn_implementation("eager")
    inputs = family.make_inputs([PROMPT, TWO], pictures(WIDE, SQUARE, TALL))
    found = [get_adapter(model).encode(inputs, (), SIGNALS).tokens.encoder for model in (family.model, eager)]
    assert found[0] is not None
    assert found[1] is not None
    for name in ("features", "cls_attention", "keys", "values"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), rtol=1e-4, atol=1e-4)
    for name in ("dcp", "visionzip", "cls_attention"):
        records = [
            prune_inputs(model, inputs, make_pruner(name, num_tokens=7)).record for model in (family.model, eager)
        ]
        assert records[0] is not None
        assert records[1] is not None
        assert torch.equal(records[0].indices, records[1].indices)


def test_signals_are_means_over_the_cells_of_the_towers_own(family: Idefics3) -> None:
    eager = copy.deepcopy(family.model)
    eager.set_attn_implementation("eager")
    inputs = family.make_inputs([PROMPT], pictures(WIDE))
    tokens = get_adapter(eager).encode(inputs, (), SIGNALS).tokens
    assert tokens.encoder is not None
    assert tokens.encoder.cls_attention is not None
    tower = eager.model.vision_model
    with torch.no_grad():
        own = tower(inputs["pixel_values"][0], output_attentions=True)
    side, cell = family.tile // family.patch, family.scale
    received = own.attentions[-1].mean(dim=(1, 2)).unflatten(1, (side, side))
    features = tower.post_layernorm(tokens.encoder.features)
    assert features.shape[:2] == (1, 3 * (side // cell) ** 2)
    token = 0
    for tile in range(3):
        for top in range(0, side, cell):
            for left in range(0, side, cell):
                mean = received[tile, top : top + cell, left : left + cell].mean()
                torch.testing.assert_close(tokens.encoder.cls_attention[0, token], mean)
                token += 1


def test_padding_inside_a_tile_is_masked_as_the_model_masks_it(family: Idefics3) -> None:
    inputs = family.make_inputs([TWO], pictures(WIDE, TALL))
    inputs["pixel_attention_mask"][0, 0, :, family.tile // 2 :] = 0
    inputs["pixel_attention_mask"][0, 2, family.tile // 2 :] = 0
    tokens = get_adapter(family.model).encode(inputs, (), SIGNALS).tokens
    own = family.own_features(inputs)
    plain = family.own_features(inputs | {"pixel_attention_mask": torch.ones_like(inputs["pixel_attention_mask"])})
    assert (own[0] - plain[0]).abs().max() > 1e-3
    for features, theirs in zip(tokens.features, own, strict=True):
        assert torch.equal(features[: len(theirs)], theirs)
    assert tokens.encoder is not None
    assert tokens.encoder.cls_attention is not None
    assert tokens.mask.all(), "cells of padding are in the prompt as well"
    assert tokens.encoder.cls_attention[0, family.tile // family.patch // family.scale - 1] == 0


def test_markers_go_with_their_tiles_and_text_between_images_stays(family: Idefics3) -> None:
    inputs = family.make_inputs([PROMPT, TWO], pictures(WIDE, SQUARE, TALL))
    short = prune_inputs(family.model, inputs, make_pruner("random", num_tokens=4))
    image = "<fake_token_around_image> <row_1_col_1> <image> <image> <image> <image> <fake_token_around_image>"
    for ids, prompt in zip(short.inputs["input_ids"], (PROMPT, TWO), strict=True):
        words = family.processor.tokenizer.convert_ids_to_tokens(ids)
        assert " ".join(words).replace("<pad> ", "") == "<s> " + prompt.replace("<image>", image)


def test_markers_stay_where_they_were_if_they_shall(family: Idefics3) -> None:
    inputs = family.make_inputs([TWO], pictures(WIDE, SQUARE))
    pruner = make_pruner("random", num_tokens=4)
    short = prune_inputs(family.model, inputs, pruner, keep_markers=True)
    ids = inputs["input_ids"][0]
    assert torch.equal(short.inputs["input_ids"][0][short.inputs["input_ids"][0] != IMAGE_ID], ids[ids != IMAGE_ID])
    assert short.record is not None
    assert (short.record.columns.diff(dim=1) > 0).all()
    assert torch.equal(short.inputs["input_ids"][0], ids[short.record.columns[0]])
    with torch.no_grad():
        assert family.model(**short.inputs).logits.shape[1] == short.record.prompt_after


def test_an_image_that_fits_the_budget_keeps_its_markers_beside_one_that_does_not(family: Idefics3) -> None:
    inputs = family.make_inputs([TWO], pictures(WIDE, SQUARE))
    own = family.own_features(inputs)
    short = prune_inputs(family.model, inputs, make_pruner("random", num_tokens=len(own[0])))
    last = (inputs["input_ids"][0] == IMAGE_ID).nonzero()[len(own[0]) - 1]
    assert torch.equal(short.inputs["input_ids"][0, : last + 1], inputs["input_ids"][0, : last + 1])
    assert short.features is not None
    torch.testing.assert_close(short.features[0], own[0], rtol=1e-5, atol=1e-4)
    assert short.record is not None
    assert [after for _, after in short.record.tokens_per_image] == [len(own[0])] * 2


def test_one_token_per_image_is_enough_for_an_answer(family: Idefics3) -> None:
    inputs = family.make_inputs([PROMPT, TWO], pictures(WIDE, SQUARE, TALL))
    short = prune_inputs(family.model, inputs, make_pruner("dcp", num_tokens=1))
    assert (short.inputs["input_ids"] == IMAGE_ID).sum(dim=1).tolist() == [1, 2]
    assert family.model.generate(**short.inputs, max_new_tokens=2).shape[0] == 2


def test_frames_of_a_video_are_pruned_as_images_and_keep_their_times(family: Idefics3) -> None:
    frames = Unsplit()
    prompt = "a two <image> here red <image> here blue <image> what is this"
    inputs = frames.make_inputs([prompt], pictures(SQUARE, SQUARE, SQUARE))
    record = prune_inputs(frames.model, inputs, make_pruner("dcp", num_tokens=2)).record
    assert record is not None
    words = frames.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0][record.columns[0]])
    kept = [word for word in words if word[0] not in "<"]
    assert " ".join(kept) == prompt.replace("<image> ", "")
    assert [after for _, after in record.tokens_per_image] == [2, 2, 2]


def test_one_encoder_pass_serves_several_prompts(family: Idefics3) -> None:
    inputs = family.make_inputs([TWO], pictures(WIDE, SQUARE))
    pruner = make_pruner("dcp", num_tokens=5)
    encoded = encode_images(
        family.model,
        inputs["pixel_values"],
        pruner,
        pixel_attention_mask=inputs["pixel_attention_mask"],
        input_ids=inputs["input_ids"],
    )
    assert [layout.num_tiles for layout in encoded.layouts] == [3, 5]
    swapped = family.make_inputs([TWO], pictures(WIDE, SQUARE)[::-1])
    prompt = {name: swapped[name] for name in ("input_ids", "attention_mask")}
    shared = prune_inputs(family.model, prompt, pruner, encoded=encoded.select([1, 0])).record
    direct = prune_inputs(family.model, swapped, pruner).record
    assert shared is not None
    assert direct is not None
    assert torch.equal(shared.indices, direct.indices)
    tiles = encode_images(family.model, inputs["pixel_values"], pruner)
    assert [layout.num_tiles for layout in tiles.layouts] == [1] * 8, "without a prompt, each tile is an image"


@pytest.mark.parametrize("again", [True, False])
def test_a_new_image_in_a_later_turn_equals_the_conversation_from_scratch(family: Idefics3, again: bool) -> None:
    model = copy.deepcopy(family.model)
    first = family.make_inputs([PROMPT], pictures(WIDE))
    whole = family.make_inputs([f"{PROMPT} <image> where"], pictures(WIDE, TALL))
    with prune(model, make_pruner("random", num_tokens=5)):
        one = model.generate(**first, max_new_tokens=3, suppress_tokens=[IMAGE_ID], return_dict_in_generate=True)
        ids = torch.cat((one.sequences, whole["input_ids"][:, first["input_ids"].shape[1] :]), dim=1)
        turn = whole | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        scratch = model.generate(**turn, max_new_tokens=3)
        if not again:
            turn = turn | {name: turn[name][:, 3:] for name in ("pixel_values", "pixel_attention_mask")}
        cached = model.generate(**turn, past_key_values=one.past_key_values, max_new_tokens=3)
    assert torch.equal(cached, scratch)


def test_a_chat_template_and_a_picture_go_all_the_way(family: Idefics3) -> None:
    processor = family.processor
    turn = [{"type": "image"}, {"type": "text", "text": "what is this"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=make_picture(0, SQUARE), return_tensors="pt")
    with prune(copy.deepcopy(family.model), make_pruner("dcp", num_tokens=6), processor=processor) as handle:
        answer = handle.model.generate(**inputs, max_new_tokens=2)
        assert handle.last is not None
        assert handle.last.tokens_after == 6
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 2


def test_tiles_that_do_not_match_the_placeholders_are_refused(family: Idefics3) -> None:
    pruner = make_pruner("random", num_tokens=3)
    inputs = family.make_inputs([PROMPT, PROMPT], pictures(WIDE, SQUARE))
    model = copy.deepcopy(family.model)
    swapped = inputs | {name: inputs[name].flip(0) for name in ("pixel_values", "pixel_attention_mask")}
    fewer = inputs | {name: inputs[name][:, :4] for name in ("pixel_values", "pixel_attention_mask")}
    more = inputs | {"pixel_values": inputs["pixel_values"].clone()}
    more["pixel_values"][0, 3] = 0.5
    cut = inputs | {name: inputs[name][:, :-10] for name in ("input_ids", "attention_mask")}
    for broken in (swapped, fewer, more, cut):
        with pytest.raises(InvalidInputError, match="placeholders"):
            prune_inputs(model, broken, pruner)
        with prune(model, pruner), pytest.raises(InvalidInputError, match="placeholders"):
            model.generate(**broken, max_new_tokens=1)
        with pytest.raises(InvalidInputError, match="placeholders"):
            prune_inputs(model, broken, make_pruner("random", num_tokens=1000))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("pixel_values", torch.ones(3, 3, 96, 96), "prompts x tiles x channels x rows x columns"),
        ("pixel_values", torch.ones(1, 3, 3, 96, 48), "of square tiles of a multiple of"),
        ("pixel_values", torch.ones(1, 3, 3, 40, 40), "of square tiles of a multiple of"),
        ("pixel_values", torch.zeros(1, 3, 3, 96, 96), "every tile of pixel_values is zero"),
        ("pixel_attention_mask", torch.ones(1, 2, 96, 96), "does not fit pixel_values"),
    ],
)
def test_pixels_of_another_form_are_refused(name: str, value: Any, sentence: str) -> None:
    family = SmolVLM()
    inputs = family.make_inputs([PROMPT], pictures(WIDE))
    if name == "pixel_values":
        inputs.pop("pixel_attention_mask")
    with pytest.raises(InvalidInputError, match=sentence):
        prune_inputs(family.model, inputs | {name: value}, make_pruner("random", num_tokens=3))
