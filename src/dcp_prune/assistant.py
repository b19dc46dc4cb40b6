"""A vision-language model by name, to ask about one image with all visual tokens or with a few."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from dcp_prune.errors import InvalidInputError, UnsupportedModelError
from dcp_prune.eval.asking.runner import Answered, Question, Runner, Seen
from dcp_prune.eval.specs import ALL_TOKENS, Method
from dcp_prune.integrations.transformers import PruneRecord, supported_architectures
from dcp_prune.pruners.base import Pruner
from dcp_prune.testbed.load import CHECKPOINTS, DEFAULT_CHECKPOINT, checkpoint_path, load
from dcp_prune.testbed.worlds import world_of

TESTBED_MODELS = {f"testbed-{name}": name for name in CHECKPOINTS} | {"testbed": DEFAULT_CHECKPOINT}
"""Names of the models that come with the package, and the checkpoints they stand for."""

_SIGNS_OF_A_CUT_DOWNLOAD = ("deserializing header", "no file named", "instantiate the backend tokenizer", "EOF")
"""In messages about weights and tokenizers that are missing or end too early."""


@dataclass(frozen=True, eq=False)
class View:
    """An image as the model sees it.

    Attributes:
        image: the pixels that entered the encoder, after resizing and cropping.
        shape: (rows, cols) of the patch grid; their product is n.
        saliency: attention that [CLS] pays to each patch, None if the encoder has no [CLS]. `n`.
        seen: its encoder passes.
    """

    image: Image.Image
    shape: tuple[int, int]
    saliency: Float[np.ndarray, "n"] | None
    seen: Seen

    @property
    def num_tokens(self) -> int:
        """Visual tokens of the unpruned image."""
        return self.seen.full.num_original


@dataclass(frozen=True)
class Reply:
    """An answer and what it cost.

    Attributes:
        text: the generated text.
        visual_tokens: how many of them the language model read.
        prefill_tokens: length of the prompt that it read, with visual tokens.
        milliseconds: of the stages; `first_token` is the sum up to the first new token: encoder, selection, prefill.
        kappa: distribution shift of the features that reached the language model, against an unpruned pass.
        record: what the pruner did; None without a pruner.
    """

    text: str
    visual_tokens: int
    prefill_tokens: int
    milliseconds: dict[str, float]
    kappa: float
    record: PruneRecord | None

    @classmethod
    def of(cls, answered: Answered) -> Reply:
        """The answer to a single question about an image."""
        assert answered.kappa is not None
        stages = {} if answered.record is None else answered.record.milliseconds
        return cls(
            text=answered.answers[0],
            visual_tokens=answered.num_tokens,
            prefill_tokens=int(answered.prompt_tokens[0]),
            milliseconds={"first_token": answered.first_token_ms, **stages, "encode": answered.encode_ms},
            kappa=float(answered.kappa[0]),
            record=answered.record,
        )

    @property
    def word(self) -> str:
        """The first word of the answer, in lower case."""
        return (self.text.split() or [""])[0].lower().strip(".,;:!?\"'")


@dataclass(frozen=True)
class Assistant:
    """A model with its processor.

    Attributes:
        name: as it was asked for.
        model, processor: of transformers.
    """

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin

    @classmethod
    def load(cls, name: str) -> Assistant:
        """A testbed model by name, or any supported model by folder or hub name.

        Raises:
            InvalidInputError: nothing of that name can be loaded.
            UnsupportedModelError: the model has no adapter.
        """
        if name in TESTBED_MODELS:
            return cls(name, *load(TESTBED_MODELS[name]))
        blueprint = Blueprint.find(name)
        return cls(name, blueprint.load(), blueprint.processor)

    def prompt(self, question: str) -> str:
        """The prompt that asks `question` about one image, in the model's own chat format.

        Raises:
            InvalidInputError: the question is empty or holds an image placeholder itself.
        """
        if not question.strip():
            raise InvalidInputError('the question is empty; ask something, for example "what color is the cat ?"')
        marker = image_marker(self.processor)
        if marker in question:
            raise InvalidInputError(
                f"with the {marker} in the question there are more {marker} than images; "
                f"take it out, the one {marker} that belongs to the image is added for you"
            )
        if getattr(self.processor, "chat_template", None) is None:
            return f"USER: {marker}\n{question.strip()} ASSISTANT:"
        turn = [{"type": "image"}, {"type": "text", "text": question.strip()}]
        processor: Any = self.processor
        return processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)

    def check_length(self, prompt: str, max_new_tokens: int) -> None:
        """Makes sure that the model can read a prompt and write so many tokens.

        Raises:
            InvalidInputError: it is longer than the model's context.
        """
        config: Any = self.model.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)
        if most is None:
            return
        tokenizer: Any = self.processor.tokenizer  # type: ignore[attr-defined]
        words = len(tokenizer(prompt)["input_ids"])
        if words + max_new_tokens > most:
            raise InvalidInputError(
                f"the prompt has {words:,} tokens beside its image and {max_new_tokens:,} new ones are asked for, more "
                f"than the {most:,} that {self.name} reads; shorten it, or ask for fewer"
            )

    def unknown_words(self, question: str) -> tuple[str, ...]:
        """Words of the question that are unknown to this model's tokenizer."""
        tokenizer: Any = self.processor.tokenizer  # type: ignore[attr-defined]
        unknown = tokenizer.unk_token_id
        if unknown is None:
            return ()
        words = dict.fromkeys(question.split())
        return tuple(word for word in words if unknown in tokenizer(word, add_special_tokens=False)["input_ids"])

    @property
    def knows(self) -> str | None:
        """What a testbed model was trained on; None for other models."""
        checkpoint = TESTBED_MODELS.get(self.name)
        return None if checkpoint is None else world_of(checkpoint).knows

    def doubt(self, questions: Iterable[str], sizes: Iterable[tuple[int, int]]) -> str | None:
        """Why answers may mean nothing, in one sentence; None if there is no reason for doubt.

        Args:
            questions: that are to be asked.
            sizes: width and height of the pictures. Those of the testbed's own worlds have one size.
        """
        unknown = list(dict.fromkeys(word for question in questions for word in self.unknown_words(question)))
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more words" if len(unknown) > 5 else "")
        reasons = [f"does not know {shown}"] if unknown else []
        if self.knows is None:
            return f"{self.name} {reasons[0]}; it was trained on few words" if reasons else None
        images: Any = self.processor.image_processor  # type: ignore[attr-defined]
        own = (images.size["width"], images.size["height"])
        if any(size != own for size in sizes):
            reasons.append("has never seen pictures like these")
        if not reasons:
            return None
        return (
            f"{self.name} {' and '.join(reasons)}, so its answers may mean nothing: it knows "
            f"{self.knows} (`dcp-prune demo` shows them); --model takes other models"
        )

    def look(self, image: Image.Image, *pruners: Pruner | None) -> View:
        """What the model sees of an image, RGB, encoded once for all these pruners and for none."""
        methods = dict.fromkeys(method_of(pruner) for pruner in (None, *pruners))
        seen = Runner(self.model, self.processor, [*methods], saliency=True).look([image])
        tokens = seen.full
        rows, cols = (int(size) + 1 for size in tokens.positions[0].amax(dim=0).tolist())
        attention = None if tokens.encoder is None else tokens.encoder.cls_attention
        images: Any = self.processor.image_processor  # type: ignore[attr-defined]
        colours = seen.pixels[0].float().cpu() * torch.tensor(images.image_std).view(3, 1, 1)
        colours = (colours + torch.tensor(images.image_mean).view(3, 1, 1)).clamp(0, 1).permute(1, 2, 0)
        return View(
            image=Image.fromarray((colours * 255).round().byte().numpy()),
            shape=(rows, cols),
            saliency=None if attention is None else attention[0].float().cpu().numpy(),
            seen=seen,
        )

    def ask(self, view: View, prompt: str, pruner: Pruner | None = None, *, max_new_tokens: int = 1) -> Reply:
        """Answers one prompt greedily.

        Args:
            view: of the image, from `look`.
            prompt: with exactly one image placeholder.
            pruner: one of those that the image was encoded for; None reads all visual tokens.
            max_new_tokens: the longest answer, in tokens.

        Raises:
            InvalidInputError: the prompt does not hold exactly one placeholder, the image was not encoded for this
                pruner, `max_new_tokens` is below 1, or all of it is longer than the model's context.
        """
        check_placeholders(prompt, image_marker(self.processor))
        if max_new_tokens < 1:
            raise InvalidInputError(f"an answer needs at least 1 new token, got max_new_tokens={max_new_tokens}")
        self.check_length(prompt, max_new_tokens)
        method = method_of(pruner)
        if method not in view.seen.stages:
            raise InvalidInputError(f"the image was not encoded for {pruner}; hand it to assistant.look as well")
        runner = Runner(self.model, self.processor, [method], max_new_tokens=max_new_tokens)
        (answered,) = runner.ask(view.seen, [Question(key="", image=0, text=None, prompt=prompt)])
        if pruner is not None and answered.record is None:
            warnings.warn(
                f"nothing was pruned: {pruner} keeps all {view.num_tokens} visual tokens of it; lower its budget",
                stacklevel=2,
            )
        return Reply.of(answered)


