"""Videos whose frames go through the tower one by one: where and when kept tokens lie, [CLS], newlines, bad input."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    FAMILIES,
    IMAGE_ID,
    VIDEO_ID,
    Family,
    LlavaOnevision,
    OddOnesPruner,
    OnevisionVideos,
    VideoLlava,
    VideoLlavaVideos,
    make_picture,
    make_video,
    share_of_spot,
    video_inputs,
)
from torch import Tensor

from dcp_prune import DCPPruner
from dcp_prune.errors import InvalidInputError, UnsupportedModelError
from dcp_prune.integrations.transformers import encode_images, encode_videos, prune, prune_inputs
from dcp_prune.models import get_adapter
from dcp_prune.registry import list_pruners, make_pruner

VIDEOS = [family for family in FAMILIES if isinstance(family, VideoLlavaVideos | OnevisionVideos)]
PROMPT = "USER: <image> what is this ASSISTANT:"


@pytest.fixture(params=VIDEOS, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Any:
    return request.param


def inputs_of(family: Any, *videos: Tensor) -> dict[str, Any]:
    """A prompt for each video `f c y x`."""
    return video_inputs([PROMPT] * len(videos), videos, [family.length(len(video)) for video in videos])


def moving_spot(family: Any, corners: list[tuple[float, float]], extent: float) -> Tensor:
    """A plain video with one square that differs; its corner in each frame is a share of the frame's sides."""
    side = family.model.config.vision_config.image_size
    video = torch.full((len(corners), 3, side, side), -0.5)
    for frame, (row, col) in zip(video, corners, strict=True):
        frame[0, int(row * side) : int((row + extent) * side), int(col * side) : int((col + extent) * side)] = 1.0
    return video


def blinded(family: Family) -> Any:
    """Whose tokens know the pixels of their own patch and nothing else."""
    model = copy.deepcopy(family.model)
    name = "video_tower" if hasattr(model.model, "video_tower") else "vision_tower"
    tower = getattr(model.model, name)
    tower.embeddings.position_embedding.weight.data.zero_()
    for layer in tower.encoder.layers:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            linear.weight.data.zero_()
            linear.bias.data.zero_()
    return model


def test_kept_tokens_lie_where_and_when_the_pattern_moves(family: Any) -> None:
    rows, cols = family.adapter.layouts(inputs_of(family, moving_spot(family, [(0.0, 0.0)], 0.1)))[0].grid
    path = [(0, 0), (1, 2), (2, 1), (0, 2)]
    corners = [(row / rows, col / cols) for row, col in path]
    extent = 1 / rows
    video = moving_spot(family, corners, extent)
    video[2] = -0.5  # the pattern is gone for the time of a frame
    record = prune_inputs(blinded(family), inputs_of(family, video), OddOnesPruner(num_tokens=3)).record
    assert record is not None
    assert record.modalities == ("video",)
    assert record.tiles(0).tolist() == [0, 1, 3]
    for box, frame, patch in zip(record.boxes(0), record.tiles(0).tolist(), record.patches(0).tolist(), strict=True):
        assert share_of_spot(box.unsqueeze(0), corners[frame], extent) > 0.9
        assert divmod(patch, cols) == path[frame]


@pytest.mark.parametrize("name", list_pruners())
@pytest.mark.parametrize("scope", ["image", "tile"])
def test_tokens_are_kept_in_the_order_of_time(family: Any, name: str, scope: str) -> None:
    pruner = make_pruner(name, num_tokens=4, scope=scope)
    refused = pruner.requires - family.adapter.signals - {"text"}
    if refused or (pruner.encoder_stages(576, 24) and not family.adapter.prunes_in_encoder):
        pytest.skip("refused: the claims of all families say so")
    inputs = inputs_of(family, make_video(make_picture(0, (90, 90)), family.side))
    record = prune_inputs(family.model, inputs, pruner).record
    assert record is not None
    frames = record.tiles(0)
    assert frames.tolist() == frames.sort().values.tolist()
    assert (frames >= 0).all(), "neither [CLS] of a frame nor the newline is kept"
    counts = torch.bincount(frames, minlength=3).tolist()
    assert counts == [4, 4, 4] if scope == "tile" else sum(counts) == 4


