"""What one call with images did."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcp_prune.integrations.stopwatch import Stopwatch
from dcp_prune.models import ImageLayout
from dcp_prune.pruners.base import Pruner


@dataclass(frozen=True, eq=False)
class PruneRecord:
    """What one call with images did.

    Attributes:
        pruner: the pruner that did it.
        modalities: what each is, `image` or `video`; below, `image` stands for either.
        layouts: where the original tokens of each image lie.
        prompt_before: columns of the original prompt, padding included.
        columns: column of the original prompt in each column of the short one, -1 for padding. `b m`.
        rows: batch row of each image. `i`.
        indices: ascending positions of the kept tokens among the original ones, which are the image's placeholders; -1
            behind the last where an image keeps fewer than another. `i k`.
        assignment: original token -> slot that absorbed it, -1 if it was dropped. `i n`.
        stats: what the pruner reported, e.g. `kappa` `i`.
        stage_stats: what each in-encoder stage reported, with a row per tile, of images before videos; where images
            differ in size, the stages of the smallest come first.
        watch: the running times; read them as `milliseconds`.
    """

    pruner: Pruner
    modalities: tuple[str, ...]
    layouts: tuple[ImageLayout, ...]
    prompt_before: int
    columns: Int[Tensor, "b m"]
    rows: Int[Tensor, " i"]
    indices: Int[Tensor, "i k"]
    assignment: Int[Tensor, "i n"]
    stats: Mapping[str, Tensor]
    stage_stats: tuple[Mapping[str, Tensor], ...]
    watch: Stopwatch

    @classmethod
    def idle(
        cls,
        pruner: Pruner,
        modalities: Sequence[str],
        layouts: Sequence[ImageLayout],
        width: int,
        rows: Int[Tensor, " i"],
        num_rows: int,
        watch: Stopwatch,
    ) -> Self:
        """The record of a call that removes nothing."""
        every = _every_token([len(layout) for layout in layouts], rows.device)
        columns = torch.arange(width, device=rows.device).expand(num_rows, width)
        return cls(pruner, tuple(modalities), tuple(layouts), width, columns, rows, every, every, {}, (), watch)

    def __repr__(self) -> str:
        """Five lines; what lies behind them are attributes."""
        each = [f"{after} of {before}" for before, after in self.tokens_per_image]
        shown = ", ".join(dict.fromkeys(each[:8])) + (", ..." if len(each) > 8 else "")
        kappa = "not measured" if self.kappa is None else ", ".join(f"{x:.3g}" for x in self.kappa[:8].tolist())
        times = ", ".join(f"{name} {value:.0f} ms" for name, value in self.milliseconds.items())
        kinds = " and ".join(f"{self.modalities.count(kind)} {kind}(s)" for kind in dict.fromkeys(self.modalities))
        return (
            f"PruneRecord of {kinds or 'no image'}\n"
            f"  pruner: {self.pruner}\n"
            f"  visual tokens: {shown or 'none'}; prompt: {self.prompt_after} of {self.prompt_before}\n"
            f"  kappa: {kappa}\n"
            f"  time: {times or 'not measured'}"
        )

    @property
    def tokens_before(self) -> int:
        """Placeholders of an image in the original prompt; of the largest image where they differ."""
        return max(map(len, self.layouts))

    @property
    def tokens_after(self) -> int:
        """Visual tokens that an image keeps; of the one that keeps most where they differ."""
        return self.indices.shape[1]

    @property
    def tokens_per_image(self) -> list[tuple[int, int]]:
        """Placeholders before and after, of each image."""
        after = (self.indices >= 0).sum(dim=1).tolist()
        return [(len(layout), kept) for layout, kept in zip(self.layouts, after, strict=True)]

    def boxes(self, image: int) -> Float[Tensor, "k 4"]:
        """Top, left, bottom and right edge of each kept token's patch, as shares of the picture that the model saw."""
        return self.layouts[image].boxes[self._kept(image)]

    def tiles(self, image: int) -> Int[Tensor, " k"]:
        """Which tile, or which frame of a video, each kept token comes from; -1 for a separator."""
        layout = self.layouts[image]
        return layout.source[self._kept(image)].div(layout.tile_size, rounding_mode="floor")

    def patches(self, image: int) -> Int[Tensor, " k"]:
        """Which patch of its tile or frame each kept token is, in raster order; -1 for a separator."""
        layout = self.layouts[image]
        source = layout.source[self._kept(image)]
        return torch.where(source < 0, source, source % layout.tile_size)

    def _kept(self, image: int) -> Int[Tensor, " k"]:
        kept = self.indices[image].cpu()
        return kept[kept >= 0]

    @property
    def prompt_after(self) -> int:
        """Columns of the short prompt, padding included: what prefill processes."""
        return self.columns.shape[1]

    @property
    def kappa(self) -> Float[Tensor, " i"] | None:
        """Run-time distribution shift of the kept tokens, if the pruner measures it."""
        return self.stats.get("kappa")

    @property
    def reselected(self) -> Bool[Tensor, " i"] | None:
        """Whether the shift was severe enough to choose again, if the pruner does such a thing."""
        return self.stats.get("reselected")

    @property
    def milliseconds(self) -> dict[str, float]:
        """Time spent in `encode` (vision encoder, projector), `select` (all choosing of tokens, inside the encoder and
        after it) and `prompt` (shortening the text side)."""
        return self.watch.milliseconds()


def _every_token(lengths: Sequence[int], device: torch.device) -> Int[Tensor, "i n"]:
    """0, 1, 2, ... for each image, -1 behind its last token."""
    count = torch.arange(max(lengths), device=device).expand(len(lengths), -1)
    return count.masked_fill(count >= torch.tensor(lengths, device=device).unsqueeze(1), -1)


def warn_if_nothing_was_pruned(record: PruneRecord | None) -> None:
    """A budget that is no smaller than the images is most likely a mistake."""
    if record is None or record.tokens_after < min(map(len, record.layouts)):
        return
    if all(kept >= length for length, kept in record.tokens_per_image):
        warnings.warn(
            f"nothing was pruned: {record.pruner} keeps all {record.tokens_before} visual tokens of an image; "
            "lower its budget",
            stacklevel=3,
        )
