"""`prune`: every way to call `generate` and the model works while attached, and nothing is left afterwards."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import LlavaForConditionalGeneration, TextStreamer, pipeline
from transformers.generation.streamers import BaseStreamer

from dcp_prune.errors import InvalidInputError, MissingSignalError, UnsupportedModelError
from dcp_prune.integrations.transformers import get_handle, prune, prune_inputs
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import make_pruner
from tiny_llava import build_model

IMAGE_ID, N = 4, 36
MakeInputs = Callable[..., dict[str, Any]]
PROMPTS = ("USER: <image> what is this ASSISTANT:", "USER: <image> <image> where is the cat", "what is the dog here")


def new_tokens(ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    return ids[:, inputs["input_ids"].shape[1] :]


def traces(model: torch.nn.Module) -> dict[str, Any]:
    """All that an attachment could leave behind: instance attributes and hooks of every submodule."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = (
            sorted(module.__dict__),
            {
                kind: [id(hook) for hook in hooks.values()]
                for kind, hooks in module.__dict__.items()
                if kind.endswith("_hooks") and hooks
            },
        )
    return found


# Ways to generate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 3.0},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "cache_implementation": "dynamic"},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": False, "prompt_lookup_num_tokens": 2, "rows": 1},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_generate_gives_the_original_prompt_and_the_answer_of_the_short_one(
    model: Any, make_inputs: MakeInputs, pruner: Pruner, options: dict[str, Any]
) -> None:
    options = dict(options)
    inputs = make_inputs(*PROMPTS[: options.pop("rows", 3)])
    short = prune_inputs(model, inputs, pruner)
    torch.manual_seed(3)
    expected = model.generate(**short.inputs, max_new_tokens=5, **options)[:, -5:]
    with prune(model, pruner):
        torch.manual_seed(3)
        ids = model.generate(**inputs, max_new_tokens=5, **options)
    rows = options.get("num_return_sequences", 1)
    assert torch.equal(new_tokens(ids, inputs), expected)
    assert torch.equal(ids[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(rows, dim=0))


def test_the_answer_differs_from_the_unpruned_one(model: Any, make_inputs: MakeInputs, pruner: Pruner) -> None:
    inputs = make_inputs(*PROMPTS)
    unpruned = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with prune(model, pruner):
        pruned = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert not torch.equal(pruned[:2], unpruned[:2])
    assert torch.equal(pruned[2], unpruned[2]), "the row without an image"


@pytest.mark.parametrize("budget", [N, 999])
def test_a_budget_of_all_tokens_gives_bit_equal_ids_and_logits(
    model: Any, make_inputs: MakeInputs, budget: int
) -> None:
    inputs = make_inputs(*PROMPTS)
    with torch.no_grad():
        logits = model(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    with prune(model, make_pruner("dcp_progressive", num_tokens=budget)) as handle, torch.no_grad():
        with pytest.warns(UserWarning, match="nothing was pruned"):
            logits_attached = model(**inputs).logits
        with pytest.warns(UserWarning, match="nothing was pruned"):
            ids_attached = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert handle.last is not None
        assert handle.last.tokens_after == N
    assert torch.equal(logits_attached, logits)
    assert torch.equal(ids_attached, ids)


def test_positional_arguments_mean_what_they_mean_to_the_model(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(PROMPTS[0])
    ids, pixels, mask = inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=4, do_sample=False)
    with prune(model, make_pruner("uniform", num_tokens=8)) as handle, torch.no_grad():
        by_name = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(ids, config, pixel_values=pixels, attention_mask=mask), by_name)
        logits = model(**inputs).logits
        handle.last = None
        assert torch.equal(model(ids, pixels, mask).logits, logits)
        assert handle.last is not None


def test_a_plain_call_agrees_with_the_first_generated_token(
    model: Any, make_inputs: MakeInputs, pruner: Pruner
) -> None:
    inputs = make_inputs(PROMPTS[1])
    with prune(model, pruner) as handle, torch.no_grad():
        output = model(**inputs)
        assert handle.last is not None
        columns = handle.last.columns
        first = model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1]
    assert output.logits.shape[1] == columns.shape[1] == inputs["input_ids"].shape[1] - 2 * (N - 8)
    assert torch.equal(output.logits[:, -1].argmax(dim=-1), first)