def method_of(pruner: Pruner | None) -> Method:
    """A pruner as the runner takes it; None reads all visual tokens."""
    return Method(ALL_TOKENS if pruner is None else type(pruner).__name__, None, pruner)


def image_marker(processor: Any) -> str:
    """What stands for an image in this processor's prompts."""
    return str(getattr(processor, "image_token", "<image>"))


def check_placeholders(prompt: str, marker: str = "<image>") -> None:
    """Checks that a prompt has exactly one image.

    Raises:
        InvalidInputError: it has no placeholder, or more than one.
    """
    count = prompt.count(marker)
    if count == 0:
        raise InvalidInputError(
            f"the prompt holds no {marker}, so the model would not see the image; write {marker} where it belongs"
        )
    if count > 1:
        raise InvalidInputError(f"the prompt holds {count} {marker} but 1 image was given; keep one {marker}")


@dataclass(frozen=True)
class Blueprint:
    """A model by name, without its weights.

    Attributes:
        name: as it was asked for.
        source: folder or hub name.
        config: of the model.
        processor: of transformers.
    """

    name: str
    source: str
    config: Any
    processor: ProcessorMixin

    @classmethod
    def find(cls, name: str) -> Blueprint:
        """A testbed model by name, or any supported model by folder or hub name.

        Raises:
            InvalidInputError: nothing of that name can be loaded.
            UnsupportedModelError: the model has no adapter.
        """
        from transformers import AutoConfig, AutoProcessor

        source = str(checkpoint_path(TESTBED_MODELS[name])) if name in TESTBED_MODELS else _source(name)
        with _cause_in_words(name):
            config = AutoConfig.from_pretrained(source, **_NO_FOREIGN_CODE)
            architecture = (config.architectures or ["unknown"])[0]
            supported = supported_architectures()
            if architecture not in supported:
                raise UnsupportedModelError(
                    f"{name} is a {architecture}, which cannot be pruned; supported: {', '.join(supported)}"
                )
            return cls(name, source, config, AutoProcessor.from_pretrained(source, **_NO_FOREIGN_CODE))

    @property
    def kind(self) -> Any:
        """Class of the model."""
        import transformers

        return getattr(transformers, self.config.architectures[0])

    def load(self, *, dtype: Any = "auto", attention: str | None = None, device: str | None = None) -> PreTrainedModel:
        """The model with its weights, in evaluation mode.

        Args:
            dtype: of the weights; that of the files unless told otherwise.
            attention: its implementation, as transformers names it; None leaves the choice to transformers.
            device: None for the first GPU, or the CPU where there is none.

        Raises:
            InvalidInputError: the weights cannot be loaded.
        """
        from transformers import AutoModelForImageTextToText

        with _cause_in_words(self.name):
            model: Any = AutoModelForImageTextToText.from_pretrained(
                self.source, dtype=dtype, attn_implementation=attention, **_NO_FOREIGN_CODE
            )
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


# Said each time: with nothing said, transformers asks on the terminal whether to run the model's own code.
_NO_FOREIGN_CODE: dict[str, Any] = {"trust_remote_code": False}


def _source(name: str) -> str:
    """What transformers loads from: a folder or a hub name."""
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        known = ", ".join(sorted(TESTBED_MODELS))
        raise InvalidInputError(
            f"there is no model at {name}; give a model's folder, a hub name like org/name, or {known}"
        )
    if path.exists() and not (path / "config.json").is_file():
        raise InvalidInputError(f"{name} holds no model, since config.json is missing; give the folder that holds it")
    return str(path) if path.exists() else name


@contextmanager
def _cause_in_words(name: str) -> Iterator[None]:
    """Says in one sentence why a model cannot be loaded."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except Exception as error:  # the hub, the file system and the parsers each raise kinds of their own
        cause = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in cause:
            cause = "it brings code of its own, which is never run here; load it yourself and hand it to the library"
        elif any(sign in cause for sign in _SIGNS_OF_A_CUT_DOWNLOAD):
            cause = f"its files are not complete, as after an interrupted download; fetch them again ({cause[:150]})"
        raise InvalidInputError(f"the model {name} cannot be loaded: {cause[:300]}") from error