def test_a_video_that_the_budget_keeps_whole_is_as_the_model_makes_it_beside_one_that_loses_tokens(family: Any) -> None:
    short, long = (make_video(make_picture(0, size), family.side) for size in ((60, 90), (90, 90)))
    inputs = inputs_of(family, short, long)
    patches = [sum(layout.tile_lengths) for layout in family.adapter.layouts(inputs)]
    pruned = prune_inputs(family.model, inputs, make_pruner("dcp", num_tokens=patches[0]))
    assert pruned.record is not None
    assert pruned.features is not None
    assert pruned.record.tokens_per_image == [(family.length(2), family.length(2)), (family.length(3), patches[0])]
    torch.testing.assert_close(pruned.features[0], family.own_features(inputs)[0], rtol=1e-5, atol=1e-4)
    assert -1 in pruned.record.tiles(0)
    assert -1 in pruned.record.patches(0)
    with torch.no_grad():
        together = family.model(**pruned.inputs).logits[:1, -1]
        alone = family.model(**inputs_of(family, short)).logits[:, -1]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ways", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_beams_know_which_video_is_theirs_where_videos_keep_different_numbers(
    family: Any, ways: dict[str, Any]
) -> None:
    videos = [make_video(make_picture(number, (90, 90)), family.side)[:count] for number, count in ((0, 2), (1, 3))]
    pruner = make_pruner("random", num_tokens=2 * family.cells)  # all of the first video
    generate = family.model.generate
    for seed in range(2):
        torch.manual_seed(seed)
        both = prune_inputs(family.model, inputs_of(family, *videos), pruner)
        ids = generate(**both.inputs, max_new_tokens=3, output_logits=True, return_dict_in_generate=True, **ways)
        for number, video in enumerate(videos):
            one = inputs_of(family, video)
            alone = one if number == 0 else prune_inputs(family.model, one, pruner).inputs
            own = generate(**alone, max_new_tokens=1, output_logits=True, return_dict_in_generate=True, num_beams=1)
            each = len(ids.logits[0]) // 2
            torch.testing.assert_close(
                ids.logits[0][each * number : each * (number + 1)],
                own.logits[0].expand(each, -1),
                rtol=1e-4,
                atol=1e-4,
            )


def test_stages_inside_the_encoder_see_frames_one_by_one() -> None:
    family = VideoLlavaVideos()
    video = make_video(make_picture(0, (90, 90)), family.side)
    pruner = make_pruner("dcp_progressive", num_tokens=6)
    together = prune_inputs(family.model, inputs_of(family, video), pruner).record
    assert together is not None
    assert [stats["kappa"].shape for stats in together.stage_stats] == [(3,)] * len(together.stage_stats)
    for frame in range(3):
        alone = prune_inputs(family.model, inputs_of(family, video[frame : frame + 1]), pruner).record
        assert alone is not None
        for stage, own in zip(together.stage_stats, alone.stage_stats, strict=True):
            torch.testing.assert_close(stage["kappa"][frame : frame + 1], own["kappa"])


def test_signals_of_a_cell_are_means_over_its_patches() -> None:
    class EvenVideos(OnevisionVideos):
        tile = side = 56

    family = EvenVideos()
    video = make_video(make_picture(0, (60, 90)), family.side)
    wanted = family.adapter.signals
    cells = family.adapter.encode({"pixel_values_videos": video[None]}, signals=wanted).tokens.encoder
    adapter: Any = get_adapter(family.model)
    frames = adapter.tower.walk(video, (), wanted, lambda name: None).encoder
    assert cells is not None
    for name in ("features", "cls_attention", "keys", "values"):
        patches = getattr(frames, name)
        means = patches.unflatten(1, (2, 2, 2, 2)).mean(dim=(2, 4)).flatten(1, 2).flatten(0, 1)
        torch.testing.assert_close(getattr(cells, name)[0], means)


def test_sdpa_and_eager_choose_the_same_tokens(family: Any) -> None:
    inputs = inputs_of(family, make_video(make_picture(0, (90, 90)), family.side))
    eager = copy.deepcopy(family.model)
    eager.set_attn_implementation("eager")
    for name in ("dcp", "visionzip", "dcp_progressive" if family.staged else "scope"):
        pruner = make_pruner(name, num_tokens=5)
        kept = [prune_inputs(model, inputs, pruner).record for model in (family.model, eager)]
        assert kept[0] is not None
        assert kept[1] is not None
        assert torch.equal(kept[0].indices, kept[1].indices)