def test_lengths_count_the_original_prompt(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(PROMPTS[0])
    length = inputs["input_ids"].shape[1]
    config = copy.deepcopy(model.generation_config)
    config.max_length = length + 3
    with prune(model, make_pruner("uniform", num_tokens=8)):
        assert model.generate(**inputs, max_length=length + 3).shape[1] == length + 3
        assert model.generate(**inputs, generation_config=config).shape[1] == length + 3
        assert config.max_length == length + 3, "the caller's config is not changed"
        assert model.generate(**inputs, generation_config=config, max_new_tokens=2).shape[1] == length + 2
        first = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1].item()
        options = {"max_length": length + 9, "eos_token_id": first, "do_sample": False}
        assert model.generate(**inputs, **options).shape[1] == length + 1
        assert model.generate(**inputs, **options, min_length=length + 4).shape[1] >= length + 4
    model.generation_config.max_length = length + 3
    with prune(model, make_pruner("uniform", num_tokens=8)):
        assert model.generate(**inputs).shape[1] == length + 3


def test_a_streamer_gets_the_original_prompt_and_then_each_new_token(model: Any, make_inputs: MakeInputs) -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.put_values: list[list[int]] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.put_values.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    inputs = make_inputs(PROMPTS[0])
    streamer = Collector()
    with prune(model, make_pruner("cls_attention", num_tokens=8)):
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert streamer.put_values[0] == inputs["input_ids"][0].tolist()
    assert [value for values in streamer.put_values for value in values] == ids[0].tolist()
    assert streamer.ended


def test_a_text_streamer_that_skips_the_prompt_prints_the_answer(
    model: Any, make_inputs: MakeInputs, processor: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = make_inputs(PROMPTS[0])
    with prune(model, make_pruner("cls_attention", num_tokens=8)):
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True)
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert capsys.readouterr().out.split() == processor.tokenizer.decode(new_tokens(ids, inputs)[0]).split()


def test_processors_and_criteria_of_the_caller_see_the_original_prompt(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(PROMPTS[0], PROMPTS[1])
    prompt = inputs["input_ids"]
    seen: list[Tensor] = []

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(ids)
        return scores

    def criterion(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= prompt.shape[1] + 2)

    def allowed(row: int, ids: Tensor) -> list[int]:
        assert torch.equal(ids[: prompt.shape[1]], prompt[row])
        return [7 + row]

    with prune(model, make_pruner("cls_attention", num_tokens=8)):
        ids = model.generate(
            **inputs,
            max_new_tokens=9,
            num_beams=2,
            logits_processor=[processor],
            stopping_criteria=[criterion],
            prefix_allowed_tokens_fn=allowed,
        )
    assert all(torch.equal(each[:, : prompt.shape[1]], prompt.repeat_interleave(2, dim=0)) for each in seen)
    assert new_tokens(ids, inputs).tolist() == [[7, 7], [8, 8]]


def test_a_dictionary_output_holds_the_original_prompt_and_the_scores(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    with prune(model, make_pruner("dcp_progressive", num_tokens=8)):
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        output = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
    assert torch.equal(output.sequences, ids)
    assert len(output.scores) == 3


def test_a_prompt_without_image_is_left_to_the_model(model: Any, make_inputs: MakeInputs, pruner: Pruner) -> None:
    inputs = make_inputs(PROMPTS[2])
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with prune(model, pruner) as handle:
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), plain)
        assert handle.last is None


