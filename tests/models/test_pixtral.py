"""Pixtral and Mistral 3: one sequence for images of all sizes, breaks between rows, cells of patches."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from families import (
    PATCH,
    Mistral3,
    OddOnesPruner,
    Pixtral,
    expand_placeholders,
    make_picture,
    make_spot,
    share_of_spot,
)

from dcp_prune.errors import InvalidInputError, UnsupportedModelError
from dcp_prune.integrations.transformers import prune, prune_inputs
from dcp_prune.models import get_adapter, pixtral
from dcp_prune.models.llava import LlavaAdapter
from dcp_prune.models.mistral3 import Mistral3Adapter
from dcp_prune.models.pixtral import PixtralAdapter
from dcp_prune.registry import make_pruner
from dcp_prune.tokens import Signal
from tiny_llava import IMAGE_ID, build_model

PROMPT = "USER: <image> what is this ASSISTANT:"
TWO = "USER: <image> where is <image> the cat"
SIZES = ((84, 112), (56, 168), (140, 56))
SIGNALS = frozenset({Signal.ENCODER_FEATURES, Signal.CLS_ATTENTION, Signal.KEYS, Signal.VALUES})


@pytest.fixture(params=[Pixtral(), Mistral3()], ids=lambda family: family.name, scope="module")
def family(request: pytest.FixtureRequest) -> Pixtral:
    return request.param


def pictures(*which: int) -> list[Any]:
    return [make_picture(number, SIZES[number]) for number in which]


def test_the_tower_decides_which_adapter_a_llava_gets(family: Pixtral) -> None:
    assert type(get_adapter(build_model())) is LlavaAdapter
    assert type(get_adapter(family.model)) is (PixtralAdapter if family.name == "pixtral" else Mistral3Adapter)


@pytest.mark.parametrize("corner", [(0.0, 0.0), (0.5, 0.1), (0.5, 0.5)])
@pytest.mark.parametrize("size", [(112, 112), (112, 168), (168, 84)])
def test_kept_tokens_map_back_to_the_pixels_that_differ(
    family: Pixtral, size: tuple[int, int], corner: tuple[float, float]
) -> None:
    blind = copy.deepcopy(family.model)
    for layer in blind.model.vision_tower.transformer.layers:
        layer.attention.o_proj.weight.data.zero_()
    inputs = family.make_inputs([TWO], [make_picture(0, (84, 140)), make_spot(size, corner, 0.4)])
    _, layout = get_adapter(blind).layouts(inputs)
    assert layout.grid == (size[0] // PATCH // family.cell, size[1] // PATCH // family.cell)
    share = share_of_spot(layout.boxes, corner, 0.4)
    record = prune_inputs(blind, inputs, OddOnesPruner(num_tokens=int((share > 0.51).sum()))).record
    assert record is not None
    kept = record.indices[1]
    assert torch.equal(record.boxes(1), layout.boxes[kept])
    assert (share[kept] > 0).all(), "every kept token shows the spot"
    assert (share[kept] > 0.5).float().mean() > 0.6


def test_eager_and_sdpa_capture_the_same_signals_and_choose_the_same(family: Pixtral) -> None:
    eager = copy.deepcopy(family.model)
    eager.set_attn_implementation("eager")
    inputs = family.make_inputs([PROMPT, TWO], pictures(0, 1, 2))
    found = [get_adapter(model).encode(inputs, (), SIGNALS).tokens.encoder for model in (family.model, eager)]
    assert found[0] is not None
    assert found[1] is not None
    for name in ("features", "cls_attention", "keys", "values"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), rtol=1e-4, atol=1e-4)
    for name in ("dcp", "visionzip", "cls_attention"):
        records = [
            prune_inputs(model, inputs, make_pruner(name, num_tokens=5)).record for model in (family.model, eager)
        ]
        assert records[0] is not None
        assert records[1] is not None
        assert torch.equal(records[0].indices, records[1].indices)


def test_received_attention_is_that_of_the_towers_own_attention_maps_over_cells(family: Pixtral) -> None:
    eager = copy.deepcopy(family.model)
    eager.set_attn_implementation("eager")
    inputs = family.make_inputs([TWO], pictures(0, 1))
    tokens = get_adapter(eager).encode(inputs, (), SIGNALS).tokens
    assert tokens.encoder is not None
    assert tokens.encoder.cls_attention is not None
    with torch.no_grad():
        own = eager.model.vision_tower(
            inputs["pixel_values"], inputs["image_sizes"], output_attentions=True, output_hidden_states=True
        )
    first = 0
    for image, (height, width) in enumerate(inputs["image_sizes"].tolist()):
        grid = (height // PATCH, width // PATCH)
        part = slice(first, first + grid[0] * grid[1])
        first = part.stop
        received = own.attentions[-1][0, :, part, part].mean(dim=(0, 1)).view(grid)
        features = own.hidden_states[-1][0, part].view(*grid, -1)
        row = 0
        for top in range(0, grid[0] - family.cell + 1, family.cell):
            for left in range(0, grid[1] - family.cell + 1, family.cell):
                cell = (slice(top, top + family.cell), slice(left, left + family.cell))
                torch.testing.assert_close(tokens.encoder.cls_attention[image, row], received[cell].mean())
                torch.testing.assert_close(tokens.encoder.features[image, row], features[cell].mean(dim=(0, 1)))
                row += 1
        assert tokens.mask[image].sum() == row


def test_images_one_by_one_as_flash_attention_needs_them_are_those_of_one_sequence(
    family: Pixtral, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = family.make_inputs([PROMPT, TWO], pictures(0, 1, 2))
    adapter = get_adapter(family.model)
    together = adapter.encode(inputs, (), SIGNALS).tokens
    monkeypatch.setattr(pixtral, "is_flash_attention_requested", lambda config: True)
    alone = adapter.encode(inputs, (), SIGNALS).tokens
    assert together.encoder is not None
    assert alone.encoder is not None
    torch.testing.assert_close(alone.features, together.features, rtol=1e-4, atol=1e-4)
    for name in ("features", "cls_attention", "keys", "values"):
        torch.testing.assert_close(getattr(alone.encoder, name), getattr(together.encoder, name), rtol=1e-4, atol=1e-4)


def test_breaks_go_with_their_rows_and_text_between_images_stays(family: Pixtral) -> None:
    inputs = family.make_inputs([PROMPT, TWO], pictures(0, 1, 2))
    short = prune_inputs(family.model, inputs, make_pruner("random", num_tokens=5))
    image = [IMAGE_ID] * 5 + [family.end_id]
    expected = expand_placeholders([PROMPT, TWO], [image] * 3)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(short.inputs[name], expected[name])


def test_breaks_stay_where_they_were_if_they_shall(family: Pixtral) -> None:
    inputs = family.make_inputs([TWO], pictures(1, 2))
    pruner = make_pruner("random", num_tokens=5)
    short = prune_inputs(family.model, inputs, pruner, keep_markers=True)
    ids = inputs["input_ids"]
    kept = torch.ones_like(ids, dtype=torch.bool)
    assert short.record is not None
    columns = (ids[0] == IMAGE_ID).nonzero().squeeze(1)
    kept[0, columns] = False
    for indices, own in zip(
        short.record.indices, columns.split([len(layout) for layout in short.record.layouts]), strict=True
    ):
        kept[0, own[indices]] = True
    assert torch.equal(short.inputs["input_ids"], ids[kept].unsqueeze(0))
    assert (short.inputs["input_ids"] == family.break_id).sum() == (ids == family.break_id).sum() > 4
    model = copy.deepcopy(family.model)
    with prune(model, pruner, keep_markers=True):
        answer = model.generate(**inputs, max_new_tokens=3)
    assert torch.equal(answer, short.restore(family.model.generate(**short.inputs, max_new_tokens=3)))


def test_an_image_that_fits_the_budget_keeps_its_breaks_beside_one_that_does_not(family: Pixtral) -> None:
    small, large = make_picture(0, (56, 56)), make_picture(1, (168, 112))
    budget = (4 // family.cell) ** 2
    inputs = family.make_inputs([TWO], [small, large])
    short = prune_inputs(family.model, inputs, make_pruner("random", num_tokens=budget))
    side = 4 // family.cell
    expected = expand_placeholders([TWO], [family.span(side, side), [IMAGE_ID] * budget + [family.end_id]])
    assert torch.equal(short.inputs["input_ids"], expected["input_ids"])
    assert short.features is not None
    torch.testing.assert_close(short.features[0], family.own_features(inputs)[0], rtol=1e-5, atol=1e-4)


def test_one_token_per_image_is_enough_for_an_answer(family: Pixtral) -> None:
    inputs = family.make_inputs([PROMPT, TWO], pictures(0, 1, 2))
    short = prune_inputs(family.model, inputs, make_pruner("dcp", num_tokens=1))
    assert (short.inputs["input_ids"] == IMAGE_ID).sum(dim=1).tolist() == [1, 2]
    assert family.model.generate(**short.inputs, max_new_tokens=2).shape[0] == 2


@pytest.mark.parametrize("listed", [False, True])
def test_a_new_image_in_a_later_turn_equals_the_conversation_from_scratch(family: Pixtral, listed: bool) -> None:
    model = copy.deepcopy(family.model)
    pruner = make_pruner("random", num_tokens=5)
    first = family.make_inputs([PROMPT], pictures(0))
    with prune(model, pruner):
        one = model.generate(**first, max_new_tokens=3, suppress_tokens=[IMAGE_ID], return_dict_in_generate=True)
        whole = family.make_inputs([PROMPT + " <image> where"], pictures(0, 1))
        begin = first["input_ids"].shape[1]
        ids = torch.cat((one.sequences, whole["input_ids"][:, begin:]), dim=1)
        turn = whole | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if listed:
            turn["image_sizes"] = turn["image_sizes"].tolist()
        scratch = model.generate(**turn, max_new_tokens=3)
        cached = model.generate(**turn, past_key_values=one.past_key_values, max_new_tokens=3)
    assert torch.equal(cached, scratch)


def test_without_sizes_every_image_fills_its_pixels() -> None:
    family = Pixtral()
    inputs = family.make_inputs([TWO], [make_picture(0, (84, 112)), make_picture(1, (84, 112))])
    sizes = inputs.pop("image_sizes")
    pruner = make_pruner("cls_attention", num_tokens=5)
    plain, sized = (prune_inputs(family.model, each, pruner) for each in (inputs, inputs | {"image_sizes": sizes}))
    assert plain.features is not None
    assert sized.features is not None
    assert torch.equal(plain.features, sized.features)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_sizes": torch.tensor([[84, 112], [56, 168]])}, "one of image_sizes for each, got shape .* and 2"),
        ({"image_sizes": torch.tensor([[84, 700]])}, "an image of 84 x 700 pixels, but .* hold 84 x 112"),
        ({"image_sizes": torch.tensor([[84, 7]])}, "an image of 84 x 7 pixels, but a token shows"),
        ({"pixel_values": torch.zeros(3, 84, 112)}, "images x channels x rows x columns"),
        ({"image_sizes": torch.tensor([[56, 112]])}, "placeholders|room for"),
    ],
)
def test_sizes_that_do_not_match_the_pixels_or_the_prompt_are_refused(
    family: Pixtral, change: dict[str, Any], sentence: str
) -> None:
    inputs = family.make_inputs([PROMPT], pictures(0)) | change
    with pytest.raises(InvalidInputError, match=sentence):
        prune_inputs(family.model, inputs, make_pruner("random", num_tokens=3))


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("vision_feature_layer", [-2, -1], "is the list [-2, -1]"),
        ("vision_feature_layer", 9, "is the output of no layer"),
        ("vision_feature_select_strategy", "default", "drops the first patch of an encoder without [CLS]"),
    ],
)
def test_a_model_set_up_in_a_way_that_cannot_be_pruned_is_refused(
    family: Pixtral, setting: str, value: object, sentence: str
) -> None:
    model = copy.deepcopy(family.model)
    setattr(model.config, setting, value)
    with pytest.raises(UnsupportedModelError, match=re.escape(sentence)):
        get_adapter(model)


def test_an_earlier_feature_layer_is_bit_equal_too(family: Pixtral) -> None:
    model = copy.deepcopy(family.model)
    model.config.vision_feature_layer = -2
    inputs = family.make_inputs([TWO], pictures(1, 2))
    with torch.no_grad():
        own = model.get_image_features(inputs["pixel_values"], image_sizes=inputs["image_sizes"]).pooler_output
    encoded = get_adapter(model).encode(inputs)
    for features, mask, theirs in zip(encoded.tokens.features, encoded.tokens.mask, own, strict=True):
        assert torch.equal(features[mask], theirs)
