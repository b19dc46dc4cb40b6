"""Adapters: the only place that knows a model architecture. Adapters know no pruner."""

from dcp_prune.models.base import (
    EncodedImages,
    ModelAdapter,
    Reduction,
    adapter_class,
    base_model,
    get_adapter,
    supported_architectures,
)
from dcp_prune.models.layout import ImageLayout, plain_layout
from dcp_prune.models.lookup import lookup_vectors

__all__ = [
    "EncodedImages",
    "ImageLayout",
    "ModelAdapter",
    "Reduction",
    "adapter_class",
    "base_model",
    "get_adapter",
    "lookup_vectors",
    "plain_layout",
    "supported_architectures",
]
