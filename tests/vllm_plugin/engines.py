"""An engine of vLLM in this process, and what transformers answers to the same prompts."""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams

from dcp_prune.eval.asking import runner
from dcp_prune.eval.data.testbed import TestbedQuestions
from dcp_prune.integrations.transformers import TextScope, prune
from dcp_prune.integrations.vllm import pruned_architecture
from dcp_prune.integrations.vllm.settings import Settings

SETTINGS = set(Settings.__dataclass_fields__)
ENGINE = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 8,
    "max_logprobs": -1,
    "enforce_eager": True,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 * 2**20,
    "limit_mm_per_prompt": {"image": 4},
    "disable_log_stats": False,
}


@dataclass(frozen=True)
class Question:
    """A prompt with placeholders, its images, and what it asks of the processor."""

    prompt: str
    images: tuple[Image.Image, ...]
    num_tokens: int | None = None


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        prompt_tokens: in the prompt as the language model read it.
        cached_tokens: of these, found in the prefix cache.
        ids: the greedy answer.
        logprobs: of all words, for each token of the answer. `t v`.
    """

    prompt_tokens: int
    cached_tokens: int
    ids: tuple[int, ...]
    logprobs: Tensor


class Engine:
    """vLLM on a checkpoint; what is a setting of the plug-in goes there."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        settings = {name: options.pop(name) for name in SETTINGS & set(options)}
        (stock,) = json.loads((checkpoint / "config.json").read_text())["architectures"]
        pruned = {"architectures": [pruned_architecture(stock)], "dcp_prune": settings}
        overrides = {"hf_overrides": pruned} if settings else {}
        self.llm = LLM(str(checkpoint), **{**ENGINE, **overrides, **options})
        self.forget()

    @property
    def model(self) -> Any:
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner.model

    @property
    def encoded_images(self) -> int:
        return self.model.image_pruner.encoded_images

    def forget(self) -> None:
        """Empties all caches."""
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.llm.llm_engine.engine_core.reset_encoder_cache()
        pruner = getattr(self.model, "image_pruner", None)
        if pruner is not None:
            pruner.cache = type(pruner.cache)(pruner.cache.capacity)
            pruner.encoded_images = 0

    def ask(self, *questions: Question, steps: int = 3) -> list[Answer]:
        """The answers to questions that come in together."""
        prompts = [
            {
                "prompt": question.prompt,
                "multi_modal_data": {"image": list(question.images)},
                **({} if question.num_tokens is None else {"mm_processor_kwargs": {"num_tokens": question.num_tokens}}),
            }
            for question in questions
        ]
        params = SamplingParams(temperature=0, max_tokens=steps, logprobs=-1, ignore_eos=True)
        return [_answer(output) for output in self.llm.generate(prompts, params, use_tqdm=False)]


def _answer(output: Any) -> Answer:
    done = output.outputs[0]
    rows = [torch.tensor([row[token].logprob for token in sorted(row)]) for row in done.logprobs]
    return Answer(len(output.prompt_token_ids), output.num_cached_tokens or 0, tuple(done.token_ids), torch.stack(rows))


class Reference:
    """Our integration with transformers on the same checkpoint: nothing is cached between two answers."""

    def __init__(self, checkpoint: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.processor: Any = AutoProcessor.from_pretrained(checkpoint)

    def ask(self, question: Question, pruner: Any, steps: int = 3, text_scope: TextScope = "after_image") -> Answer:
        inputs = self.processor(text=question.prompt, images=list(question.images), return_tensors="pt")
        with torch.no_grad(), prune(self.model, pruner, processor=self.processor, text_scope=text_scope) as handle:
            out = self.model.generate(
                **inputs,
                max_new_tokens=steps,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            kept = handle.last.prompt_after
        logprobs = torch.stack([step[0].log_softmax(-1) for step in out.logits])
        return Answer(kept, 0, tuple(out.sequences[0, -steps:].tolist()), logprobs)


def answers_to(engine: Engine, source: TestbedQuestions) -> tuple[list[runner.Question], list[Answer]]:
    """The testbed's questions, which come in together, and the engine's answers of one word."""
    scenes = [source.scene(number) for number in range(source.images)]
    asked = [each for number, scene in enumerate(scenes) for each in source.asked(scene, number, number)]
    images = [Image.fromarray(scene.image) for scene in scenes]
    questions = [Question(each.prompt, (images[each.image],)) for each in asked]
    return asked, engine.ask(*questions, steps=1)


def difference(first: Answer, second: Answer) -> float:
    """The largest difference of two answers' logprobs; words that the model rules out do not count."""
    assert first.ids == second.ids
    likely = (first.logprobs > -20) | (second.logprobs > -20)
    return (first.logprobs - second.logprobs)[likely].abs().max().item()
