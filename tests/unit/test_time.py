"""Tokens of videos have three coordinates: what pruners make of the time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_dcp import SIDE, D, N, on_thing, scene

from dcp_prune import DCPPruner, InvalidInputError, UniformPruner, VisualTokens, make_pruner
from dcp_prune.functional.graph import context_to_anchor_graph
from dcp_prune.functional.similarity import in_patches
from dcp_prune.models.layout import frames_layout, plain_layout, with_separators


def blank_video(frames: int, rows: int, cols: int, step: float = 1.0) -> VisualTokens:
    layout = frames_layout(frames, rows, cols, step=step)
    tokens = VisualTokens.from_features(torch.ones(1, len(layout), 2))
    return replace(tokens, positions=layout.positions.unsqueeze(0))


def distances(places: torch.Tensor, time_weight: float) -> list[float]:
    """Of all places from the first."""
    places = in_patches(places, time_weight)
    return torch.cdist(places, places)[0, 0].tolist()


def test_a_step_in_time_counts_as_so_many_patches():
    places = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 2.0]]])
    assert distances(places, 2.5) == [0, 3, 5]
    assert distances(places, 0.0) == [0, 3, 0]
    assert torch.equal(in_patches(places[..., :2], 2.5), places[..., :2])


def test_contexts_go_to_the_anchor_of_their_own_frame_where_anchors_look_alike():
    layout = frames_layout(2, 2, 2)
    features = torch.ones(1, 8, 3)
    anchors = torch.tensor([[0, 4]])  # the same place in both frames
    graph = context_to_anchor_graph(features, layout.positions.unsqueeze(0), anchors, neighbours=1, sigma=1.0)
    assert graph.contexts.tolist() == [[1, 2, 3, 5, 6, 7]]
    assert graph.slots.squeeze(2).tolist() == [[0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(("time_weight", "frames_with_the_thing"), [(0.0, 1), (40.0, 2)])
def test_what_is_asked_for_has_a_token_in_every_frame_that_is_far_enough_away(time_weight, frames_with_the_thing):
    still = scene(3, b=1, asked=(2,))
    features = still.features.repeat(1, 2, 1)
    video = replace(
        VisualTokens.from_features(features, cls_attention=torch.full((1, 2 * N), 1 / N), text=still.text),
        positions=frames_layout(2, SIDE, SIDE).positions.unsqueeze(0),
    )
    pruner = make_pruner("dcp", num_tokens=4, time_weight=time_weight, confidence_margin=-4.0, reselect_members=False)
    kept = pruner(video).indices
    assert features.shape == (1, 2 * N, D)
    on_it = [on_thing(kept - N * frame, 2)[0] for frame in range(2)]
    assert sum(count > 0 for count in on_it) == frames_with_the_thing


def test_a_weight_of_time_below_zero_is_refused():
    with pytest.raises(InvalidInputError, match=r"time_weight must be a number of at least 0, got -1\.0"):
        DCPPruner(num_tokens=4, time_weight=-1.0)


@pytest.mark.parametrize("step", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("frames", "k"), [(8, 16), (8, 20), (8, 3), (3, 47), (1, 9), (5, 1)])
def test_uniform_gives_every_frame_its_share(frames, k, step):
    kept = UniformPruner(num_tokens=k)(blank_video(frames, 4, 4, step)).indices[0]
    counts = torch.bincount(kept // 16, minlength=frames)
    assert counts.sum() == k
    assert counts.max() - counts.min() <= 1


def test_uniform_spreads_the_points_of_a_frame_and_those_of_all_frames():
    kept = UniformPruner(num_tokens=64)(blank_video(8, 8, 8)).indices[0]
    assert sorted((kept % 64).tolist()) == list(range(64)), "all frames together cover every place"
    for frame in range(8):
        places = kept[kept // 64 == frame] % 64
        assert len((places // 8).unique()) == len((places % 8).unique()) == 8, "no two in a row or column"


def test_uniform_treats_a_single_frame_as_a_picture():
    picture = VisualTokens.from_features(torch.ones(1, 24, 2), grid=(4, 6))
    film = blank_video(1, 4, 6)
    for k in (1, 5, 12, 23):
        both = [UniformPruner(num_tokens=k)(tokens).indices for tokens in (picture, film)]
        assert torch.equal(*both)


def test_separators_stand_where_they_are_put_and_have_no_area():
    layout = with_separators(frames_layout(2, 1, 2), [0, 2, 4])
    assert layout.source.tolist() == [-1, 0, 1, -1, 2, 3, -1]
    assert layout.tile_lengths == (2, 2)
    assert layout.positions[layout.source >= 0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]]
    areas = (layout.boxes[:, 2:] - layout.boxes[:, :2]).prod(dim=1)
    assert (areas > 0).tolist() == (layout.source >= 0).tolist()
    assert torch.equal(layout.boxes[layout.source >= 0], plain_layout(1, 2).boxes.repeat(2, 1))
