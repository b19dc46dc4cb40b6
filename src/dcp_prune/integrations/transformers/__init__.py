"""Hugging Face transformers: `prune_inputs` makes a prompt with fewer visual tokens, `prune` does so on every call.

The whole text side is shortened before the model sees it, so that caches, masks, positions, beams and stopping inside
`generate` deal with one consistent short prompt; the caller gets back the ids that were passed in.
"""

from dcp_prune.integrations.transformers.handle import PruneHandle, get_handle, prune
from dcp_prune.integrations.transformers.images import (
    encode_images,
    encode_videos,
    encoder_stages,
    image_features_as_inputs,
    unpruned_features,
)
from dcp_prune.integrations.transformers.inputs import ShortInputs, prune_inputs
from dcp_prune.integrations.transformers.question import TextScope, embed_question
from dcp_prune.integrations.transformers.record import PruneRecord
from dcp_prune.models import EncodedImages, get_adapter, supported_architectures

__all__ = [
    "EncodedImages",
    "PruneHandle",
    "PruneRecord",
    "ShortInputs",
    "TextScope",
    "embed_question",
    "encode_images",
    "encode_videos",
    "encoder_stages",
    "get_adapter",
    "get_handle",
    "image_features_as_inputs",
    "prune",
    "prune_inputs",
    "supported_architectures",
    "unpruned_features",
]
