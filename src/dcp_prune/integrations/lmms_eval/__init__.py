"""lmms-eval: any pruner on its benchmarks, as the plug-in model `dcp_llava_hf` (entry point group `lmms_eval.models`).

    lmms-eval --model dcp_llava_hf --model_args pretrained=llava-hf/llava-1.5-7b-hf,pruner=dcp,num_tokens=16 \
        --tasks gqa,mme,pope,scienceqa_img,textvqa_val --batch_size 8

Needs the extra `lmms-eval`. The model is in a module of its own, because lmms-eval calls `manifest` while it is being
imported itself.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "dcp_llava_hf"
"""What `lmms-eval --model` calls it."""


def manifest() -> ModelManifest:
    """What the entry point tells lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, simple_class_path=f"{__name__}.model.PrunedLlava")
