"""The model that lmms-eval asks: a processor's prompts, pruned inputs, answers; every error comes out."""
# pyright: reportMissingImports=false
# lmms-eval lives in an environment of its own, since its torchvision does not load beside a CPU build of torch.

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import Collator
from loguru import logger
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from dcp_prune.errors import InvalidInputError
from dcp_prune.integrations.lmms_eval import MODEL_ID
from dcp_prune.integrations.transformers import PruneRecord, prune_inputs
from dcp_prune.models import get_adapter
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import make_pruner

NO_PRUNER = "none"
"""`pruner=none`: the unpruned model by the very same path, for the upper bound."""
MAX_NEW_TOKENS = 1024
"""Where an answer is cut off if the task does not say, as in lmms-eval's own `llava_hf`."""


class PrunedLlava(lmms):
    """A vision-language model of transformers that reads few visual tokens, as lmms-eval wants its models.

    It serves tasks of output type `generate_until`, with any number of pictures per question, none included. Prompts
    are made by the chat template of the model's processor. An error ends the run; no question is scored as empty
    because something failed.

    Args:
        pretrained: a folder or a hub name.
        pruner: a registered name, or `none`.
        revision, dtype, attn_implementation: as for `from_pretrained`.
        system_prompt: put in front of every question; the text, or a file that holds it.
        device: `cuda`, `cpu`, ...; by default what `accelerate` chooses, which is one GPU per process.
        batch_size: questions that are answered together.
        options: fields of the pruner, `num_tokens` or `keep_ratio` among them.

    Raises:
        UnknownPrunerError: no pruner of that name.
        InvalidInputError: an option that the pruner does not have or a value that it refuses, options for
            `pruner=none`, a batch size that is no number, a processor without a chat template.
        UnsupportedModelError: the model has no adapter.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        pruner: str = "dcp",
        revision: str = "main",
        dtype: str = "auto",
        attn_implementation: str | None = None,
        system_prompt: str = "",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        with _failing_the_run():
            self.pruner = _make_pruner(pruner, options)
            self.batch_size = _batch_size(batch_size, max_batch_size)
            self.accelerator = Accelerator()
            alone = self.accelerator.num_processes == 1
            self.device = torch.device(device) if device and alone else self.accelerator.device
            model: Any = AutoModelForImageTextToText.from_pretrained(
                pretrained,
                revision=revision,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=False,
            )
            get_adapter(model)
            self.model = model.to(self.device).eval()
            self.processor: Any = AutoProcessor.from_pretrained(pretrained, revision=revision, trust_remote_code=False)
            if getattr(self.processor, "chat_template", None) is None:
                raise InvalidInputError(
                    f"the processor of {pretrained} has no chat template, so it is unknown how to ask this model; "
                    "save one beside it as chat_template.jinja"
                )
            self.system_prompt = self._resolve_system_prompt(system_prompt)
        shown = f"{self.pruner or 'all visual tokens'} of dcp-prune {version('dcp-prune')}"
        logger.info(f"{MODEL_ID}: {pretrained} with {shown}")

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers every request, in the order of the requests; what the task or the model raise comes out.

        Raises:
            InvalidInputError: a task gives something else than pictures, or its text has not one placeholder for each.
        """
        with _failing_the_run():
            # Long contexts first: the time left is overestimated rather than underestimated, and memory runs out early.
            order = Collator([request.args for request in requests], _longest_first, _generation_arguments, True)
            tally = _Tally()
            answers: list[GenerationResult] = []
            progress = tqdm(total=len(requests), desc=MODEL_ID, disable=self.rank != 0)
            for batch in order.get_batched(n=self.batch_size):
                try:
                    answers.extend(self._answer(batch, tally))
                except Exception as error:
                    asked = ", ".join(f"{document} of {task}" for *_, document, task, _ in batch)
                    error.add_note(f"while answering document(s) {asked}")
                    raise
                progress.update(len(batch))
            progress.close()
            tally.log()
            return order.get_original(answers)

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        _refuse("loglikelihood", requests)

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        _refuse("generate_until_multi_round", requests)

    def _answer(self, batch: Sequence[tuple[Any, ...]], tally: _Tally) -> list[GenerationResult]:
        """One result for each `(context, generation arguments, doc_to_visual, document, task, split)`."""
        prompts: list[str] = []
        pictures: list[Image.Image] = []
        for context, _, doc_to_visual, document, task, split in batch:
            try:
                shown = _pictures(doc_to_visual(self.task_dict[task][split][document]))
                prompts.append(self._prompt(context, len(shown)))
            except Exception as error:
                error.add_note(f"in document {document} of task {task} ({split})")
                raise
            pictures.extend(shown)
        tokenizer = self.processor.tokenizer
        inputs = self.processor(
            text=prompts,
            images=pictures or None,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            # Some templates write the first token themselves.
            add_special_tokens=not (tokenizer.bos_token and prompts[0].startswith(tokenizer.bos_token)),
        ).to(self.device, self.model.dtype)
        settings, stops = _generation_settings(batch[0][1])
        began = time.perf_counter()
        with torch.inference_mode():
            short: Mapping[str, Any] = inputs
            if self.pruner is not None:
                pruned = prune_inputs(self.model, inputs, self.pruner, processor=self.processor)
                short = pruned.inputs
                tally.count(pruned.record)
            ids = self.model.generate(
                **short,
                **settings,
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([_Until(stops, tokenizer, short["input_ids"].shape[1])]),
            )
        new = ids[:, short["input_ids"].shape[1] :]
        read = short["attention_mask"].sum(dim=1).tolist()
        written = (new != tokenizer.pad_token_id).sum(dim=1).tolist()
        tally.seconds += time.perf_counter() - began
        tally.new_tokens += sum(written)
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        return [
            GenerationResult(_cut(text, stops), TokenCounts(input_tokens=i, output_tokens=o))
            for text, i, o in zip(texts, read, written, strict=True)
        ]

    def _prompt(self, context: str, pictures: int) -> str:
        """The question in the model's chat format; pictures come first unless the context says where they belong."""
        marker = getattr(self.processor, "image_token", "<image>")
        places = context.count(marker)
        if places not in (0, pictures):
            raise InvalidInputError(
                f"the question has {places} {marker} for {pictures} picture(s); a task must write one for each, or none"
            )
        parts: list[dict[str, str]] = [] if places else [{"type": "image"}] * pictures
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": context}]}]
        messages = self._apply_system_prompt(messages, self.system_prompt)
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)


