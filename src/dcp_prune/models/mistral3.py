"""Mistral 3 (Small 3.1 and later): Pixtral's tower, whose patches a projector merges to one token per 2 x 2 cell."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from dcp_prune.models.pixtral import PixtralAdapter


class Mistral3Adapter(PixtralAdapter):
    """Signals of the encoder are means over the patches of a cell."""

    architecture = "Mistral3ForConditionalGeneration"
    why_not_in_encoder = ", whose projector merges whole cells of patches"
    image_inputs = ("pixel_values", "image_sizes", "vision_feature_layer")

    def project(self, hidden: Float[Tensor, "1 n v"], sizes: Sequence[tuple[int, int]]) -> Float[Tensor, "m d"]:
        return self.model.model.multi_modal_projector(hidden.squeeze(0), sizes)
