"""Ways to load, wrap, train and run a model: with a pruner attached, each gives what the plain model gives.

docs/how-to/ways-to-run.md lists them with these tests and those of other modules.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, GenerationMixin, LlamaForCausalLM, LlavaForConditionalGeneration

from dcp_prune.errors import InvalidInputError, UnsupportedModelError, UnsupportedVersionError
from dcp_prune.integrations.transformers import encode_images, get_handle, prune, prune_inputs
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import make_pruner
from quantised import QuantisedLinear, replace_linears
from tiny_llava import IMAGE_ID

MakeInputs = Callable[..., dict[str, Any]]
PROMPTS = ("USER: <image> what is this ASSISTANT:", "USER: <image> <image> where is the cat", "what is the dog here")
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
STAGED = make_pruner("dcp_progressive", num_tokens=8)


def pruned_ids(model: Any, inputs: dict[str, Any], pruner: Pruner = STAGED, **options: Any) -> Tensor:
    """What `generate` gives under `prune`."""
    with prune(model, pruner) as handle:
        handle.last = None
        ids = model.generate(**inputs, **OPTIONS, **options)
        assert handle.last is not None
        assert handle.last.tokens_after == 8
    return ids


# Assistants -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assistant", ["language model", "same", "same, attached", "narrow"])
def test_an_assistant_model_changes_no_answer(model: Any, make_inputs: MakeInputs, assistant: str) -> None:
    inputs = make_inputs(PROMPTS[1])
    expected = pruned_ids(model, inputs)
    helper: Any = copy.deepcopy(model)
    if assistant == "language model":
        helper = LlamaForCausalLM(model.config.text_config).eval()
        helper.generation_config.pad_token_id = 0
    elif assistant == "narrow":
        config = copy.deepcopy(model.config)
        config.text_config.hidden_size = 32
        helper = LlavaForConditionalGeneration(config).eval()
        helper.generation_config = copy.deepcopy(model.generation_config)
    elif assistant == "same, attached":
        prune(helper, STAGED)
    assert torch.equal(pruned_ids(model, inputs, assistant_model=helper), expected)


# Devices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["1GB", "400KB", "250KB"])
def test_a_model_spread_by_device_map_auto_gives_the_same_answers(
    model: Any, make_inputs: MakeInputs, pruner: Pruner, tmp_path: Path, memory: str
) -> None:
    inputs = make_inputs(*PROMPTS)
    expected = pruned_ids(model, inputs, pruner)
    model.save_pretrained(tmp_path / "model")
    spread: Any = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path / "disk"
    ).eval()
    devices = set(getattr(spread, "hf_device_map", {"": "cpu"}).values())
    assert devices == {"1GB": {"cpu"}, "400KB": {"cpu", "disk"}, "250KB": {"disk"}}[memory]
    spread.generation_config = model.generation_config
    assert torch.equal(pruned_ids(spread, inputs, pruner), expected)


def test_a_dispatched_model_with_hooks_on_every_module_gives_the_same_answers(
    model: Any, make_inputs: MakeInputs, pruner: Pruner
) -> None:
    inputs = make_inputs(*PROMPTS)
    expected = pruned_ids(model, inputs, pruner)
    model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert torch.equal(pruned_ids(model, inputs, pruner), expected)


# Quantised and adapted weights ----------------------------------------------------------------------------------------


def test_quantised_linears_give_the_answers_of_the_same_weights_in_full(
    model: Any, make_inputs: MakeInputs, pruner: Pruner
) -> None:
    inputs = make_inputs(*PROMPTS)
    assert replace_linears(model, nn.Linear, QuantisedLinear) > 50
    assert not hasattr(model.model.vision_tower.encoder.layers[0].self_attn.k_proj, "weight")
    found = pruned_ids(model, inputs, pruner)
    replace_linears(model, QuantisedLinear, lambda quantised: quantised.plain())
    assert torch.equal(found, pruned_ids(model, inputs, pruner))


@pytest.fixture
def lora(model: Any) -> PeftModel:
    """Adapters on the language model that change its answers."""
    config = LoraConfig(target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False)
    return get_peft_model(model, config)  # type: ignore[return-value]


def test_a_peft_model_is_pruned_whether_it_or_its_base_is_given(
    lora: Any, model: Any, pristine_model: Any, make_inputs: MakeInputs, pruner: Pruner
) -> None:
    inputs = make_inputs(*PROMPTS)
    with prune(lora, pruner) as handle:
        assert get_handle(lora) is get_handle(model) is handle
        ids = lora.generate(**inputs, **OPTIONS)
        assert torch.equal(model.generate(**inputs, **OPTIONS), ids)
        handle.last = None
        with torch.no_grad():
            logits = lora(**inputs).logits
        assert handle.last is not None
        assert logits.shape[1] == handle.last.prompt_after
        with lora.disable_adapter():
            plain = lora.generate(**inputs, **OPTIONS)
    assert get_handle(lora) is None
    assert not torch.equal(ids, plain), "the adapters matter"
    assert torch.equal(plain, pruned_ids(copy.deepcopy(pristine_model), inputs, pruner))
    short = prune_inputs(lora, inputs, pruner)
    assert torch.equal(short.restore(lora.generate(**short.inputs, **OPTIONS)), ids)
    encode_images(lora, inputs["pixel_values"], pruner)


def test_merging_adapters_keeps_the_pruner_and_the_answers(lora: Any, model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    with prune(lora, STAGED) as handle:
        ids = lora.generate(**inputs, **OPTIONS)
        merged: Any = lora.merge_and_unload()
        assert merged is model
        assert get_handle(merged) is handle
        assert torch.equal(merged.generate(**inputs, **OPTIONS), ids)
    assert torch.equal(pruned_ids(merged, inputs), ids)


def test_adapters_inside_the_vision_tower_choose_the_tokens_of_the_merged_model(
    model: Any, make_inputs: MakeInputs, pruner: Pruner
) -> None:
    inputs = make_inputs(*PROMPTS)
    targets = ["q_proj", "k_proj", "v_proj"]
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    with prune(adapted, pruner) as handle:
        ids = adapted.generate(**inputs, **OPTIONS)
        first = handle.last
        merged = adapted.merge_and_unload()
        assert torch.equal(merged.generate(**inputs, **OPTIONS), ids)
        assert first is not None
        assert handle.last is not None
        assert torch.equal(handle.last.indices, first.indices)


def test_training_adapters_gives_them_the_gradients_of_the_short_prompt(lora: Any, make_inputs: MakeInputs) -> None:
    inputs = with_labels(make_inputs(*PROMPTS))
    lora.train()
    short = prune_inputs(lora, inputs, STAGED)
    lora(**short.inputs).loss.backward()
    expected = gradients(lora)
    lora.zero_grad()
    with prune(lora, STAGED):
        lora(**inputs).loss.backward()
    found = gradients(lora)
    assert found
    assert all("lora_" in name for name in found)
    torch.testing.assert_close(found, expected)


# Training -------------------------------------------------------------------------------------------------------------


def with_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_ID, -100)}


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(
    model: Any, make_inputs: MakeInputs, pruner: Pruner, reentrant: bool
) -> None:
    inputs = with_labels(make_inputs(*PROMPTS))
    model.train()
    with prune(model, pruner):
        loss = model(**inputs).loss
        loss.backward()
        expected = gradients(model)
        model.zero_grad()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        checkpointed = model(**inputs).loss
        checkpointed.backward()
    torch.testing.assert_close(checkpointed, loss)
    torch.testing.assert_close(gradients(model), expected)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("attach", ["before", "after"])
def test_a_model_prepared_by_accelerate_trains_on_the_short_prompt(
    model: Any, make_inputs: MakeInputs, accelerator: Accelerator, attach: str
) -> None:
    inputs = with_labels(make_inputs(*PROMPTS))
    with prune(model, STAGED):
        expected = model(**inputs).loss
    if attach == "before":
        handle = prune(model, STAGED)
        model = accelerator.prepare(model)
    else:
        model = accelerator.prepare(model)
        handle = prune(model, STAGED)
    loss = model(**inputs).loss
    accelerator.backward(loss)
    assert handle.last is not None
    assert handle.last.tokens_after == 8
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.0)
    assert gradients(model)
    handle.remove()
    assert get_handle(accelerator.unwrap_model(model)) is None


def test_a_parallel_wrapper_is_refused_with_the_way_out_and_runs_what_is_inside_pruned(
    model: Any, make_inputs: MakeInputs
) -> None:
    inputs = make_inputs(*PROMPTS)
    wrapper = nn.DataParallel(model)
    with pytest.raises(UnsupportedModelError, match=r"DataParallel wraps a LlavaFor.*its attribute `module`"):
        prune(wrapper, STAGED)  # type: ignore[arg-type]
    with prune(wrapper.module, STAGED) as handle, torch.no_grad():
        assert torch.equal(wrapper(**inputs).logits, model(**inputs).logits)
        assert handle.last is not None


# torch.compile --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What other tests compiled counts towards the limit of recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_language_model_gives_the_same_answers(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    expected = pruned_ids(model, inputs)
    counter = CompileCounter()
    model.model.language_model.compile(backend=counter)
    assert torch.equal(pruned_ids(model, inputs), expected)
    assert counter.frame_count > 0


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["model.compile()", "torch.compile(model)"])
def test_a_model_compiled_as_a_whole_after_attaching_gives_the_same_answers(
    model: Any, make_inputs: MakeInputs, how: str
) -> None:
    inputs = make_inputs(*PROMPTS)
    expected = pruned_ids(model, inputs)
    counter = CompileCounter()
    with prune(model, STAGED) as handle, torch.no_grad():
        logits = model(**inputs).logits
        compiled: Any = model
        if how == "model.compile()":
            model.compile(backend=counter)
        else:
            compiled = torch.compile(model, backend=counter)
        handle.last = None
        torch.testing.assert_close(compiled(**inputs).logits, logits)
        assert handle.last is not None
        assert handle.last.tokens_after == 8
        assert torch.equal(compiled.generate(**inputs, **OPTIONS), expected)
    assert counter.frame_count > 0


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_generate_compiles_its_steps_on_a_static_cache_of_the_short_prompt(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    expected = pruned_ids(model, inputs)
    lengths: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        lengths.append(len(example))
        return graph

    options: dict[str, Any] = {"backend": backend, "mode": None, "fullgraph": True}
    compile_config: Any = CompileConfig(**options)
    compile_config._compile_all_devices = True  # without it, generate compiles on a GPU only
    found = pruned_ids(model, inputs, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(found, expected)
    assert lengths, "something was compiled"


# Refused --------------------------------------------------------------------------------------------------------------


def test_continuous_batching_is_refused_since_it_would_not_see_the_images(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(PROMPTS[0])
    prompts = inputs["input_ids"].tolist()
    with prune(model, STAGED) as handle:
        for call in (
            lambda: model.generate(**inputs, **OPTIONS, cache_implementation="paged"),
            lambda: model.generate_batch(prompts, max_new_tokens=1),
            lambda: model.continuous_batching_context_manager().__enter__(),
            lambda: copy.deepcopy(model).init_continuous_batching(),
        ):
            with pytest.raises(InvalidInputError, match=r"continuous batching .* takes token ids without images"):
                call()
    assert get_handle(model) is None
    assert model.init_continuous_batching.__func__ is GenerationMixin.init_continuous_batching
    assert handle.model is model


def test_a_class_with_a_generate_of_its_own_is_refused(model: Any, make_inputs: MakeInputs) -> None:
    class RemoteLlava(LlavaForConditionalGeneration):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    class Derived(RemoteLlava):
        pass

    model.__class__ = Derived
    with pytest.raises(UnsupportedModelError, match=r"RemoteLlava overrides generate.*or call prune_inputs"):
        prune(model, STAGED)
    short = prune_inputs(model, make_inputs(PROMPTS[0]), STAGED)
    assert short.record is not None


def test_a_transformers_that_takes_no_features_is_refused_by_name_of_the_versions(model: Any) -> None:
    class OldLlava(LlavaForConditionalGeneration):
        def forward(self, input_ids: Any = None, pixel_values: Any = None) -> Any: ...  # type: ignore[override]

    model.__class__ = OldLlava
    with pytest.raises(UnsupportedVersionError, match=r"takes no mm_encoder_outputs.*install transformers 5.19"):
        prune(model, STAGED)


# The page -------------------------------------------------------------------------------------------------------------


def test_every_row_of_the_page_names_tests_that_exist() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "how-to" / "ways-to-run.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"\[`(\w+)`\]\(([^)]+)\)", row.rstrip("| ").rpartition("|")[2])
        assert named, row
        for name, link in named:
            source = (root / "docs" / "how-to" / link).resolve().read_text()
            assert f"def {name}(" in source, (name, link)
