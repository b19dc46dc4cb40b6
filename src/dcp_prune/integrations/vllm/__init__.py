"""vLLM: any pruner with a fixed budget inside its engine, out of tree (entry point group `vllm.general_plugins`).

    vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides \
        '{"architectures": ["DcpLlavaForConditionalGeneration"], "dcp_prune": {"num_tokens": 16}}'

`dcp-prune vllm-args MODEL --num-tokens 16` prints that command. Models whose architecture is not overridden stay as
they are. No vLLM is imported before it calls `register`.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from dcp_prune.errors import UnsupportedModelError

ARCHITECTURES = {
    "LlavaForConditionalGeneration": "dcp_prune.integrations.vllm.llava:DcpLlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration": (
        "dcp_prune.integrations.vllm.llava_next:DcpLlavaNextForConditionalGeneration"
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "dcp_prune.integrations.vllm.qwen2_5_vl:DcpQwen2_5_VLForConditionalGeneration"
    ),
}
"""Architecture of a checkpoint -> `module:class` that serves it pruned; the class's name is the new architecture."""

MROPE_ARCHITECTURES = ("DcpQwen2_5_VLForConditionalGeneration",)
"""Of these, those whose positions have time, row and column."""


def pruned_architecture(architecture: str) -> str | None:
    """What `hf_overrides` has to name instead of a checkpoint's architecture; None if it cannot be pruned here."""
    target = ARCHITECTURES.get(architecture)
    return None if target is None else target.partition(":")[2]


def check_tower(tower: str) -> None:
    """Refuses vision towers that vLLM's LLaVA does not have.

    Args:
        tower: `model_type` of the config's `vision_config`.

    Raises:
        UnsupportedModelError: DINOv2.
    """
    if tower.startswith("dinov2"):
        raise UnsupportedModelError(
            f"the vision tower of this model is a {tower}, which vLLM's LLaVA does not have (it has CLIP, SigLIP and "
            "Pixtral); serve it with: dcp-prune serve"
        )


def register() -> None:
    """Makes the pruned architectures known to vLLM; called once or more in each of its processes.

    Raises:
        UnsupportedModelError: this vLLM is too old.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from dcp_prune.integrations.vllm._compat import check_version
    from dcp_prune.integrations.vllm.mrope import PrunesPositions

    check_version()
    known = set(ModelRegistry.get_supported_archs())
    for target in ARCHITECTURES.values():
        name = target.partition(":")[2]
        if name not in known:
            ModelRegistry.register_model(name, target)
    for architecture in MROPE_ARCHITECTURES:
        MODELS_CONFIG_MAP[architecture] = PrunesPositions
