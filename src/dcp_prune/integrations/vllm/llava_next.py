"""LLaVA-NeXT (LLaVA-1.6) for vLLM, pruned: `DcpLlavaNextForConditionalGeneration`."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from dcp_prune.integrations.vllm.model import PrunedModel, with_tower_names
from dcp_prune.integrations.vllm.processor import PrunedProcessingInfo, PrunedProcessor
from dcp_prune.integrations.vllm.tower import view_tower
from dcp_prune.models.llava_next import LlavaNextAdapter


class DcpLlavaNextProcessingInfo(PrunedProcessingInfo, LlavaNextProcessingInfo):
    """Newlines behind the rows of an image are no tokens that a pruner may choose."""

    def count_tokens(self, size: Any, mm_kwargs: Mapping[str, object]) -> tuple[int, int]:
        n, _ = super().count_tokens(size, mm_kwargs)
        encoder = self.get_vision_encoder_info()
        tile = encoder.get_image_size()
        down, across = get_anyres_image_grid_shape(
            (size.height, size.width), self.get_hf_config().image_grid_pinpoints, tile
        )
        _, newlines = self._get_num_unpadded_features(
            original_height=size.height,
            original_width=size.width,
            npatches=encoder.get_patch_grid_length(),
            num_patch_height=down,
            num_patch_width=across,
        )
        return n, n - newlines


class DcpLlavaNextProcessor(PrunedProcessor, LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    DcpLlavaNextProcessor, info=DcpLlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class DcpLlavaNextForConditionalGeneration(PrunedModel, LlavaNextForConditionalGeneration):
    """Stock LLaVA-NeXT, whose CLIP tower is walked as `LlavaNextAdapter` walks that of transformers: tile by tile, and
    the budget of an image is for all of its tiles together."""

    def make_adapter(self) -> LlavaNextAdapter:
        inner = SimpleNamespace(
            vision_tower=view_tower(self),
            multi_modal_projector=self.multi_modal_projector,
            image_newline=self.image_newline,
            # Reads nothing but the config; vLLM packs features by a function of its own, which takes no numbers.
            pack_image_features=partial(
                LlavaNextModel.pack_image_features,
                SimpleNamespace(config=self.config),  # type: ignore[arg-type]
            ),
        )
        return LlavaNextAdapter(SimpleNamespace(config=self.config, model=inner))

    def image_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """One tensor of tiles an image; images of one prompt are padded to as many tiles."""
        return {"pixel_values": list(inputs["pixel_values"]), "image_sizes": inputs.get("image_sizes")}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(with_tower_names(weights))
