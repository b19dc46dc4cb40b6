"""Gemma 3: a SigLIP tower, a projector that averages cells of patches, and images that are read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from dcp_prune.models.base import EncodedImages, Reduction
from dcp_prune.models.layout import ImageLayout
from dcp_prune.models.paligemma import PaliGemmaAdapter
from dcp_prune.tokens import Signal


class Gemma3Adapter(PaliGemmaAdapter):
    """Signals of the encoder are means over the patches of a cell.

    Of pan and scan, the picture and each of its crops are images with a budget of their own: which crops belong to
    which picture is told by the words of the prompt alone.

    In layers with a sliding window, the window counts the tokens of the short prompt, and so reaches further back.
    """

    architecture = "Gemma3ForConditionalGeneration"
    prunes_in_encoder = False
    why_not_in_encoder = ", whose projector merges whole cells of patches"
    first_position = 0

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.tower = replace(self.tower, by_name=True)
        self.cell = model.model.multi_modal_projector.kernel_size
        """Side of a cell in patches."""

    def grid(self, pixel_values: Float[Tensor, "i c y x"] | None = None) -> tuple[int, int]:
        rows, cols = self.tower.grid(pixel_values)
        return rows // self.cell, cols // self.cell

    def encode(
        self,
        images: Mapping[str, Any],
        stages: Sequence[Reduction] = (),
        signals: AbstractSet[Signal] = frozenset(),
        lap: Callable[[str], None] = lambda name: None,
        layouts: Sequence[ImageLayout] | None = None,
    ) -> EncodedImages:
        layouts = self.layouts(images) if layouts is None else layouts
        walk = self.tower.walk(images["pixel_values"], self.check_stages(stages), signals, lap)
        features = self.model.model.multi_modal_projector(walk.normed(self.tower.module.post_layernorm))
        cells = walk.merged(self.tower.grid(images["pixel_values"]), self.cell)
        return cells.encoded(features, layouts, with_encoder=bool(signals))
