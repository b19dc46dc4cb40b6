"""Videos whose frames go through the tower one by one: to an adapter a video is an image, and a frame is a tile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dcp_prune.errors import InvalidInputError
from dcp_prune.models.layout import ImageLayout, frames_layout
from dcp_prune.models.llava import LlavaAdapter
from dcp_prune.models.outputs import as_one_tensor


class FramesAdapter(LlavaAdapter):
    """What the adapters of videos share; the family's adapter of images is the second parent.

    Videos come as one tensor, `v f c y x`, or as a list of tensors `f c y x`, whose numbers of frames may differ. The
    model itself takes no such list: its videos have to be pruned.
    """

    modality = "video"
    cuts_tiles = True
    video_adapter = None
    image_inputs = ("pixel_values_videos", "vision_feature_layer", "vision_feature_select_strategy")
    image_details = ()

    def layouts(self, images: Mapping[str, Any]) -> list[ImageLayout]:
        videos = images["pixel_values_videos"]
        shapes = [tuple(video.shape) for video in videos]
        if any(len(shape) != 4 or shape[1:] != shapes[0][1:] for shape in shapes):
            raise InvalidInputError(
                f"{self.architecture} takes pixel_values_videos as videos x frames x channels x rows x columns, all of "
                f"the same size, got videos of shapes {', '.join(map(str, dict.fromkeys(shapes)))}; make them with the "
                "model's processor"
            )
        counts = [shape[0] for shape in shapes]
        if 0 in counts:
            raise InvalidInputError(
                f"video {counts.index(0)} has zero frames, so there is nothing to see; pass at least one frame, or "
                "leave the video and its placeholders out"
            )
        made = {count: self.layout(count, self.grid(videos[0])) for count in set(counts)}
        return [made[count] for count in counts]

    def layout(self, frames: int, grid: tuple[int, int]) -> ImageLayout:
        """The placeholders of a video.

        Args:
            frames: at least one.
            grid: (rows, cols) of patches of a frame.
        """
        return frames_layout(frames, *grid)

    def stack_tiles(self, pixel_values: Any, layouts: Sequence[ImageLayout]) -> Float[Tensor, "t c y x"]:
        return torch.cat(list(pixel_values))

    def hand_over(
        self, features: Iterable[Float[Tensor, "k d"]], deepstack: Sequence[Iterable[Float[Tensor, "k d"]]] = ()
    ) -> BaseModelOutputWithPooling:
        return as_one_tensor(features)