def test_placeholders_without_an_image_are_refused(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(PROMPTS[0])
    del inputs["pixel_values"]
    with (
        prune(model, make_pruner("dcp_progressive", num_tokens=8)),
        pytest.raises(InvalidInputError, match="no image came with it"),
    ):
        model.generate(**inputs, max_new_tokens=1)


def test_a_prompt_without_placeholder_is_refused(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(PROMPTS[2]) | {"pixel_values": make_inputs(PROMPTS[0])["pixel_values"]}
    with prune(model, make_pruner("dcp_progressive", num_tokens=8)):
        for call in (model, model.generate):
            with pytest.raises(InvalidInputError, match="holds no image placeholder"):
                call(**inputs)


def test_bfloat16_generates(model: Any, make_inputs: MakeInputs, pruner: Pruner) -> None:
    inputs = make_inputs(*PROMPTS)
    with prune(model.to(torch.bfloat16), pruner):
        assert new_tokens(model.generate(**inputs, max_new_tokens=3), inputs).shape == (3, 3)


# Training -------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_labels_that_are_left_on_either_padding_side(
    model: Any, make_inputs: MakeInputs, pruner: Pruner
) -> None:
    losses = []
    for side in ("left", "right"):
        inputs = make_inputs(*PROMPTS[:2], padding_side=side)
        after = (inputs["input_ids"] == IMAGE_ID).flip(1).cumsum(1).flip(1) == 0
        answer = after & (inputs["input_ids"] != IMAGE_ID) & inputs["attention_mask"].bool()
        inputs["labels"] = inputs["input_ids"].masked_fill(~answer, -100)
        with prune(model, pruner):
            losses.append(model(**inputs).loss)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_language_model_projector_and_vision_tower(
    model: Any, make_inputs: MakeInputs, checkpointing: bool
) -> None:
    inputs = make_inputs(*PROMPTS[:2])
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_ID, -100)
    model.train()
    with prune(model, make_pruner("dcp_progressive", num_tokens=8)):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**inputs).loss.backward()
    vision = model.model.vision_tower
    for module in (model.lm_head, model.model.multi_modal_projector.linear_1, vision.encoder.layers[0].mlp.fc1):
        assert module.weight.grad.abs().sum() > 0
    assert vision.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    assert vision.encoder.layers[3].mlp.fc1.weight.grad is None, "behind the feature layer"


# Around the model -----------------------------------------------------------------------------------------------------


def test_a_compiled_vision_tower_chooses_the_same_tokens(model: Any, make_inputs: MakeInputs, pruner: Pruner) -> None:
    inputs = make_inputs(PROMPTS[1])
    expected = prune_inputs(model, inputs, pruner).record
    unpruned = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    model.model.vision_tower = torch.compile(model.model.vision_tower, backend="eager", fullgraph=True)
    with prune(model, pruner) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert handle.last is not None
        assert expected is not None
        assert torch.equal(handle.last.indices, expected.indices)
    assert torch.equal(model.generate(**inputs, max_new_tokens=2, do_sample=False), unpruned)


@pytest.mark.parametrize("ran_before", [False, True])
def test_compiled_encoder_layers_run_compiled_and_choose_the_same_tokens(
    make_inputs: MakeInputs, pruner: Pruner, ran_before: bool
) -> None:
    # A model of its own: transformers hangs hooks on the layers of one that has run unpruned, and a graph breaks there.
    model: Any = build_model()
    torch.compiler.reset()  # forgets other tests, whose graphs count towards a limit
    inputs = make_inputs(PROMPTS[1])
    if ran_before:
        model(**inputs)
    expected = prune_inputs(model, inputs, pruner).record
    counter = CompileCounter()
    for layer in model.model.vision_tower.encoder.layers:
        layer.compile(backend=counter, fullgraph=not ran_before)
    found = prune_inputs(model, inputs, pruner).record
    assert found is not None
    assert expected is not None
    assert torch.equal(found.indices, expected.indices)
    assert counter.frame_count > 0


@pytest.mark.slow
def test_a_compiled_forward_generates_the_same(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(PROMPTS[1])
    with prune(model, make_pruner("dcp_progressive", num_tokens=8)):
        expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        model.forward = torch.compile(model.forward, backend="eager")
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), expected)


def test_a_model_whose_weights_are_offloaded_chooses_the_same_tokens(
    model: Any, make_inputs: MakeInputs, pruner: Pruner
) -> None:
    from accelerate import cpu_offload

    inputs = make_inputs(PROMPTS[1])
    expected = prune_inputs(model, inputs, pruner)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.vision_tower.encoder.layers[0].self_attn.k_proj.weight.is_meta
    with prune(model, pruner) as handle:
        ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 2
    assert expected.record is not None
    assert handle.last is not None
    assert torch.equal(handle.last.indices, expected.record.indices)


