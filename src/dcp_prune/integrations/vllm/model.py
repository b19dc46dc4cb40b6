"""What every pruned model of vLLM has in common: what it refuses, and how its images are pruned."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank

from dcp_prune.errors import UnsupportedModelError
from dcp_prune.integrations.vllm.images import ImagePruner
from dcp_prune.integrations.vllm.metrics import Metrics
from dcp_prune.integrations.vllm.request import FIELD, from_inputs
from dcp_prune.integrations.vllm.settings import Settings
from dcp_prune.models import ImageLayout, ModelAdapter


class PrunedModel:
    """Stands in front of a stock model class; a family says which adapter walks its encoder.

    Raises (at construction):
        UnsupportedModelError: the engine is set up in a way that pruning cannot support.
    """

    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        settings = Settings.of(vllm_config.model_config.hf_config)
        images = vllm_config.model_config.multimodal_config.get_limit_per_prompt("image")
        metrics = Metrics.of_process() if get_tensor_model_parallel_rank() == 0 else None
        self.image_pruner = None
        if images:
            self.image_pruner = ImagePruner(settings, self.make_adapter(), self.embed_words, metrics, self.hand_over)

    def make_adapter(self) -> ModelAdapter:
        """What knows the vision encoder of this family."""
        raise NotImplementedError

    def image_inputs(self: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What describes the images of a batch, as the adapter takes it, out of what vLLM hands to the model."""
        adapter: ModelAdapter = self.image_pruner.adapter
        return {name: inputs.get(name) for name in (adapter.image_inputs[0], *adapter.image_details)}

    def hand_over(
        self, features: Float[Tensor, "k d"], indices: Int[Tensor, " k"], layout: ImageLayout
    ) -> Float[Tensor, "k e"]:
        """What vLLM gets of the kept tokens of an image, which lie at `indices` in it."""
        return features

    def embed_words(self: Any, ids: Tensor) -> Tensor:
        return self.language_model.embed_input_ids(ids)

    def embed_multimodal(self: Any, **kwargs: Any) -> Any:
        """The tokens of each image: all of them from the stock model where the request keeps them, else those that are
        kept. `image_embeds`, whose rows were checked with the prompt, pass as they are."""
        if self.image_pruner is None or kwargs.get(self.image_pruner.adapter.image_inputs[0]) is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        requests, images = from_inputs(kwargs), self.image_inputs(kwargs)
        layouts = self.image_pruner.adapter.layouts(images)
        whole = [request.num_tokens == len(layout) for request, layout in zip(requests, layouts, strict=True)]
        if all(whole):
            stock = {name: value for name, value in kwargs.items() if name != FIELD}
            return super().embed_multimodal(**stock)  # type: ignore[misc]
        parts = [[image for image, own in enumerate(whole) if own == which] for which in (True, False)]
        unpruned, pruned = (self.image_pruner.adapter.take(images, layouts, part) for part in parts)
        all_tokens = iter(super().embed_multimodal(**unpruned) if parts[0] else ())  # type: ignore[misc]
        kept = iter(
            self.image_pruner(pruned, [layouts[image] for image in parts[1]], [requests[image] for image in parts[1]])
        )
        return [next(all_tokens if own else kept) for own in whole]


def check_engine(vllm_config: Any) -> None:
    """Refuses what would go around the pruning or make it wrong.

    Raises:
        UnsupportedModelError: one sentence about it.
    """
    if getattr(vllm_config.compilation_config, "cudagraph_mm_encoder", False):
        raise UnsupportedModelError(
            "cudagraph_mm_encoder replays the vision encoder without the pruner; leave it out of --compilation-config"
        )
    if getattr(vllm_config.model_config.multimodal_config, "mm_encoder_only", False):
        raise UnsupportedModelError(
            "--mm-encoder-only leaves out the language model, whose word embeddings the pruner reads; serve the whole "
            "model"
        )
    if getattr(vllm_config.lora_config, "enable_tower_connector_lora", False):
        raise UnsupportedModelError(
            "--enable-tower-connector-lora counts the tokens of the vision encoder by those that are kept, which are "
            "fewer; use adapters of the language model only"
        )


def with_tower_names(weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """Weights of a CLIP tower as vLLM names them; transformers 5 saves them without `vision_model` in between."""
    for name, weight in weights:
        before, tower, after = name.partition("vision_tower.")
        yield (
            (f"{before}{tower}vision_model.{after}" if tower and not after.startswith("vision_model.") else name),
            weight,
        )