@dataclass
class _Tally:
    """What lmms-eval's result file says under `throughput`."""

    images: int = 0
    before: int = 0
    after: int = 0
    kappas: list[float] = field(default_factory=list)
    new_tokens: int = 0
    seconds: float = 0.0

    def count(self, record: PruneRecord | None) -> None:
        if record is None:
            return
        self.images += len(record.rows)
        self.before += sum(before for before, _ in record.tokens_per_image)
        self.after += sum(after for _, after in record.tokens_per_image)
        self.kappas += [] if record.kappa is None else record.kappa.tolist()

    def log(self) -> None:
        pruned: dict[str, float] = {}
        if self.images:
            pruned |= {"visual_tokens_before": self.before / self.images}
            pruned |= {"visual_tokens_after": self.after / self.images}
        if self.kappas:
            pruned |= {"kappa": sum(self.kappas) / len(self.kappas)}
        speed = self.new_tokens / self.seconds if self.seconds else 0.0
        log_metrics(self.seconds, self.new_tokens, speed, pruned)


class _Until(StoppingCriteria):
    """Ends a row whose new text holds a stop string; the one of transformers would look into the prompt as well."""

    def __init__(self, stops: Sequence[str], tokenizer: Any, prompt: int) -> None:
        self.stops = stops
        self.tokenizer = tokenizer
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True) if self.stops else ()
        ended = [any(stop in text for stop in self.stops) for text in texts] or [False] * len(input_ids)
        return torch.tensor(ended, device=input_ids.device)


@contextmanager
def _failing_the_run() -> Iterator[None]:
    """Lets an error end the process with exit code 1 where lmms-eval's command line is at work.

    It prints an exception and ends with exit code 0, as if all were well; SystemExit is what it does not catch. In
    Python (`simple_evaluate`) the exception itself comes out.
    """
    try:
        yield
    except Exception as error:
        if "lmms_eval.__main__" not in sys.modules:
            raise
        traceback.print_exc()
        raise SystemExit(f"{MODEL_ID}: {error}") from error


def _make_pruner(name: str, options: Mapping[str, Any]) -> Pruner | None:
    if name != NO_PRUNER:
        return make_pruner(name, **options)
    if options:
        raise InvalidInputError(
            f"pruner={NO_PRUNER} reads all visual tokens and takes no options, but got {', '.join(options)}; leave out "
            "the options, or name a pruner"
        )
    return None


def _batch_size(batch_size: int | str, max_batch_size: int | None) -> int:
    if max_batch_size is not None or not str(batch_size).isdigit() or int(batch_size) < 1:
        asked = batch_size if max_batch_size is None else f"{batch_size} and max_batch_size={max_batch_size}"
        raise InvalidInputError(
            f"batch sizes are not found automatically, got batch_size={asked}; give a number from 1"
        )
    return int(batch_size)


def _refuse(kind: str, requests: Sequence[Instance]) -> NoReturn:
    tasks = ", ".join(sorted({request.task_name for request in requests}))
    with _failing_the_run():
        raise InvalidInputError(
            f"{MODEL_ID} serves tasks of output type generate_until, but {tasks} asks for {kind}; take it out of "
            "--tasks"
        )
    raise AssertionError  # for the type checker, which believes that a context manager may swallow errors


def _longest_first(request: tuple[Any, ...]) -> tuple[int, str]:
    return -len(request[0]), request[0]


def _generation_arguments(request: tuple[Any, ...]) -> dict[str, Any]:
    return request[1]


def _pictures(visuals: Any) -> list[Image.Image]:
    """What a task's `doc_to_visual` gave, as RGB."""
    pictures = [] if visuals is None else list(visuals)
    for picture in pictures:
        if not isinstance(picture, Image.Image):
            raise InvalidInputError(
                f"the task gives a {type(picture).__name__} where {MODEL_ID} reads pictures; video and sound are not "
                "supported, take the task out of --tasks"
            )
    return [picture.convert("RGB") for picture in pictures]


def _generation_settings(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `generate`, and the strings at which an answer ends."""
    until = arguments.get("until")
    stops = [until] if isinstance(until, str) else [stop for stop in until or () if stop]
    given = {name: value for name, value in arguments.items() if name != "until"}
    known = {name: value for name, value in given.items() if name in _SETTINGS}
    settings = {"max_new_tokens": MAX_NEW_TOKENS, **known}
    settings.setdefault("do_sample", (settings.get("temperature") or 0) > 0)
    ignored = sorted(set(given) - set(known))
    if not settings["do_sample"]:
        ignored += ["temperature"] if (settings.get("temperature") or 0) > 0 else []
        settings |= dict.fromkeys(("temperature", "top_p", "top_k"))
    if ignored:
        _warn_once(f"{MODEL_ID}: generation arguments without effect here: {', '.join(ignored)}")
    return settings, stops


_SETTINGS = frozenset(GenerationConfig().to_dict()) - {"num_return_sequences"}
"""Generation arguments that mean the same to lmms-eval's tasks and to transformers."""
_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text.strip()