def test_the_image_text_pipeline_answers_a_chat_and_a_batch(model: Any, processor: Any, pruner: Pruner) -> None:
    from PIL import Image

    image = Image.effect_mandelbrot((90, 84), (-2, -1, 1, 1), 50).convert("RGB")
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is this"}]}]
    pipe: Any = pipeline("image-text-to-text", model=model, processor=processor)
    with prune(model, pruner, processor=processor) as handle:
        (answer,) = pipe(text=chat, max_new_tokens=3, return_full_text=False)
        assert handle.last is not None
        assert handle.last.tokens_after == 8
        assert len(answer["generated_text"].split()) <= 3
        answers = pipe(text=[chat, chat], max_new_tokens=3, batch_size=2, return_full_text=False)
    texts = [each[0]["generated_text"] if isinstance(each, list) else each["generated_text"] for each in answers]
    assert texts == [answer["generated_text"]] * 2


def test_a_model_that_was_saved_while_attached_prunes_on_its_own(make_inputs: MakeInputs) -> None:
    inputs, file = make_inputs("<image> what is this"), io.BytesIO()
    model: Any = build_model()  # once it ran unpruned, transformers hangs hooks on it that nobody can save
    with prune(model, make_pruner("uniform", num_tokens=8)) as handle:
        expected = new_tokens(model.generate(**inputs, max_new_tokens=3), inputs)
        torch.save(model, file)
        record = handle.last
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    twin = get_handle(loaded)
    assert twin is not None
    assert twin is not handle
    assert twin.last.milliseconds.keys() == record.milliseconds.keys()
    assert torch.equal(new_tokens(loaded.generate(**inputs, max_new_tokens=3), inputs), expected)
    twin.remove()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_deepcopy_prunes_on_its_own(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(PROMPTS[0])
    unpruned = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with prune(model, make_pruner("dcp_progressive", num_tokens=8)) as handle:
        pruned = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        twin = copy.deepcopy(model)
    handle.last = None
    twin_handle = get_handle(twin)
    assert twin_handle is not None
    assert twin_handle is not handle
    assert torch.equal(twin.generate(**inputs, max_new_tokens=6, do_sample=False), pruned)
    assert handle.last is None
    assert twin_handle.last is not None
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), unpruned)
    twin_handle.remove()
    assert torch.equal(twin.generate(**inputs, max_new_tokens=6, do_sample=False), unpruned)


