"""Video-LLaVA: images as in LLaVA-1.5, through a tower of their own. Its videos are not pruned yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dcp_prune.models.llava import LlavaAdapter
from dcp_prune.models.outputs import as_one_tensor


class VideoLlavaAdapter(LlavaAdapter):
    """All images of a call have the same number of tokens, which is what the model's `forward` asks for."""

    architecture = "VideoLlavaForConditionalGeneration"
    tower_name = "image_tower"
    image_inputs = ("pixel_values_images", "vision_feature_layer", "vision_feature_select_strategy")
    unpruned_inputs = ("pixel_values_videos",)

    def hand_over(
        self, features: Iterable[Float[Tensor, "k d"]], deepstack: Sequence[Iterable[Float[Tensor, "k d"]]] = ()
    ) -> BaseModelOutputWithPooling:
        return as_one_tensor(features)
