"""Gemma 3: averaged cells, images read in both directions, sliding windows, pan and scan."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from families import PATCH, Gemma3, OddOnesPruner, make_picture, make_spot, share_of_spot
from torch import Tensor
from transformers import DynamicCache

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import ShortInputs, prune, prune_inputs
from dcp_prune.models import get_adapter
from dcp_prune.registry import make_pruner
from dcp_prune.tokens import Signal

PROMPT = "USER: <image> what is this ASSISTANT:"
TWO = "USER: <image> where <image> is the cat"
CELL = 2
SIGNALS = frozenset({Signal.ENCODER_FEATURES, Signal.CLS_ATTENTION, Signal.KEYS, Signal.VALUES})


class NarrowGemma3(Gemma3):
    """Its sliding windows are narrower than an image."""

    window = 10


@pytest.fixture(scope="module")
def family() -> Gemma3:
    return Gemma3()


@pytest.fixture(scope="module")
def narrow() -> NarrowGemma3:
    return NarrowGemma3()


def pictures(*seeds: int) -> list[Any]:
    return [make_picture(seed, (90, 110)) for seed in seeds]


def test_a_chat_with_a_picture_is_answered_with_few_of_its_tokens(family: Gemma3) -> None:
    parts = [{"type": "image", "image": make_picture(0, (60, 120))}, {"type": "text", "text": "what is this"}]
    inputs = family.processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    model = copy.deepcopy(family.model)
    with prune(model, make_pruner("dcp", num_tokens=5), processor=family.processor) as handle:
        answer = model.generate(**inputs, max_new_tokens=3)
        with torch.no_grad():
            logits = model(**inputs).logits
    assert answer[0, -3] == logits[0, -1].argmax(), "generate and a plain call agree"
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3
    assert handle.last is not None
    assert handle.last.tokens_per_image == [(16, 5)]


def test_the_question_begins_behind_the_mark_that_ends_an_image(family: Gemma3) -> None:
    from dcp_prune.integrations.transformers.question import special_ids

    config = family.model.config
    assert {config.boi_token_id, config.eoi_token_id} <= set(special_ids(family.model, None).tolist())


def masks_by_hand(
    inputs: dict[str, Any], family: Gemma3, columns: Tensor | None = None, window: int | None = None
) -> dict[str, Tensor]:
    """Which column may see which, `b 1 l l`: what came before, and all of the own image; of what is in `columns` only,
    and within the window counted in those, if there are any."""
    ids = inputs["input_ids"]
    there = inputs["attention_mask"].bool()
    if columns is not None:
        kept = torch.zeros_like(ids).scatter_add(1, columns.clamp(min=0), (columns >= 0).long()) > 0
        there = there & kept
    place = there.cumsum(1)
    image = ids == family.image_id
    number = (image & ~image.roll(1, dims=1)).cumsum(1).masked_fill(~image, 0)
    own = (number.unsqueeze(2) == number.unsqueeze(1)) & image.unsqueeze(2)
    order = torch.arange(ids.shape[1])
    seen = ((order <= order.unsqueeze(1)) | own) & there.unsqueeze(1)
    near = place.unsqueeze(1) > place.unsqueeze(2) - (window or family.window)
    return {"full_attention": seen.unsqueeze(1), "sliding_attention": (seen & near).unsqueeze(1)}


def run_by_hand(family: Gemma3, inputs: dict[str, Any], short: ShortInputs, masks: dict[str, Tensor]) -> Tensor:
    """Logits of the whole prompt, with pruned features at the kept placeholders, under these masks."""
    assert short.record is not None
    assert short.columns is not None
    assert short.features is not None
    laid = torch.zeros(len(short.features), 16, short.features.shape[2])
    laid = laid.scatter(1, short.record.indices.unsqueeze(-1).expand_as(short.features), short.features)
    places = (inputs["input_ids"] == family.image_id).unsqueeze(-1)
    embeddings = family.model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(places, laid)
    positions = (masks["full_attention"][:, 0].any(dim=1).cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = family.model(inputs_embeds=embeddings, attention_mask=masks, position_ids=positions).logits
    return logits.gather(1, short.columns.clamp(min=0).unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


@pytest.mark.parametrize("rows", [[TWO], [PROMPT, TWO]], ids=["one row", "padded batch"])
def test_kept_tokens_of_an_image_see_each_other_and_windows_count_what_is_kept(
    narrow: NarrowGemma3, rows: list[str]
) -> None:
    inputs = narrow.make_inputs(rows, pictures(*range(2 * len(rows) - (len(rows) > 1))))
    short = prune_inputs(narrow.model, inputs, make_pruner("random", num_tokens=6))
    with torch.no_grad():
        logits = narrow.model(**short.inputs).logits
    real = short.tensors["attention_mask"].bool()
    right = run_by_hand(narrow, inputs, short, masks_by_hand(inputs, narrow, short.columns))
    torch.testing.assert_close(logits[real], right[real], rtol=1e-5, atol=1e-5)

    one_way = masks_by_hand(inputs, narrow, short.columns)
    causal = torch.ones(one_way["full_attention"].shape[-2:], dtype=torch.bool).tril()
    for wrong in (
        {name: mask & causal for name, mask in one_way.items()},
        masks_by_hand(inputs, narrow, short.columns, window=narrow.window + 1),
    ):
        assert (run_by_hand(narrow, inputs, short, wrong) - logits)[real].abs().max() > 1e-4


def test_token_types_are_those_of_the_short_prompt(family: Gemma3) -> None:
    inputs = family.make_inputs([PROMPT, TWO], pictures(0, 1, 2))
    short = prune_inputs(family.model, inputs, make_pruner("dcp", num_tokens=6))
    images = short.tensors["input_ids"] == family.image_id
    assert images.sum(dim=1).tolist() == [6, 12]
    assert torch.equal(short.tensors["token_type_ids"], images.long())


@pytest.mark.parametrize("window", [Gemma3, NarrowGemma3])
def test_a_new_image_in_a_second_turn_on_a_cache_equals_both_turns_from_scratch(window: type[Gemma3]) -> None:
    family = window()
    first, later = family.make_inputs([PROMPT], pictures(1)), family.make_inputs(["<image> where"], pictures(2))
    model = copy.deepcopy(family.model)
    cache = DynamicCache(config=model.config.get_text_config())
    with prune(model, make_pruner("uniform", num_tokens=6)):
        answer = model.generate(**first, max_new_tokens=3, past_key_values=cache)
        ids = torch.cat((answer, later["input_ids"]), dim=1)
        turn = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": (ids == family.image_id).long(),
        }
        continued = model.generate(**turn, pixel_values=later["pixel_values"], max_new_tokens=3, past_key_values=cache)
        both = torch.cat((first["pixel_values"], later["pixel_values"]))
        scratch = model.generate(**turn, pixel_values=both, max_new_tokens=3)
    assert torch.equal(continued, scratch)


def test_pan_and_scan_makes_every_crop_an_image_with_a_budget_of_its_own(family: Gemma3) -> None:
    options = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 32,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    inputs = family.make_inputs(
        [PROMPT, "what is <image>"], [make_picture(0, (60, 180)), make_picture(1, (60, 60))], **options
    )
    assert len(inputs["pixel_values"]) == 5, "a picture with three crops, and one without"
    record = prune_inputs(family.model, inputs, make_pruner("dcp", num_tokens=6)).record
    assert record is not None
    assert record.tokens_per_image == [(16, 6)] * 5
    assert record.rows.tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("corner", [(0.0, 0.0), (0.5, 0.25), (0.5, 0.5)])
def test_kept_tokens_map_back_to_the_pixels_that_differ(family: Gemma3, corner: tuple[float, float]) -> None:
    blind = copy.deepcopy(family.model)
    for layer in blind.model.vision_tower.encoder.layers:
        layer.self_attn.out_proj.weight.data.zero_()
    inputs = family.make_inputs([TWO], [make_picture(0, (84, 140)), make_spot((112, 168), corner, 0.5)])
    layout = get_adapter(blind).layouts(inputs)[1]
    assert layout.grid == (4, 4)
    share = share_of_spot(layout.boxes, corner, 0.5)
    record = prune_inputs(blind, inputs, OddOnesPruner(num_tokens=int((share > 0.5).sum()))).record
    assert record is not None
    assert torch.equal(record.boxes(1), layout.boxes[record.indices[1]])
    assert (share[record.indices[1]] > 0.5).all(), "every kept token shows the spot"


def test_eager_and_sdpa_capture_the_same_signals_and_choose_the_same(family: Gemma3) -> None:
    eager = copy.deepcopy(family.model)
    eager.set_attn_implementation("eager")
    inputs = family.make_inputs([PROMPT, TWO], pictures(0, 1, 2))
    for name in ("dcp", "visionzip", "cls_attention"):
        kept = [prune_inputs(model, inputs, make_pruner(name, num_tokens=5)).record for model in (family.model, eager)]
        assert kept[0] is not None
        assert kept[1] is not None
        assert torch.equal(kept[0].indices, kept[1].indices)


def test_signals_are_means_over_cells_of_what_the_tower_itself_computes(family: Gemma3) -> None:
    eager = copy.deepcopy(family.model)
    eager.set_attn_implementation("eager")
    inputs = family.make_inputs([TWO], pictures(0, 1))
    encoder = get_adapter(eager).encode(inputs, (), SIGNALS).tokens.encoder
    assert encoder is not None
    assert encoder.cls_attention is not None
    with torch.no_grad():
        own = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    side = family.side // PATCH
    received = own.attentions[-1].mean(dim=(1, 2)).view(2, side, side)
    cells = received.unfold(1, CELL, CELL).unfold(2, CELL, CELL).mean(dim=(-1, -2))
    torch.testing.assert_close(encoder.cls_attention, cells.flatten(1))
    hidden = own.hidden_states[-1].view(2, side, side, -1)
    cells = hidden.unfold(1, CELL, CELL).unfold(2, CELL, CELL).mean(dim=(-1, -2))
    torch.testing.assert_close(encoder.features, cells.flatten(1, 2))
    assert encoder.keys is not None
    assert encoder.values is not None
    assert encoder.keys.shape == encoder.values.shape == (2, 16, 16)


def test_pictures_of_another_size_than_the_projectors_are_refused(family: Gemma3) -> None:
    inputs = family.make_inputs([PROMPT], pictures(0))
    sentence = "takes pixel_values as images x channels x 112 x 112, got shape (1, 3, 84, 84); make them with"
    with pytest.raises(InvalidInputError, match=re.escape(sentence)):
        prune_inputs(
            family.model, inputs | {"pixel_values": torch.zeros(1, 3, 84, 84)}, make_pruner("dcp", num_tokens=5)
        )


def test_a_prompt_for_fewer_pictures_than_are_given_is_refused(family: Gemma3) -> None:
    inputs = family.make_inputs([PROMPT], pictures(0))
    with pytest.raises(InvalidInputError, match=r"room for 1 image\(s\), but 2 were given"):
        prune_inputs(
            family.model,
            inputs | {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)},
            make_pruner("dcp", num_tokens=5),
        )


def test_one_token_per_image_is_enough(family: Gemma3) -> None:
    inputs = family.make_inputs([TWO], pictures(0, 1))
    short = prune_inputs(family.model, inputs, make_pruner("dcp", num_tokens=1))
    assert short.record is not None
    assert short.record.tokens_per_image == [(16, 1), (16, 1)]
    with torch.no_grad():
        assert family.model(**short.inputs).logits.isfinite().all()
