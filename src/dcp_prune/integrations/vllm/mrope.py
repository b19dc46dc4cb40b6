"""True M-RoPE positions of pruned images: each kept token stays where it was in the image, and the text behind it where
it would be behind all of the image.

vLLM gives a prompt its positions before its images are encoded. Those of text depend on the sizes of the images alone
and are final at once, whatever is cached. Those of kept tokens travel from the encoder as further columns of their
features, and are put in when the features are: by the interface that vLLM has for the pruning of videos.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from dcp_prune.errors import InvalidInputError, UnsupportedModelError

if TYPE_CHECKING:
    from dcp_prune.models import ImageLayout  # heavy, and every process of vLLM reads this file

BASE = 256
"""A coordinate is two columns, as 16 bits hold whole numbers to 256 only."""
COLUMNS = 4


class PrunesPositions(VerifyAndUpdateConfig):
    """Switches vLLM's pruning interface on, where an engine is set up."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raises:
        UnsupportedModelError: the engine is set up in a way that leaves positions wrong, in one sentence.
        """
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise UnsupportedModelError(
                "with --pipeline-parallel-size only the first stage learns where the kept visual tokens lie in the "
                "image; use --tensor-parallel-size or --data-parallel-size"
            )
        if vllm_config.speculative_config is not None:
            raise UnsupportedModelError(
                "--speculative-config asks for positions of visual tokens one step ahead of those that are kept; "
                "leave it out"
            )
        from vllm.platforms import current_platform

        vllm_config.model_config.multimodal_config.video_pruning_rate = 1e-6
        if current_platform.is_cpu() and vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = "dcp_prune.integrations.vllm.cpu_worker.PruningCPUWorker"


class TruePositions:
    """Stands in front of a stock model class with M-RoPE.

    Raises (at construction):
        UnsupportedModelError: vLLM would not ask for the positions.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if not vllm_config.model_config.multimodal_config.is_multimodal_pruning_enabled():
            raise UnsupportedModelError(
                "this vLLM does not ask where the kept visual tokens lie in the image; start it with "
                "--video-pruning-rate 1e-6"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]

    def hand_over(
        self, features: Float[Tensor, "k d"], indices: Int[Tensor, " k"], layout: ImageLayout
    ) -> Float[Tensor, "k e"]:
        """Features and where they lie in the image."""
        return add_columns(features, indices, layout.grid[1])

    def _postprocess_image_embeds_evs(
        self: Any, image_embeds_split: Sequence[Float[Tensor, "n d"]], image_input: Any
    ) -> tuple[Float[Tensor, "n e"], ...]:
        """The same for images that keep all of their tokens."""
        cols = (image_input["image_grid_thw"][:, 2] // self.visual.spatial_merge_size).tolist()
        return tuple(
            add_columns(features, torch.arange(len(features), device=features.device), width)
            for features, width in zip(image_embeds_split, cols, strict=True)
        )

    def get_mrope_input_positions(
        self: Any, input_tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> tuple[Int[Tensor, "3 l"], int]:
        """Final positions of text, the image's first for all of its tokens; and what is to be added to the number of a
        token behind the prompt."""
        positions = torch.arange(len(input_tokens))
        images = sorted(mm_features, key=lambda each: each.mm_position.offset)
        for image, (offset, _, rows, cols, _) in zip(images, self.iter_mm_grid_thw(images), strict=True):
            length = image.mm_position.length
            end = offset + length
            positions[end:] += max(rows, cols) - length
            positions[offset:end] = positions[offset].clone()
        return positions.repeat(3, 1), _beyond(positions)

    def recompute_mrope_positions(
        self: Any,
        input_ids: Any,
        multimodal_embeddings: Sequence[Float[Tensor, "k e"]],
        mrope_positions: Int[Tensor, "3 l"],
        num_computed_tokens: int,
    ) -> tuple[list[Float[Tensor, "k d"]], Int[Tensor, "3 l"], int]:
        """Puts in the positions of those kept tokens that are read in this step.

        Args:
            input_ids: of the whole prompt. `l`.
            multimodal_embeddings: of the images that this step reads, or of the parts of them that it reads.
            mrope_positions: of the whole prompt.
            num_computed_tokens: tokens of the prompt that were read before.

        Returns:
            Features without their columns, positions, and what `get_mrope_input_positions` gives behind them.
        """
        delta = _beyond(mrope_positions[0])
        if not multimodal_embeddings:
            return [], mrope_positions, delta
        device = mrope_positions.device
        ids = torch.as_tensor(input_ids, device=device)
        found = torch.cat([each[:, -COLUMNS:] for each in multimodal_embeddings]).to(device, torch.long).T
        coordinates = torch.stack((torch.zeros_like(found[0]), found[0] * BASE + found[1], found[2] * BASE + found[3]))
        places = torch.arange(len(ids), device=device)
        image = ids == self.config.image_token_id
        row = (image & (places >= num_computed_tokens)).cumsum(0) - 1
        now = image & (places >= num_computed_tokens) & (row < found.shape[1])
        before = torch.where(image, -1, places).cummax(0).values  # the last token in front of the image
        start = torch.where(before < 0, 0, mrope_positions[0, before.clamp(min=0)] + 1)
        moved = start + coordinates[:, row.clamp(0, found.shape[1] - 1)]
        return [each[:, :-COLUMNS] for each in multimodal_embeddings], torch.where(now, moved, mrope_positions), delta

    def embed_input_ids(self, input_ids: Tensor, multimodal_embeddings: Any = None, **kwargs: Any) -> Tensor:
        """As in the stock model.

        Raises:
            UnsupportedModelError: features come with their positions, so nobody has read these.
        """
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            width = self.config.get_text_config().hidden_size  # type: ignore[attr-defined]
            if multimodal_embeddings[0].shape[-1] != width:
                raise UnsupportedModelError(
                    "this worker does not ask where the kept visual tokens lie in the image; leave --worker-cls to its "
                    "default"
                )
        return super().embed_input_ids(input_ids, multimodal_embeddings, **kwargs)  # type: ignore[misc]


def add_columns(features: Float[Tensor, "k d"], indices: Int[Tensor, " k"], cols: int) -> Float[Tensor, "k e"]:
    """Features, and of each its row and column on a grid of so many columns, from its place in raster order."""
    row, col = indices // cols, indices % cols
    columns = torch.stack((row // BASE, row % BASE, col // BASE, col % BASE), dim=1)
    return torch.cat((features, columns.to(features)), dim=1)


def check_marks(prompt: Sequence[int], image_token_id: int) -> None:
    """Refuses images with nothing behind them, whose ends nobody could tell.

    Raises:
        InvalidInputError: there is one.
    """
    image = np.asarray(prompt) == image_token_id
    if (image & np.append(image[1:], True)).any():
        raise InvalidInputError(
            "an image placeholder is followed by another one or by nothing, so that its end cannot be told; put text "
            "or the model's mark for the end of an image behind it"
        )


def _beyond(positions: Int[Tensor, " l"]) -> int:
    """The position behind a prompt that ends in text, less that prompt's length."""
    return int(positions[-1]) + 1 - len(positions)
