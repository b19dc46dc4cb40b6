"""Video-LLaVA: images as in LLaVA-1.5, and videos of a few frames, each kind through a CLIP tower of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dcp_prune.models.base import EncodedImages
from dcp_prune.models.frames import FramesAdapter
from dcp_prune.models.layout import ImageLayout, frames_layout, with_separators
from dcp_prune.models.llava import LlavaAdapter
from dcp_prune.models.outputs import as_one_tensor
from dcp_prune.models.tower import Walk


class VideoLlavaAdapter(LlavaAdapter):
    """Images; the model drops their [CLS]."""

    architecture = "VideoLlavaForConditionalGeneration"
    tower_name = "image_tower"
    needs_cls = True
    image_inputs = ("pixel_values_images", "vision_feature_layer", "vision_feature_select_strategy")
    video_adapter = "VideoLlavaVideoAdapter"

    def hand_over(
        self, features: Iterable[Float[Tensor, "k d"]], deepstack: Sequence[Iterable[Float[Tensor, "k d"]]] = ()
    ) -> BaseModelOutputWithPooling:
        return as_one_tensor(features)


class VideoLlavaVideoAdapter(FramesAdapter, VideoLlavaAdapter):
    """Videos; the model puts the [CLS] of each frame in front of its patches.

    A budget counts patches, as everywhere, and [CLS] is never offered to a pruner: like a separator, it goes as soon as
    anything goes, and a video that the budget keeps whole keeps it (ours).
    """

    tower_name = "video_tower"

    def layout(self, frames: int, grid: tuple[int, int]) -> ImageLayout:
        plain = frames_layout(frames, *grid)
        return with_separators(plain, range(0, len(plain), plain.tile_size))

    def project(self, walk: Walk, layouts: Sequence[ImageLayout], with_encoder: bool) -> EncodedImages:
        assert walk.prefix is not None
        # Together, as the model does it: products of other shapes may round differently.
        features = self.model.model.multi_modal_projector(torch.cat((walk.prefix, walk.encoder.features), dim=1))
        return walk.encoded(features[:, 1:], layouts, with_encoder, separators=features[:, :1])
