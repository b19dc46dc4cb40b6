"""What an adapter tells an integration about a model, and how the adapter of a model is found."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcp_prune.errors import InvalidInputError, MissingSignalError, UnsupportedModelError, UnsupportedVersionError
from dcp_prune.models.layout import ImageLayout, tile_rows
from dcp_prune.tokens import EncoderReduction, EncoderTokens, Signal, VisualTokens

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

_ADAPTERS = {
    "Gemma3ForConditionalGeneration": "dcp_prune.models.gemma3:Gemma3Adapter",
    "Idefics3ForConditionalGeneration": "dcp_prune.models.idefics3:Idefics3Adapter",
    "InternVLForConditionalGeneration": "dcp_prune.models.internvl:InternVLAdapter",
    "LlavaForConditionalGeneration": "dcp_prune.models.llava:LlavaAdapter",
    "LlavaForConditionalGeneration(pixtral)": "dcp_prune.models.pixtral:PixtralAdapter",
    "LlavaNextForConditionalGeneration": "dcp_prune.models.llava_next:LlavaNextAdapter",
    "LlavaOnevisionForConditionalGeneration": "dcp_prune.models.llava_onevision:LlavaOnevisionAdapter",
    "Mistral3ForConditionalGeneration": "dcp_prune.models.mistral3:Mistral3Adapter",
    "PaliGemmaForConditionalGeneration": "dcp_prune.models.paligemma:PaliGemmaAdapter",
    "Qwen2VLForConditionalGeneration": "dcp_prune.models.qwen_vl:Qwen2VLAdapter",
    "Qwen2_5_VLForConditionalGeneration": "dcp_prune.models.qwen_vl:Qwen25VLAdapter",
    "Qwen3VLForConditionalGeneration": "dcp_prune.models.qwen_vl:Qwen3VLAdapter",
    "SmolVLMForConditionalGeneration": "dcp_prune.models.idefics3:SmolVLMAdapter",
    "VideoLlavaForConditionalGeneration": "dcp_prune.models.video_llava:VideoLlavaAdapter",
}
"""Name of the model's class -> `module:class` of its adapter, imported when a model asks for it; in brackets the model
type of the vision tower, where another one has an adapter of its own."""

ENTRY_POINT_GROUP = "dcp_prune.adapters"
"""Group in which another package lists its adapters: name of the model's class -> "module:Class"."""


Modality = Literal["image", "video"]


class Reduction(Protocol):
    """A stage inside the encoder as an adapter sees it; `pruners.base.EncoderStage` is one, without an import."""

    @property
    def layer(self) -> int: ...
    @property
    def num_tokens(self) -> int | None: ...

    requires: ClassVar[frozenset[Signal]]

    def reduce(self, tokens: EncoderTokens) -> EncoderReduction: ...


@dataclass(frozen=True)
class EncodedImages:
    """Images after one pass of the vision encoder and the projector, ready for any number of questions.

    Attributes:
        tokens: the visual tokens, one row per image, without a question.
        layouts: where the tokens of each image are; empty if it is unknown, and every image is then one tile.
        stages: the in-encoder reductions that were applied, to each tile by itself.
        stage_stats: what each stage reported, in the same order, with a row per tile.
        stage_tokens: tokens per tile that the layers after each stage computed, with padding, in the same order.
        deepstack: features that the language model adds to visual tokens behind its first layers, one tensor a layer,
            for each original token; empty for most models. `b N d`.
        separators: features of the separators of each image in the order of the prompt, zero behind its last; None
            where there are none, or all are `ModelAdapter.separator`. `b s d`.
        modality: whether the images are videos, frames of which are then tiles.
    """

    tokens: VisualTokens
    layouts: tuple[ImageLayout, ...] = ()
    stages: tuple[Reduction, ...] = ()
    stage_stats: tuple[Mapping[str, Tensor], ...] = ()
    stage_tokens: tuple[int, ...] = ()
    deepstack: tuple[Float[Tensor, "b N d"], ...] = ()
    separators: Float[Tensor, "b s d"] | None = None
    modality: Modality = "image"

    def select(self, images: Sequence[int] | Int[Tensor, " i"]) -> EncodedImages:
        """The images at these positions, in this order; repeat a position to ask several questions about one image."""
        index = torch.as_tensor(images, dtype=torch.long, device=self.tokens.features.device)
        chosen = index.tolist()
        tiles = torch.tensor(tile_rows(self.layouts, chosen), device=index.device) if self.layouts else index
        encoder, lengths = self.tokens.encoder, self.tokens.tile_lengths
        tokens = _take_rows(self.tokens, index)
        return replace(
            self,
            tokens=replace(
                tokens,
                encoder=None if encoder is None else _take_rows(encoder, index),
                tile_lengths=None if lengths is None else tuple(lengths[image] for image in chosen),
            ),
            layouts=tuple(self.layouts[image] for image in chosen) if self.layouts else (),
            deepstack=tuple(features[index] for features in self.deepstack),
            separators=None if self.separators is None else self.separators[index],
            stage_stats=tuple(
                {name: value[tiles] if value.ndim else value for name, value in stats.items()}
                for stats in self.stage_stats
            ),
        )


