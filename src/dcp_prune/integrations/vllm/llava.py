"""LLaVA-1.5 for vLLM, pruned: `DcpLlavaForConditionalGeneration`."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from dcp_prune.integrations.vllm.model import PrunedModel, with_tower_names
from dcp_prune.integrations.vllm.processor import PrunedProcessingInfo, PrunedProcessor
from dcp_prune.integrations.vllm.tower import stack_pixels, view_tower
from dcp_prune.models.llava import LlavaAdapter


class DcpLlavaProcessingInfo(PrunedProcessingInfo, LlavaProcessingInfo):
    pass


class DcpLlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    DcpLlavaProcessor, info=DcpLlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class DcpLlavaForConditionalGeneration(PrunedModel, LlavaForConditionalGeneration):
    """Stock LLaVA, whose CLIP tower is walked as `LlavaAdapter` walks that of transformers."""

    def make_adapter(self) -> LlavaAdapter:
        inner = SimpleNamespace(vision_tower=view_tower(self), multi_modal_projector=self.multi_modal_projector)
        return LlavaAdapter(SimpleNamespace(config=self.config, model=inner))

    def image_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"pixel_values": stack_pixels(inputs["pixel_values"])}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(with_tower_names(weights))
