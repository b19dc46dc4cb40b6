"""Qwen-VL: packed towers, positions along three axes, DeepStack, conversations, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from families import (
    FAMILIES,
    IMAGE_ID,
    PATCH,
    SIZES,
    VIDEO_ID,
    OddOnesPruner,
    Qwen2VL,
    Qwen3VL,
    QwenVideos,
    cut_patches,
    expand_placeholders,
    make_picture,
    make_spot,
    share_of_spot,
)
from PIL import Image
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_window_index

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.transformers import encode_images, prune, prune_inputs
from dcp_prune.models import get_adapter
from dcp_prune.pruners.base import EncoderStage, SelectionPruner
from dcp_prune.registry import make_pruner
from dcp_prune.tokens import EncoderReduction, EncoderTokens, Signal, VisualTokens

QWEN = [family for family in FAMILIES if isinstance(family, Qwen2VL)]
IMAGES = [family for family in QWEN if family.modality == "image"]
VIDEOS = [family for family in QWEN if isinstance(family, QwenVideos)]
PROMPT = "USER: <image> what is this ASSISTANT:"
TWO = "USER: <image> where <image> is the cat"
START, END = 61, 62


@pytest.fixture(params=IMAGES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Qwen2VL:
    return request.param


@pytest.fixture(params=VIDEOS, ids=lambda family: family.name)
def videos(request: pytest.FixtureRequest) -> QwenVideos:
    return request.param


@pytest.fixture(params=QWEN, ids=lambda family: family.name)
def either(request: pytest.FixtureRequest) -> Qwen2VL:
    return request.param


@dataclass(frozen=True, kw_only=True)
class KeepPruner(SelectionPruner):
    """Keeps what it is told."""

    places: tuple[int, ...]

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        return torch.tensor([self.places] * len(tokens.features))


def pictures() -> list[Image.Image]:
    return [make_picture(number, size) for number, size in enumerate(SIZES)]


def true_axes(family: Qwen2VL, inputs: dict[str, Any]) -> Tensor:
    """Where the model itself puts the columns of a whole prompt, for time, row and column."""
    names = ("input_ids", "mm_token_type_ids", "attention_mask", "image_grid_thw", "video_grid_thw")
    given = {name: inputs[name] for name in (*names, "second_per_grid_ts") if name in inputs}
    return family.model.model.get_rope_index(**given)[0]


def blinded(family: Qwen2VL) -> Any:
    """Whose tokens know the pixels of their own patches and nothing else."""
    model = copy.deepcopy(family.model)
    tower = model.model.visual
    for block in tower.blocks:
        down = getattr(block.mlp, "fc2", None) or getattr(block.mlp, "linear_fc2", None) or block.mlp.down_proj
        for linear in (block.attn.proj, down):
            linear.weight.data.zero_()
            linear.bias.data.zero_()
    if hasattr(tower, "pos_embed"):
        tower.pos_embed.weight.data.zero_()
    return model


def test_kept_tokens_lie_where_they_lay_and_masks_are_made_from_a_plain_count(either: Qwen2VL) -> None:
    inputs = either.make_inputs([PROMPT, TWO, "what is"], pictures())
    short = prune_inputs(either.model, inputs, make_pruner("random", num_tokens=6))
    positions, mask, columns = short.tensors["position_ids"], short.tensors["attention_mask"], short.columns
    assert columns is not None
    real = mask.bool()
    expected = true_axes(either, inputs).gather(2, columns.clamp(min=0).expand(3, -1, -1))
    assert torch.equal(positions[1:, real], expected[:, real])
    assert torch.equal(positions[0][real], (mask.cumsum(1) - 1)[real])
    assert (positions[2] != positions[3]).any(), "rows and columns differ"
    assert short.tensors["mm_token_type_ids"].shape == short.tensors["input_ids"].shape
    assert torch.equal(short.tensors["mm_token_type_ids"], either.token_types(short.tensors["input_ids"]))
    assert not {"image_grid_thw", "video_grid_thw", "second_per_grid_ts"} & set(short.inputs)


def test_positions_that_the_caller_gives_are_kept(family: Qwen2VL) -> None:
    inputs = family.make_inputs([PROMPT, TWO], [make_picture(n, (90, 90)) for n in range(3)])
    given = true_axes(family, inputs) + 5
    short = prune_inputs(family.model, inputs | {"position_ids": given}, make_pruner("random", num_tokens=6))
    assert short.columns is not None
    real = short.columns >= 0
    gathered = given.gather(2, short.columns.clamp(min=0).expand(3, -1, -1))
    assert torch.equal(short.tensors["position_ids"][1:, real], gathered[:, real])


def test_samples_packed_by_the_count_of_tokens_do_not_see_each_other(family: Qwen2VL) -> None:
    samples = [
        family.make_inputs([prompt], [make_picture(number, (90, 90))])
        for number, prompt in enumerate((PROMPT, "where <image> is the cat"))
    ]
    for each in samples:
        count = torch.arange(each["input_ids"].shape[1]).expand(1, 1, -1)
        each["position_ids"] = torch.cat((count, true_axes(family, each)))
        del each["attention_mask"]
    packed = {
        name: torch.cat([each[name] for each in samples], dim=dim)
        for name, dim in (("input_ids", 1), ("mm_token_type_ids", 1), ("position_ids", 2))
    }
    packed |= {name: torch.cat([each[name] for each in samples]) for name in ("pixel_values", "image_grid_thw")}
    with prune(copy.deepcopy(family.model), make_pruner("uniform", num_tokens=6)) as handle, torch.no_grad():
        alone = torch.cat([handle.model(**each, use_cache=False).logits for each in samples], dim=1)
        together = handle.model(**packed, use_cache=False).logits
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_a_step_on_a_cache_lies_behind_its_own_prompt_whatever_ran_in_between(family: Qwen2VL) -> None:
    one, other = (
        family.make_inputs([prompt], [make_picture(number, SIZES[number])])
        for number, prompt in enumerate((PROMPT, "<image> what"))
    )
    token = torch.tensor([[7]])
    with prune(copy.deepcopy(family.model), make_pruner("uniform", num_tokens=6)) as handle, torch.no_grad():
        model = handle.model
        expected = model(input_ids=token, past_key_values=model(**one).past_key_values).logits
        cache = model(**one).past_key_values
        model(**other)
        torch.testing.assert_close(model(input_ids=token, past_key_values=cache).logits, expected)
        whole = torch.ones(1, one["input_ids"].shape[1] + 1, dtype=torch.long)
        cache = model(**one).past_key_values
        model(**other)
        found = model(input_ids=token, past_key_values=cache, attention_mask=whole).logits
        torch.testing.assert_close(found, expected)


def test_positions_do_not_hang_on_token_types_that_the_caller_forgot(family: Qwen2VL) -> None:
    inputs = family.make_inputs([PROMPT], [make_picture(0, (90, 90))])
    pruner = make_pruner("random", num_tokens=6)
    whole = prune_inputs(family.model, inputs, pruner)
    del inputs["mm_token_type_ids"]
    assert torch.equal(
        prune_inputs(family.model, inputs, pruner).tensors["position_ids"], whole.tensors["position_ids"]
    )


def test_features_and_deepstack_are_bit_equal_also_where_signals_are_captured(either: Qwen2VL) -> None:
    inputs = either.make_inputs([PROMPT, TWO], pictures())
    pixels, grids = either.adapter.image_inputs[:2]
    with torch.no_grad():
        own = either.model.model.get_image_features(inputs[pixels], inputs[grids])
    signals = either.adapter.signals
    encoded = either.adapter.encode(inputs, signals=signals)
    assert encoded.tokens.encoder is not None
    lengths = [len(layout) for layout in encoded.layouts]
    for row, features in enumerate(own.pooler_output):
        assert torch.equal(encoded.tokens.features[row, : lengths[row]], features)
        assert not encoded.tokens.features[row, lengths[row] :].any()
    layers = getattr(own, "deepstack_features", None) or []
    assert len(encoded.deepstack) == len(layers) == (2 if either.name.startswith("qwen3") else 0)
    for layer, expected in zip(encoded.deepstack, layers, strict=True):
        for row, features in enumerate(expected):
            assert torch.equal(layer[row, : lengths[row]], features)


def test_saliency_is_the_attention_that_a_cell_receives_within_its_frame(either: Qwen2VL) -> None:
    inputs = either.make_inputs([PROMPT], [make_picture(3, (90, 90))])
    found = either.adapter.encode(inputs, signals=either.adapter.signals).tokens.encoder
    assert found is not None
    assert found.cls_attention is not None
    model = copy.deepcopy(either.model)
    received: list[Tensor] = []

    def watch(module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, **rest: Any) -> Any:
        weights = (query @ key.mT * scaling).softmax(dim=-1)
        if module is model.model.visual.blocks[-1].attn:
            received.append(weights[0].mean(dim=0).mean(dim=0))
        return (weights @ value).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("watching", watch)
    model.model.visual.config._attn_implementation = "watching"
    pixels, grids = (inputs[name] for name in either.adapter.image_inputs[:2])
    with torch.no_grad():
        model.model.visual(pixels, grid_thw=grids)
    cells = torch.cat(received).view(-1, 4).mean(dim=1)
    kept = found.cls_attention[0]
    assert len(received) == int(grids[0, 0])
    if hasattr(model.model.visual, "fullatt_block_indexes"):
        kept, cells = kept.sort().values, cells.sort().values  # the tower works window by window
    torch.testing.assert_close(kept, cells)


def test_sdpa_and_eager_choose_the_same(either: Qwen2VL) -> None:
    inputs = either.make_inputs([TWO], [make_picture(1, (60, 120)), make_picture(2, (100, 40))])
    eager = copy.deepcopy(either.model)
    eager.set_attn_implementation("eager")
    for name in ("dcp", "visionzip", "holov"):
        pruner = make_pruner(name, num_tokens=6)
        one, other = (prune_inputs(model, inputs, pruner).record for model in (either.model, eager))
        assert one is not None
        assert other is not None
        assert torch.equal(one.indices, other.indices)


@pytest.mark.parametrize("corner", [(0.0, 0.0), (0.5, 0.0), (0.5, 0.5)])
def test_kept_tokens_map_back_to_the_pixels_that_differ(family: Qwen2VL, corner: tuple[float, float]) -> None:
    model = blinded(family)
    for size in ((168, 168), (112, 168), (168, 112)):
        inputs = family.make_inputs([PROMPT], [make_spot(size, corner, 0.5)])
        (layout,) = get_adapter(model).layouts(inputs)
        within = share_of_spot(layout.boxes, corner, 0.5) > 0.5
        record = prune_inputs(model, inputs, OddOnesPruner(num_tokens=int(within.sum()))).record
        assert record is not None
        assert torch.equal(record.indices[0], within.nonzero().squeeze(1))
        assert torch.equal(record.boxes(0), layout.boxes[within])


def test_one_encoder_pass_serves_images_of_any_size_in_any_order(family: Qwen2VL) -> None:
    pruner = make_pruner("dcp", num_tokens=6)
    images = [make_picture(0, (90, 90)), make_picture(1, (60, 120)), make_picture(2, (100, 40))]
    inputs = family.make_inputs(["<image> what"] * 3, images)
    encoded = encode_images(family.model, inputs["pixel_values"], pruner, image_grid_thw=inputs["image_grid_thw"])
    turned = family.make_inputs(["<image> what"] * 3, images[::-1])
    direct = prune_inputs(family.model, turned, pruner)
    text = {name: turned[name] for name in ("input_ids", "attention_mask")}
    shared = prune_inputs(family.model, text, pruner, encoded=encoded.select([2, 1, 0]))
    assert direct.record is not None
    assert shared.record is not None
    assert torch.equal(direct.record.indices, shared.record.indices)
    assert torch.equal(direct.tensors["position_ids"], shared.tensors["position_ids"])
    with torch.no_grad():
        one, other = (family.model(**short.inputs).logits[:, -1] for short in (direct, shared))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def only_words(model: Any) -> dict[str, Any]:
    """Options with which a model of random weights says nothing that stands for a picture."""
    return {"suppress_tokens": [model.config.image_token_id, model.config.video_token_id]}


@pytest.mark.parametrize("ways", [{}, {"num_return_sequences": 2, "do_sample": True}])
def test_a_second_turn_on_the_cache_equals_the_turn_from_scratch(either: Qwen2VL, ways: dict[str, Any]) -> None:
    model = copy.deepcopy(either.model)
    first = either.make_inputs([PROMPT], [make_picture(0, (60, 120))])
    with prune(model, make_pruner("random", num_tokens=6)):
        torch.manual_seed(0)
        one = model.generate(**first, **ways, **only_words(model), max_new_tokens=3, return_dict_in_generate=True)
        ids = torch.cat((one.sequences, torch.tensor([[21, 9, 12]]).expand(len(one.sequences), -1)), dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        options: dict[str, Any] = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
        cached = model.generate(**turn, past_key_values=one.past_key_values, **options)
        images = {name: torch.cat([first[name]] * len(ids)) for name in either.adapter.image_inputs if name in first}
        types = either.token_types(ids)
        scratch = model.generate(**turn, **images, mm_token_type_ids=types, **options)
    assert torch.equal(cached.sequences, scratch.sequences)
    torch.testing.assert_close(cached.logits[0], scratch.logits[0], rtol=1e-4, atol=1e-4)


def test_new_images_in_a_second_turn_lie_where_they_would_from_scratch(family: Qwen2VL) -> None:
    model = copy.deepcopy(family.model)
    pictures = [make_picture(0, (60, 120)), make_picture(1, (100, 40))]
    first, both = family.make_inputs([PROMPT], pictures[:1]), family.make_inputs([PROMPT + " " + PROMPT], pictures)
    options: dict[str, Any] = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    with prune(model, make_pruner("random", num_tokens=6)) as handle:
        one = model.generate(**first, max_new_tokens=1, return_dict_in_generate=True)
        cached = model.generate(**both, past_key_values=one.past_key_values, **options)
        assert handle.last is not None
        assert len(handle.last.indices) == 1, "the first image is in the cache"
        scratch = model.generate(**both, **options)
    torch.testing.assert_close(cached.logits[0], scratch.logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", ["none", "full"])
def test_plain_steps_on_the_cache_equal_generate(either: Qwen2VL, mask: str) -> None:
    model = copy.deepcopy(either.model)
    inputs = either.make_inputs([PROMPT], [make_picture(0, (60, 120))])
    model.model.rope_deltas = torch.tensor([[99]])  # of another conversation
    with prune(model, make_pruner("random", num_tokens=6)), torch.no_grad():
        answer = model.generate(
            **inputs, **only_words(model), max_new_tokens=4, return_dict_in_generate=True, output_logits=True
        )
        model.model.rope_deltas = torch.tensor([[99]])
        length = inputs["input_ids"].shape[1]
        step = model(**inputs, use_cache=True)
        torch.testing.assert_close(step.logits[:, -1], answer.logits[0], rtol=1e-4, atol=1e-4)
        for count in range(3):
            word = answer.sequences[:, length + count : length + count + 1]
            whole = torch.ones(1, length + count + 1, dtype=torch.long)
            masks = {"attention_mask": whole} if mask == "full" else {}
            step = model(input_ids=word, past_key_values=step.past_key_values, **masks)
            torch.testing.assert_close(step.logits[:, -1], answer.logits[count + 1], rtol=1e-4, atol=1e-4)


def test_labels_are_shortened_and_gradients_reach_the_tower(family: Qwen2VL) -> None:
    model = copy.deepcopy(family.model).train()
    inputs = family.make_inputs([PROMPT], [make_picture(0, (90, 90))])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_ID, -100)
    with prune(model, make_pruner("dcp", num_tokens=6)):
        model(**inputs, labels=labels).loss.backward()
    assert model.model.visual.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_one_token_an_image_is_enough(either: Qwen2VL) -> None:
    inputs = either.make_inputs([TWO], [make_picture(n, (60, 120)) for n in range(2)])
    short = prune_inputs(either.model, inputs, make_pruner("dcp", num_tokens=1))
    with torch.no_grad():
        assert either.model(**short.inputs).logits.isfinite().all()
    assert (short.tensors["input_ids"] == either.adapter.image_token_id).sum() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_grid_thw": None}, r"pixel_values came without image_grid_thw"),
        ({"image_grid_thw": torch.tensor([[1, 6, 8]])}, r"holds 36 patches, but image_grid_thw counts 48"),
        ({"image_grid_thw": torch.tensor([[1, 4, 9]])}, r"rows and columns are multiples of 2"),
        (
            {"image_grid_thw": torch.tensor([[0, 6, 6]])},
            r"image 0 has nothing to show, 0 frame\(s\) .* take it and its placeholders out",
        ),
    ],
)
def test_details_that_do_not_fit_are_refused(family: Qwen2VL, change: dict[str, Any], message: str) -> None:
    inputs = family.make_inputs([PROMPT], [make_picture(0, (90, 90))]) | change
    with pytest.raises(InvalidInputError, match=message):
        prune_inputs(family.model, inputs, make_pruner("random", num_tokens=6))


def test_images_side_by_side_are_refused_since_nobody_can_say_where_they_lie(family: Qwen2VL) -> None:
    inputs = family.make_inputs(["USER: <image> <image> what"], [make_picture(n, (90, 90)) for n in range(2)])
    with pytest.raises(InvalidInputError, match=r"stand in 1 run\(s\), but 2 belong to these images"):
        prune_inputs(family.model, inputs, make_pruner("random", num_tokens=6))


def test_tokens_of_a_video_are_kept_in_the_order_of_time_and_say_which_frame_they_show(videos: QwenVideos) -> None:
    clip = torch.full((3, 3, 84, 112), -0.5)
    clip[1, :, 28:56, 56:112] = 0.9
    (grid,) = [(3, 6, 8)]
    inputs = videos.make_inputs([PROMPT], [make_picture(0, (60, 60))])
    prompt = expand_placeholders([PROMPT], [videos.span(*grid)])
    types = {"mm_token_type_ids": videos.token_types(prompt["input_ids"])}
    inputs |= prompt | types | {"pixel_values_videos": cut_patches(clip), "video_grid_thw": torch.tensor([grid])}
    record = prune_inputs(blinded(videos), inputs, OddOnesPruner(num_tokens=2)).record
    assert record is not None
    assert record.modalities == ("video",)
    assert record.tiles(0).tolist() == [1, 1]
    torch.testing.assert_close(record.boxes(0), torch.tensor([[1 / 3, 0.5, 2 / 3, 0.75], [1 / 3, 0.75, 2 / 3, 1.0]]))
    every = prune_inputs(videos.model, inputs, make_pruner("random", num_tokens=9)).record
    assert every is not None
    assert every.tiles(0).tolist() == sorted(every.tiles(0).tolist())


def test_a_budget_is_for_a_video_or_for_each_of_its_frames(videos: QwenVideos) -> None:
    inputs = videos.make_inputs([TWO], [make_picture(0, (90, 90)), make_picture(1, (60, 120))])
    video, frame = (
        prune_inputs(videos.model, inputs, make_pruner("dcp", num_tokens=4, scope=scope)) for scope in ("image", "tile")
    )
    for short, expected in ((video, [4, 4]), (frame, [12, 8])):
        assert short.record is not None
        assert [after for _, after in short.record.tokens_per_image] == expected
        assert (short.tensors["input_ids"] == VIDEO_ID).sum() == sum(expected)
    assert frame.record is not None
    assert torch.bincount(frame.record.tiles(0)).tolist() == [4, 4, 4]


def test_time_is_as_far_apart_as_the_model_says() -> None:
    (slow,) = [family for family in VIDEOS if family.name == "qwen2_5_vl_videos"]
    inputs = slow.make_inputs([TWO], [make_picture(0, (90, 90)), make_picture(1, (60, 120))])
    layouts = slow.adapter.layouts(inputs)
    assert [layout.positions[:, 2].unique().tolist() for layout in layouts] == [[0, 3, 6], [0, 2]]
    del inputs["second_per_grid_ts"]
    assert [layout.positions[:, 2].max() for layout in slow.adapter.layouts(inputs)] == [4, 2]
    with pytest.raises(InvalidInputError, match=r"second_per_grid_ts is of 1 video\(s\), but 2 were given"):
        slow.adapter.layouts(inputs | {"second_per_grid_ts": [1.0]})


def test_times_of_frames_go_with_the_last_of_their_tokens() -> None:
    (told,) = [family for family in VIDEOS if isinstance(family, Qwen3VL)]
    inputs = told.make_inputs([PROMPT], [make_picture(0, (90, 90))])
    (layout,) = told.adapter.layouts(inputs)
    for frames in ([0], [1], [2], [0, 2], [1, 2]):
        kept = torch.tensor([16 * frame + 5 for frame in frames])
        short = prune_inputs(told.model, inputs, KeepPruner(num_tokens=len(frames), places=tuple(kept.tolist())))
        ids = short.tensors["input_ids"][0].tolist()
        text = [number for frame in frames for number in ([20 + frame, 11] if frame else []) + [START, VIDEO_ID, END]]
        assert ids == [1, 21, 20, 11, *text, 5, 6, 10, 22]
        whole = prune_inputs(
            told.model,
            inputs,
            KeepPruner(num_tokens=len(frames), places=tuple(kept.tolist())),
            keep_markers=True,
        )
        assert (whole.tensors["input_ids"] == START).sum() == layout.num_tiles


def test_images_and_videos_in_one_prompt(videos: QwenVideos) -> None:
    pair = next(family for family in IMAGES if family.kind is videos.kind)
    pictures = [make_picture(0, (90, 90)), make_picture(1, (60, 120))]
    image, video = pair.make_inputs(["<image> what"], pictures[:1]), videos.make_inputs(["<image> is"], pictures[1:])
    ids = torch.cat((image["input_ids"], video["input_ids"][:, 1:]), dim=1)
    both = {**image, **video, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    both["mm_token_type_ids"] = pair.token_types(ids)
    short = prune_inputs(videos.model, both, make_pruner("dcp", num_tokens=5))
    assert short.record is not None
    assert short.record.modalities == ("image", "video")
    assert [int((short.tensors["input_ids"] == token).sum()) for token in (IMAGE_ID, VIDEO_ID)] == [5, 5]
    assert short.columns is not None
    assert torch.equal(
        short.tensors["position_ids"][1:], true_axes(videos, both).gather(2, short.columns.expand(3, -1, -1))
    )
    with torch.no_grad():
        logits = videos.model(**short.inputs).logits
        answer = videos.model.generate(**short.inputs, max_new_tokens=2, num_beams=2)
    assert logits.isfinite().all()
    assert short.restore(answer).shape[1] == ids.shape[1] + 2


def test_a_video_without_frames_is_refused(videos: QwenVideos) -> None:
    inputs = videos.make_inputs([PROMPT], [make_picture(0, (60, 60))])
    inputs |= {"video_grid_thw": torch.tensor([[0, 6, 6]]), "pixel_values_videos": inputs["pixel_values_videos"][:0]}
    with pytest.raises(InvalidInputError, match=r"video 0 has nothing to show, 0 frame\(s\) .* take it and its"):
        prune_inputs(videos.model, inputs, make_pruner("random", num_tokens=6))


@dataclass(frozen=True, kw_only=True)
class EveryOther(EncoderStage):
    """Keeps every other token of what is left as it is."""

    num_tokens: int | None = 0

    def reduce(self, tokens: EncoderTokens) -> EncoderReduction:
        f, n, _ = tokens.features.shape
        kept = torch.arange(0, n, 2).expand(f, -1)
        slots = torch.arange(n).expand(f, -1)
        return EncoderReduction(tokens.features[:, ::2], kept, torch.where(slots % 2 == 0, slots // 2, -1))


def test_dropping_units_inside_the_encoder_is_what_masking_them_does(either: Qwen2VL) -> None:
    inputs = either.make_inputs([TWO], [make_picture(0, (90, 90)), make_picture(1, (90, 90))])
    pixels, grids = (inputs[name] for name in either.adapter.image_inputs[:2])
    with torch.no_grad():
        encoded = either.adapter.encode(inputs, (EveryOther(layer=0), EveryOther(layer=1)))
    size = encoded.layouts[0].tile_size
    dropped = torch.ones(2, size, dtype=torch.bool)  # behind the first and behind the second stage
    dropped[0, ::2], dropped[1, ::4] = False, False

    model = copy.deepcopy(either.model)
    tower = model.model.visual
    frames = int(grids[:, 0].sum())
    order = torch.arange(frames * size)
    if hasattr(tower, "fullatt_block_indexes"):
        order, _ = get_vision_window_index(grids, 2, tower.window_size, PATCH)
    seen = [0] * len(tower.blocks)

    def watch(module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, **rest: Any) -> Any:
        number = [block.attn for block in tower.blocks].index(module)
        span = slice(seen[number], seen[number] + query.shape[2])
        seen[number] = span.stop
        gone = dropped[min(number, 2) - 1].repeat(frames)[order].repeat_interleave(4)[span]
        logits = query @ key.mT * scaling
        if number:
            logits = logits.masked_fill(gone, torch.finfo(logits.dtype).min)
        return (logits.softmax(dim=-1) @ value).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("watching", watch)
    tower.config._attn_implementation = "watching"
    with torch.no_grad():
        own = model.model.get_image_features(pixels, grids)
    for image, features in enumerate(own.pooler_output):
        survivors = encoded.tokens.indices[image][encoded.tokens.mask[image]]
        assert torch.equal(survivors % size, torch.arange(0, size, 4).repeat(len(features) // size))
        torch.testing.assert_close(encoded.tokens.features[image], features[survivors], rtol=1e-4, atol=1e-4)
        for layer, expected in zip(encoded.deepstack, getattr(own, "deepstack_features", None) or [], strict=True):
            torch.testing.assert_close(layer[image, survivors], expected[image][survivors], rtol=1e-4, atol=1e-4)


def test_stages_see_units_in_raster_order_with_the_features_of_their_four_patches(family: Qwen2VL) -> None:
    seen: list[EncoderTokens] = []

    @dataclass(frozen=True, kw_only=True)
    class Look(EveryOther):
        requires: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION})

        def reduce(self, tokens: EncoderTokens) -> EncoderReduction:
            seen.append(tokens)
            return super().reduce(tokens)

    model = blinded(family)
    inputs = family.make_inputs([PROMPT], [make_spot((112, 168), (0.0, 0.0), 0.5)])
    adapter = get_adapter(model)
    with torch.no_grad():
        adapter.encode(inputs, (Look(layer=0), Look(layer=1)))
    first, second = seen
    assert first.features.shape == (1, 24, 4 * 64)
    assert first.positions[0].tolist() == [[row, col] for row in range(4) for col in range(6)]
    assert torch.equal(second.features, first.features[:, ::2]), "blind layers change nothing"
    odd = (first.features[0] - first.features[0, -1]).norm(dim=1) > 1e-3
    assert odd.nonzero().squeeze(1).tolist() == [0, 1, 2, 6, 7, 8]
    # Behind layer 0, Qwen2.5 has attended within windows, of which there are six; behind layer 1, to the frame.
    shares = [0.25 * (6 if hasattr(model.model.visual, "fullatt_block_indexes") else 1), 0.25]
    for tokens, share in zip(seen, shares, strict=True):
        assert tokens.cls_attention is not None
        torch.testing.assert_close(tokens.cls_attention.sum(), torch.tensor(share))


def test_images_of_one_size_but_other_sides_share_a_pass(family: Qwen2VL) -> None:
    pictures = [make_picture(0, (112, 140)), make_picture(1, (140, 112))]
    inputs = family.make_inputs([PROMPT, PROMPT], pictures)
    pruner = make_pruner("dcp_progressive", num_tokens=4)
    both = prune_inputs(family.model, inputs, pruner).record
    assert both is not None
    assert [layout.grid for layout in both.layouts] == [(4, 5), (5, 4)]
    for number, picture in enumerate(pictures):
        alone = prune_inputs(family.model, family.make_inputs([PROMPT], [picture]), pruner).record
        assert alone is not None
        assert torch.equal(both.indices[number], alone.indices[0])


def test_an_encoder_pass_with_stages_is_for_images_of_one_size(family: Qwen2VL) -> None:
    pruner = make_pruner("dcp_progressive", num_tokens=4)
    inputs = family.make_inputs([TWO], [make_picture(0, (90, 90)), make_picture(1, (60, 120))])
    pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
    with pytest.raises(InvalidInputError, match=r"images of 9, 15 tokens cannot share .* one size at a time"):
        encode_images(family.model, pixels, pruner, image_grid_thw=grids)
    one = encode_images(family.model, pixels[:36], pruner, image_grid_thw=grids[:1])
    assert one.stage_tokens
    assert one.tokens.features.shape[1] < 9


def test_stages_that_let_the_data_decide_are_refused(family: Qwen2VL) -> None:
    inputs = family.make_inputs([PROMPT], [make_picture(0, (90, 90))])
    with pytest.raises(InvalidInputError, match=r"a given number of tokens .* use another pruner"):
        family.adapter.encode(inputs, (EveryOther(layer=1, num_tokens=None),))