WITHOUT_CLS = frozenset({Signal.ENCODER_FEATURES, Signal.CLS_ATTENTION, Signal.KEYS, Signal.VALUES})
"""Signals of an encoder without [CLS]; attention that a token receives takes the place of what [CLS] pays to it."""


class ModelAdapter(ABC):
    """All that an integration needs to know about the images of one architecture; stateless, and built for each call.

    If a model has videos, another adapter, `video`, is responsible for them: to it, a video is an image and a frame is
    a tile.

    Raises (at construction):
        UnsupportedModelError: the model is of the right class but set up in a way that the adapter cannot prune.
    """

    architecture: ClassVar[str]
    """Name of the model's class."""
    modality: ClassVar[Modality] = "image"
    """What the model calls the things that this adapter encodes."""
    prunes_in_encoder: ClassVar[bool]
    """Whether tokens can be dropped between the layers of the encoder."""
    signals: frozenset[Signal] = WITHOUT_CLS
    """What the encoder can be asked for."""
    checks_candidates: ClassVar[bool] = True
    """Whether a pruned prompt gives the same answers when `generate` checks several candidate tokens at once."""
    why_not_in_encoder: ClassVar[str] = ""
    """What stands in the way, as a clause, where there is more to say."""
    saliency: str = "all tokens"
    """Whose attention `Signal.CLS_ATTENTION` is: `[CLS]`, or `all tokens` where there is none."""
    cuts_tiles: ClassVar[bool] = False
    """Whether an image is encoded as several tiles."""
    absent: ClassVar[Mapping[Signal, str]] = {
        Signal.CLIP_SIMILARITY: "it takes CLIP's text tower and projections, which such checkpoints do not hold",
        Signal.CLS_VALUE_AFFINITY: "its encoder has no [CLS] token",
    }
    """Why a signal is not among `signals`, as a clause, where there is more to say."""
    image_inputs: ClassVar[tuple[str, ...]]
    """Model inputs that describe images and disappear once the images are encoded; the first one holds the pixels."""
    image_details: ClassVar[tuple[str, ...]] = ()
    """Those of `image_inputs` that `layouts` reads beside the pixels; the others must agree with the model's config."""
    unpruned_inputs: ClassVar[tuple[str, ...]] = ()
    """Model inputs that hold visual tokens which nothing here prunes, such as videos; they are refused."""
    markers: ClassVar[bool] = False
    """Whether what stands in the prompt between the placeholders of one image only marks its rows or tiles, so that it
    can go with them."""
    tile_marks: tuple[int, int] | None = None
    """Ids of what opens and what closes a tile, where such text is about single tiles and goes only with one that loses
    all its tokens: what closes a tile is about the one before it, all else about the one behind it."""
    first_position: ClassVar[int] = 0
    """Where the position ids begin that this model's `forward` makes; those of `generate` begin at 0."""
    video_adapter: ClassVar[str | None] = None
    """Name of the class, in the module of this one, that prunes the videos of the same model; None if nothing does."""
    model: Any
    tower: Any
    """What walks the encoder, and so knows its `num_layers`."""

    @abstractmethod
    def __init__(self, model: Any) -> None: ...

    @classmethod
    def video_class(cls) -> type[ModelAdapter] | None:
        """What prunes the videos of the same models, for its flags; None if nothing does."""
        return None if cls.video_adapter is None else getattr(sys.modules[cls.__module__], cls.video_adapter)

    @property
    def video(self) -> ModelAdapter | None:
        """What prunes the videos of the same model; None if nothing does."""
        found = self.video_class()
        return None if found is None else found(self.model)

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder that stands for one visual token in the prompt."""
        return getattr(self.model.config, f"{self.modality}_token_id")

    @property
    def num_layers(self) -> int:
        """Encoder layers up to and including the one whose output becomes the features."""
        return self.tower.num_layers

    @abstractmethod
    def grid(self, pixel_values: Tensor | None = None) -> tuple[int, int]:
        """(rows, cols) of patches of such tiles; without tiles, of those that the model was built for, or of a usual
        image where it takes any size."""

    @abstractmethod
    def layouts(self, images: Mapping[str, Any]) -> list[ImageLayout]:
        """Where the tokens of each image are, from the pixels and `image_details`; no value is computed.

        Args:
            images: model inputs. Adapters whose pixels do not say which tiles make up an image read that from the
                prompt, `input_ids`; without a prompt, each tile is then an image.

        Raises:
            InvalidInputError: a detail is missing or does not fit the pixels.
        """

    def take(self, images: Mapping[str, Any], layouts: Sequence[ImageLayout], which: Sequence[int]) -> dict[str, Any]:
        """The pixels and details of some of the images."""
        index = list(which)
        found = {name: images[name] for name in (self.image_inputs[0], *self.image_details) if name in images}
        for name, value in found.items():
            if isinstance(value, Tensor) and value.shape[:1] == (len(layouts),):
                found[name] = value[index]
            elif isinstance(value, list | tuple) and len(value) == len(layouts):
                found[name] = [value[image] for image in index]
        return found

    def rope_positions(
        self,
        ids: Int[Tensor, "b l"],
        mask: Bool[Tensor, "b l"] | None,
        layouts: Mapping[str, Sequence[ImageLayout]],
        details: Mapping[str, Any],
    ) -> Int[Tensor, "p b l"] | None:
        """Where a whole prompt is along each axis of the language model's rotary embedding; None if positions just
        count tokens.

        Kept tokens keep their places. A prompt that continues another is placed as if it began at 0.

        Args:
            ids, mask: the prompt before anything is dropped.
            layouts: of its images and videos, by modality.
            details: their other inputs.
        """
        return None

    @property
    def rope_offset(self) -> Int[Tensor, "b 1"] | None:
        """What the model itself adds to the count of tokens in a cache to place the next one, if it remembers such a
        thing; set it before a call whose cache the model shall go on with."""
        return None

    @rope_offset.setter
    def rope_offset(self, offset: Int[Tensor, "b 1"]) -> None:
        raise NotImplementedError

    @property
    def separator(self) -> Float[Tensor, " d"] | None:
        """What stands between rows of patches in the unpruned prompt."""
        return None

    def check_signals(self, pruner: str, required: AbstractSet[Signal]) -> None:
        """Refuses a pruner whose signals no encoder pass will give; the question comes from the prompt.

        Raises:
            MissingSignalError: one of them is neither among `signals` nor the question.
        """
        missing = sorted(required - self.signals - {Signal.TEXT})
        if missing:
            why = "".join(f" ({self.absent[signal]})" for signal in missing if signal in self.absent)
            raise MissingSignalError(
                f"{pruner} needs {', '.join(missing)}, which {self.architecture} does not give{why}; "
                "choose another pruner"
            )

    def check_stages(self, stages: Sequence[Reduction]) -> tuple[Reduction, ...]:
        """The stages in the order of their layers.

        Raises:
            InvalidInputError: a stage sits at or past the feature layer, two stages share a layer, or tokens cannot be
                dropped inside this encoder.
        """
        if stages and not self.prunes_in_encoder:
            raise InvalidInputError(
                f"{self.architecture} cannot drop visual tokens inside its encoder{self.why_not_in_encoder}; "
                "use a pruner without such stages"
            )
        layers = sorted(stage.layer for stage in stages)
        if len(set(layers)) < len(layers):
            raise InvalidInputError(f"two encoder stages share a layer in {layers}; give each stage its own layer")
        last = self.num_layers - 1
        for layer in layers:
            if not 0 <= layer < last:
                raise InvalidInputError(
                    f"an encoder stage at layer {layer} is at or past the feature layer {last}, behind which no layer "
                    f"follows; use layers 0 to {last - 1}"
                )
        return tuple(sorted(stages, key=lambda stage: stage.layer))

    @abstractmethod
    def encode(
        self,
        images: Mapping[str, Any],
        stages: Sequence[Reduction] = (),
        signals: AbstractSet[Signal] = frozenset(),
        lap: Callable[[str], None] = lambda name: None,
        layouts: Sequence[ImageLayout] | None = None,
    ) -> EncodedImages:
        """Runs the encoder with its reductions, then the projector; captures the signals of the feature layer.

        Without stages, the features are bit-equal to those that the model itself would compute.

        Args:
            images: model inputs with the pixels of preprocessed images and their details.
            stages: in-encoder reductions, of each tile by itself.
            signals: what to capture at the feature layer.
            lap: told `encode` at the end of each stretch of encoding, `select` of capturing and reducing.
            layouts: of these images; needed where an image has several tiles.

        Raises:
            InvalidInputError: see `check_stages`.
        """

    @abstractmethod
    def hand_over(
        self, features: Iterable[Float[Tensor, "k d"]], deepstack: Sequence[Iterable[Float[Tensor, "k d"]]] = ()
    ) -> ModelOutput:
        """Each image's features in the form in which the model's `forward` takes `mm_encoder_outputs` of `modality`.

        Built anew on every call, since `generate` rewrites them in place for beams.

        Args:
            features: of the tokens that are left, image by image.
            deepstack: of the same tokens, for each layer of `EncodedImages.deepstack`.
        """


def supported_architectures() -> tuple[str, ...]:
    """Names of the model classes that have an adapter, built in or in another package; in brackets a vision tower that
    has one of its own."""
    return tuple(sorted({*_ADAPTERS, *_foreign_adapters()}))


def adapter_class(architecture: str) -> type[ModelAdapter]:
    """The adapter class for a name in `supported_architectures`. Built-in names go before those of entry points.

    Raises:
        UnsupportedModelError: the entry point of another package does not lead to an adapter.
    """
    target = _ADAPTERS.get(architecture) or _foreign_adapters()[architecture]
    module, _, attribute = target.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UnsupportedModelError(
            f"the adapter of {architecture} is registered as {target!r}, which cannot be imported: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, ModelAdapter)):
        raise UnsupportedModelError(
            f"the adapter of {architecture} is registered as {target!r}, which is not a subclass of ModelAdapter; "
            f"correct the entry point {ENTRY_POINT_GROUP!r} of its package"
        )
    return found


@cache
def _foreign_adapters() -> Mapping[str, str]:
    """Those of other packages, read once, since it takes a while and every call asks for an adapter."""
    return {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}


def base_model(model: Any) -> Any:
    """The model of transformers inside a `PeftModel`, whose calls go through it; any other model itself."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def get_adapter(model: Any) -> ModelAdapter:
    """The adapter of a loaded model, by the name of its class or of a parent class, and by its vision tower.

    Raises:
        UnsupportedModelError: no adapter, an encoder-decoder model, tensor parallelism, or settings that the adapter
            cannot prune.
        UnsupportedVersionError: this version of transformers takes no features.
    """
    model = base_model(model)
    names = [cls.__name__ for cls in type(model).__mro__]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{names[0]} is an encoder-decoder model, whose decoder reads images by cross-attention, not as prompt "
            f"tokens that could be dropped; use one of: {', '.join(supported_architectures())}"
        )
    tower = getattr(getattr(getattr(model, "config", None), "vision_config", None), "model_type", None)
    candidates = (name for each in names for name in (f"{each}({tower})", each))
    architecture = next((name for name in candidates if name in _ADAPTERS or name in _foreign_adapters()), None)
    if architecture is None:
        raise UnsupportedModelError(_no_adapter(model, names[0]))
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise UnsupportedModelError(
            f"{names[0]} is sharded by tensor parallelism, where each rank holds only some attention heads; "
            "load it without tp_plan (device_map='auto' works)"
        )
    if not _takes_features(type(model)):
        raise UnsupportedVersionError(
            f"{names[0]} of the installed transformers takes no mm_encoder_outputs, the argument that hands over "
            "pruned features; install transformers 5.19 or later, below 6"
        )
    return adapter_class(architecture)(model)