def picture_and_video(family: Any, prompt: str) -> dict[str, Any]:
    """Both in a prompt of `<image>` and `<video>`."""
    images: Any = VideoLlava() if isinstance(family, VideoLlavaVideos) else LlavaOnevision()
    images.model = family.model
    images.tile = family.side
    picture = images.make_inputs(["<image>"], [make_picture(1, (60, 60))])
    video = inputs_of(family, make_video(make_picture(0, (90, 90)), family.side))
    runs = {
        "<image>": picture["input_ids"][0][picture["input_ids"][0] == IMAGE_ID],
        "<video>": video["input_ids"][0][video["input_ids"][0] == VIDEO_ID],
    }
    words = [runs.get(word, torch.tensor([20 + len(word)])) for word in prompt.split()]
    ids = torch.cat([torch.tensor([1]), *words]).unsqueeze(0)
    return {**picture, **video, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("prompt", ["<video> like <image> what", "what <image> then <video> where"])
@pytest.mark.parametrize("budget", [4, 30])
def test_images_and_videos_in_one_prompt_equal_the_full_prompt_with_the_dropped_columns_masked(
    family: Any, prompt: str, budget: int
) -> None:
    inputs = picture_and_video(family, prompt)
    short = prune_inputs(family.model, inputs, make_pruner("dcp", num_tokens=budget))
    record = short.record
    assert record is not None
    assert short.columns is not None
    assert short.features is not None
    assert record.modalities == ("image", "video")
    ids, columns = inputs["input_ids"], short.columns
    embeddings = family.model.get_input_embeddings()(ids).clone()
    for number, token in enumerate((IMAGE_ID, VIDEO_ID)):
        kept = record.indices[number][record.indices[number] >= 0]
        layout = record.layouts[number]
        assert len(kept) == (budget if budget < sum(layout.tile_lengths) else len(layout))
        places = (ids[0] == token).nonzero().squeeze(1)
        embeddings[0, places[kept]] = short.features[number, : len(kept)]
    mask = torch.zeros_like(ids).scatter(1, columns, 1)
    with torch.no_grad():
        logits = family.model(**short.inputs).logits
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        full = family.model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[0], full[0, columns[0]], rtol=1e-5, atol=1e-5)
    answer = family.model.generate(**short.inputs, max_new_tokens=2, num_beams=2)
    assert short.restore(answer).shape[1] == ids.shape[1] + 2


def test_one_encoder_pass_serves_many_questions_about_videos(family: Any) -> None:
    videos = [make_video(make_picture(number, (90, 90)), family.side)[:count] for number, count in ((0, 2), (1, 3))]
    pruner = make_pruner("dcp", num_tokens=5)
    encoded = encode_videos(family.model, videos, pruner)
    swapped = inputs_of(family, *videos[::-1])
    pixels = swapped.pop("pixel_values_videos")
    shared = prune_inputs(family.model, swapped, pruner, encoded=encoded.select([1, 0])).record
    direct = prune_inputs(family.model, swapped | {"pixel_values_videos": pixels}, pruner).record
    assert shared is not None
    assert direct is not None
    assert shared.modalities == ("video", "video")
    assert torch.equal(shared.indices, direct.indices)
    whole = make_pruner("dcp", num_tokens=2 * family.cells)
    kept = prune_inputs(family.model, swapped, whole, encoded=encoded.select([1, 0]))
    assert kept.features is not None
    own = family.own_features({"pixel_values_videos": videos[:1]})[0]
    torch.testing.assert_close(kept.features[1, : len(own)], own, rtol=1e-5, atol=1e-4)


def test_videos_of_packed_towers_are_encoded_once_with_what_describes_them() -> None:
    (qwen,) = (family for family in FAMILIES if family.name == "qwen3_vl_videos")
    inputs = qwen.make_inputs([PROMPT, PROMPT], [make_picture(number, (90, 90)) for number in range(2)])
    pruner = make_pruner("dcp", num_tokens=5)
    pixels, grids = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    encoded = encode_videos(qwen.model, pixels, pruner, video_grid_thw=grids)
    shared, direct = (prune_inputs(qwen.model, inputs, pruner, encoded=given).record for given in (encoded, None))
    assert shared is not None
    assert direct is not None
    assert torch.equal(shared.indices, direct.indices)


def test_videos_of_one_batch_keep_as_many_tokens_as_each_of_them_needs(family: Any) -> None:
    still = make_video(make_picture(0, (90, 90)), family.side)[:1].expand(3, -1, -1, -1)
    inputs = inputs_of(family, still, make_video(make_picture(1, (90, 90)), family.side))
    pruner = DCPPruner(num_tokens=(2, 24), max_distance=0.3)
    short = prune_inputs(family.model, inputs, pruner)
    assert short.record is not None
    (_, few), (_, many) = short.record.tokens_per_image
    assert 2 <= few < many <= 24
    with torch.no_grad():
        together = family.model(**short.inputs).logits[:, -1]
        alone = family.model(**prune_inputs(family.model, inputs_of(family, still), pruner).inputs).logits[:, -1]
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