def test_a_model_saved_while_attached_loads_as_a_plain_one(model: Any, make_inputs: MakeInputs, tmp_path: Path) -> None:
    inputs = make_inputs(PROMPTS[0])
    keys = set(model.state_dict())
    with prune(model, make_pruner("dcp_progressive", num_tokens=8)):
        model.generate(**inputs, max_new_tokens=2)
        assert set(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert get_handle(loaded) is None
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_three_threads_do_not_disturb_each_other(model: Any, make_inputs: MakeInputs) -> None:
    batches = [make_inputs(PROMPTS[0], seeds=[1]), make_inputs(PROMPTS[1], seeds=[2, 3]), make_inputs(PROMPTS[2])]
    found: list[list[Tensor]] = [[], [], []]
    with prune(model, make_pruner("dcp_progressive", num_tokens=8)):
        expected = [model.generate(**inputs, max_new_tokens=3, do_sample=False) for inputs in batches]
        start = threading.Barrier(3)

        def work(number: int) -> None:
            start.wait()
            for _ in range(4):
                found[number].append(model.generate(**batches[number], max_new_tokens=3, do_sample=False))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(3):
        assert len(found[number]) == 4
        assert all(torch.equal(ids, expected[number]) for ids in found[number])


# Attaching and leaving ------------------------------------------------------------------------------------------------


def test_attaching_twice_is_refused_and_names_the_way_out(model: Any) -> None:
    pruner = make_pruner("random", num_tokens=8)
    with prune(model, pruner) as handle:
        with pytest.raises(
            InvalidInputError, match=r"already prunes with RandomPruner.*get_handle\(model\).remove\(\)"
        ):
            prune(model, pruner)
        assert get_handle(model) is handle
    with prune(model, pruner):
        pass


def test_a_stage_that_does_not_fit_the_encoder_is_refused_when_attaching(model: Any) -> None:
    before = traces(model)
    with pytest.raises(InvalidInputError, match="layer 2"):
        prune(model, make_pruner("dcp_progressive", num_tokens=8, schedule=((2, 0.5),)))
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(UnsupportedModelError, match="list"):
        prune(model, make_pruner("dcp_progressive", num_tokens=8))
    assert traces(model) == before


def test_a_pruner_that_the_model_cannot_serve_is_refused_when_attaching(model: Any) -> None:
    before = traces(model)
    with pytest.raises(
        MissingSignalError,
        match=r"CDPruner needs clip_similarity, which LlavaForConditionalGeneration does not give .*CLIP's text tower",
    ):
        prune(model, make_pruner("cdpruner", num_tokens=8))
    assert traces(model) == before


def use_in_every_way(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    model.generate(**inputs, max_new_tokens=2)
    model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    with torch.no_grad():
        model(**inputs)


def test_pruning_leaves_nothing_on_the_model(
    pristine_model: Any, model: Any, make_inputs: MakeInputs, pruner: Pruner
) -> None:
    # The model notes the length of its static caches, pruned or not.
    model.generate(**make_inputs(PROMPTS[2]), max_new_tokens=2, cache_implementation="static")
    before = traces(model)
    with prune(model, pruner):
        assert traces(model) != before
        use_in_every_way(model, make_inputs)
    assert traces(model) == before
    prune_inputs(model, make_inputs(*PROMPTS), pruner)
    assert traces(model) == before
    inputs = make_inputs(*PROMPTS)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, copy.deepcopy(pristine_model)(**inputs).logits)


def test_an_exception_inside_leaves_nothing_on_the_model(
    pristine_model: Any, model: Any, make_inputs: MakeInputs, pruner: Pruner
) -> None:
    before = traces(model)
    inputs = make_inputs(*PROMPTS)
    broken = inputs | {"pixel_values": torch.full_like(inputs["pixel_values"], torch.nan)}
    with pytest.raises(InvalidInputError, match="NaN"), prune(model, pruner):
        model.generate(**broken, max_new_tokens=1)
    assert traces(model) == before
    with pytest.raises(ZeroDivisionError), prune(model, pruner):
        _ = 1 / 0
    assert traces(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, copy.deepcopy(pristine_model)(**inputs).logits)


@pytest.mark.parametrize("leave", ["hook", "attribute", "deep hook"])
def test_the_check_for_traces_can_fail(model: Any, leave: str) -> None:
    before = traces(model)
    if leave == "hook":
        model.register_forward_pre_hook(lambda *_: None)
    elif leave == "deep hook":
        model.model.vision_tower.encoder.layers[1].register_forward_hook(lambda *_: None)
    else:
        model.generate = lambda **_: None
    assert traces(model) != before


def test_a_generate_of_the_users_own_is_called_and_put_back(model: Any, make_inputs: MakeInputs) -> None:
    calls: list[int] = []

    def generate(**kwargs: Any) -> Tensor:
        calls.append(kwargs["input_ids"].shape[1])
        return type(model).generate(model, **kwargs)

    model.generate = generate
    inputs = make_inputs(PROMPTS[0])
    with prune(model, make_pruner("uniform", num_tokens=8)) as handle:
        model.generate(**inputs, max_new_tokens=1)
        handle.remove()
        assert model.generate is generate
    assert calls == [inputs["input_ids"].shape[1] - (N - 8)]
    assert model.generate is generate


def test_a_handle_works_without_a_with_statement(model: Any, make_inputs: MakeInputs) -> None:
    before = traces(model)
    handle = prune(model, make_pruner("dcp_progressive", num_tokens=8))
    model.generate(**make_inputs(PROMPTS[0]), max_new_tokens=1)
    assert handle.last is not None
    assert "LlavaForConditionalGeneration" in repr(handle)
    handle.remove()
    handle.remove()
    assert traces(model) == before


def test_a_rule_of_allowed_tokens_sees_the_prompt_of_each_sample(model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(PROMPTS[0], PROMPTS[1])
    prompt = inputs["input_ids"]
    rows = []

    def allowed(row: int, ids: Tensor) -> list[int]:
        assert torch.equal(ids[: prompt.shape[1]], prompt[row // 3])
        rows.append(row)
        return [7 + row]

    with prune(model, make_pruner("cls_attention", num_tokens=8)):
        ids = model.generate(
            **inputs, max_new_tokens=1, do_sample=True, num_return_sequences=3, prefix_allowed_tokens_fn=allowed
        )
    assert rows == list(range(6))
    assert new_tokens(ids, inputs).flatten().tolist() == [7, 8, 9, 10, 11, 12]