@functools.cache
def _takes_features(cls: type) -> bool:
    return "mm_encoder_outputs" in inspect.signature(cls.forward).parameters


def read_parameter(module: Any, name: str) -> Tensor:
    """A parameter that belongs to `module` itself, fetched if accelerate keeps it offloaded outside of a call."""
    if not getattr(module, name).is_meta:
        return getattr(module, name)
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return getattr(module, name).detach()


def _no_adapter(model: Any, name: str) -> str:
    inner = getattr(model, "_orig_mod", None)
    if inner is not None:
        return f"{name} wraps a {type(inner).__name__}; attach to that model first and compile it afterwards"
    inner = getattr(model, "module", None)
    if inner is not None:
        return f"{name} wraps a {type(inner).__name__}; attach to that model, which is its attribute `module`"
    supported = supported_architectures()
    near = difflib.get_close_matches(name, supported, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    return (
        f"{name} has no adapter for visual-token pruning; supported: {', '.join(supported)}{hint}; "
        "docs/how-to/add-a-model.md says how to write one"
    )


def _take_rows(tokens: Any, index: Int[Tensor, " i"]) -> Any:
    """A tokens dataclass with every tensor indexed along its batch dimension."""
    taken: dict[str, Collection[Any] | Tensor] = {
        field.name: value[index] for field in fields(tokens) if isinstance(value := getattr(tokens, field.name), Tensor)
    }
    return replace(tokens, **taken)
