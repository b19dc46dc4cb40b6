"""Qwen2.5-VL for vLLM, pruned: `DcpQwen2_5_VLForConditionalGeneration`."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from dcp_prune.errors import InvalidInputError, UnsupportedModelError
from dcp_prune.integrations.vllm.model import PrunedModel
from dcp_prune.integrations.vllm.mrope import TruePositions, check_marks
from dcp_prune.integrations.vllm.packed import PackedTowerView
from dcp_prune.integrations.vllm.processor import PrunedProcessingInfo, PrunedProcessor
from dcp_prune.models.qwen_vl import Qwen25VLAdapter


class DcpQwen25VLProcessingInfo(PrunedProcessingInfo, Qwen2_5_VLProcessingInfo):
    """Images only.

    Raises (when a prompt holds a video):
        InvalidInputError: in one sentence.
    """

    def count_tokens(self, size: Any, mm_kwargs: Mapping[str, object]) -> tuple[int, int]:
        processor = self.get_image_processor(**mm_kwargs)
        n = self.get_num_image_tokens(
            image_width=size.width, image_height=size.height, image_processor=processor, mm_kwargs=mm_kwargs
        )
        return n, n

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        if modality == "video" and num_items:
            raise InvalidInputError(
                "videos are not pruned in vLLM so far; send frames as images, or serve the model without pruning"
            )
        super().validate_num_items(modality, num_items)


class DcpQwen25VLProcessor(PrunedProcessor, Qwen2_5_VLMultiModalProcessor):
    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if any(token != self.image_token_id for token in inputs.prompt):  # vLLM measures images with nothing else
            check_marks(inputs.prompt, self.image_token_id)
        return super().apply(inputs, *args, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(
    DcpQwen25VLProcessor, info=DcpQwen25VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class DcpQwen2_5_VLForConditionalGeneration(TruePositions, PrunedModel, Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """Stock Qwen2.5-VL, whose tower is walked as `Qwen25VLAdapter` walks that of transformers."""

    def make_adapter(self) -> Qwen25VLAdapter:
        if self.vllm_config.compilation_config.compile_mm_encoder:
            raise UnsupportedModelError(
                "compile_mm_encoder compiles the vision encoder as one, and the pruner looks between its layers; leave "
                "it out of --compilation-config"
            )
        view = PackedTowerView(self.visual, self.config.vision_config)
        return Qwen25VLAdapter(SimpleNamespace(config=self.config, model=SimpleNamespace(visual=view)))