def test_a_video_of_a_later_turn_is_pruned_on_the_cache(family: Any) -> None:
    model = copy.deepcopy(family.model)
    first, second = (make_video(make_picture(number, (60, 90)), family.side) for number in range(2))
    turn = inputs_of(family, first)
    model.generation_config.suppress_tokens = [IMAGE_ID, VIDEO_ID]
    with prune(model, make_pruner("random", num_tokens=5)) as handle:
        one = model.generate(**turn, max_new_tokens=2, return_dict_in_generate=True)
        more = inputs_of(family, second)["input_ids"]
        ids = torch.cat((one.sequences, more), dim=1)
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        both["pixel_values_videos"] = torch.stack((first, second))
        cached = model.generate(**both, past_key_values=one.past_key_values, max_new_tokens=2)
        assert handle.last is not None
        assert len(handle.last.indices) == 1, "the first one is in the cache"
        scratch = model.generate(**both, max_new_tokens=2)
    assert torch.equal(cached, scratch)


def test_the_pages_python_runs(family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "how-to" / "video.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {
        "model": copy.deepcopy(family.model),
        "processor": None,
        "inputs": inputs_of(family, make_video(make_picture(0, (90, 90)), family.side)),
        "frames": [make_picture(number, (family.side, family.side)) for number in range(3)],
    }
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    assert (tmp_path / "film.png").stat().st_size > 0
    assert torch.equal(names["short"].record.indices, names["record"].indices)


def test_a_video_of_one_frame_is_a_video(family: Any) -> None:
    video = make_video(make_picture(0, (90, 90)), family.side)[:1]
    record = prune_inputs(family.model, inputs_of(family, video), make_pruner("uniform", num_tokens=4)).record
    assert record is not None
    assert record.tokens_per_image == [(family.length(1), 4)]
    assert record.tiles(0).tolist() == [0] * 4


def test_a_video_without_frames_is_refused(family: Any) -> None:
    side = family.side
    inputs = inputs_of(family, torch.zeros(2, 3, side, side))
    empty = [torch.zeros(2, 3, side, side), torch.zeros(0, 3, side, side)]
    with pytest.raises(InvalidInputError, match=r"video 1 has zero frames, so there is nothing to see; pass at least"):
        prune_inputs(family.model, inputs | {"pixel_values_videos": empty}, make_pruner("random", num_tokens=4))
    with pytest.raises(InvalidInputError, match=r"video 0 has zero frames"):
        encode_videos(family.model, empty[1][None])


@pytest.mark.parametrize(
    "pixels", [torch.zeros(2, 3, 70, 70), [torch.zeros(2, 3, 70, 70), torch.zeros(2, 3, 84, 84)]], ids=["4-D", "sizes"]
)
def test_pixels_that_are_no_videos_of_one_size_are_refused(family: Any, pixels: Any) -> None:
    inputs = inputs_of(family, make_video(make_picture(0, (60, 90)), family.side))
    with pytest.raises(InvalidInputError, match=r"as videos x frames x channels x rows x columns, all of the same"):
        prune_inputs(family.model, inputs | {"pixel_values_videos": pixels}, make_pruner("random", num_tokens=4))


def test_videos_without_placeholders_and_placeholders_without_videos_are_refused(family: Any) -> None:
    inputs = inputs_of(family, make_video(make_picture(0, (60, 90)), family.side))
    pruner = make_pruner("random", num_tokens=4)
    ids = inputs["input_ids"]
    with pytest.raises(InvalidInputError, match=r"1 video\(s\) came with a prompt that holds no video placeholder"):
        prune_inputs(family.model, inputs | {"input_ids": ids.masked_fill(ids == VIDEO_ID, 9)}, pruner)
    with pytest.raises(InvalidInputError, match=r"holds video placeholders, but no video came with it; pass pixel_v"):
        prune_inputs(family.model, {name: inputs[name] for name in ("input_ids", "attention_mask")}, pruner)
    with pytest.raises(InvalidInputError, match=r"video placeholders, no multiple of the \d+ visual tokens of each"):
        prune_inputs(family.model, inputs | {"input_ids": ids[:, :-6], "attention_mask": ids[:, :-6] > 0}, pruner)


def test_videos_of_a_model_that_has_none_cannot_be_encoded(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"videos of LlavaForConditionalGeneration cannot be pruned"):
        encode_videos(model, torch.zeros(1, 2, 3, 84, 84))


def test_encoded_images_do_not_stand_in_for_videos(family: Any) -> None:
    inputs = inputs_of(family, make_video(make_picture(0, (60, 90)), family.side))
    pruner = make_pruner("random", num_tokens=4)
    pixels = picture_and_video(family, "<image> <video>")
    names = ("pixel_values", "pixel_values_images")
    (name,) = [name for name in names if name in pixels]
    details = {"image_sizes": pixels["image_sizes"]} if "image_sizes" in pixels else {}
    encoded = encode_images(family.model, pixels[name], pruner, **details)
    bare = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(InvalidInputError, match=r"1 image\(s\) came with a prompt that holds no image|no video came"):
        prune_inputs(family.model, bare, pruner, encoded=encoded)
