"""`prune_inputs`: inputs in, shorter inputs out, the model left alone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dcp_prune.errors import InvalidInputError, MissingSignalError, NonFiniteError
from dcp_prune.integrations.transformers import ShortInputs, encode_images, prune_inputs
from dcp_prune.pruners.base import Pruner, ScorePruner
from dcp_prune.registry import make_pruner
from dcp_prune.tokens import Signal, VisualTokens

IMAGE_ID, N = 4, 36
MakeInputs = Callable[..., dict[str, Any]]
PROMPTS = ("USER: <image> what is this ASSISTANT:", "USER: <image> <image> where is the cat", "what is the dog here")


@dataclass(frozen=True, kw_only=True)
class ListeningPruner(ScorePruner):
    """Keeps what it was shown."""

    requires: ClassVar[frozenset[Signal]] = frozenset({Signal.TEXT})
    seen: ClassVar[list[VisualTokens]] = []

    @property
    def joint(self) -> bool:
        return True  # shown a whole batch at once

    def score(self, tokens: VisualTokens) -> Tensor:
        self.seen.append(tokens)
        return tokens.features.sum(dim=-1)


def questions(model: Any) -> list[list[int]]:
    """Ids of the words in the latest question that `ListeningPruner` heard, one list per image."""
    tokens = ListeningPruner.seen[-1]
    assert tokens.text is not None
    assert tokens.text_mask is not None
    table = model.get_input_embeddings().weight
    found = (tokens.text.unsqueeze(2) == table).all(dim=-1).int().argmax(dim=-1)
    return [row[mask].tolist() for row, mask in zip(found, tokens.text_mask, strict=True)]


def full_run_with_dropped_columns_masked(model: Any, inputs: dict[str, Any], short: ShortInputs) -> Tensor:
    """Logits of an unpruned run in which no token may attend to a dropped placeholder, at the columns that are left."""
    assert short.columns is not None
    assert short.record is not None
    assert short.features is not None
    features = torch.zeros(len(short.features), N, short.features.shape[-1], dtype=short.features.dtype)
    features = features.scatter(1, short.record.indices.unsqueeze(-1).expand_as(short.features), short.features)
    columns = short.columns.clamp(min=0)
    mask = torch.zeros_like(inputs["attention_mask"]).scatter_add(1, columns, (short.columns >= 0).long()).clamp(max=1)
    mask = mask * inputs["attention_mask"]
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    places = (inputs["input_ids"] == IMAGE_ID).unsqueeze(-1)
    logits = model(
        inputs_embeds=embeddings.masked_scatter(places, features),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    ).logits
    return logits.gather(1, columns.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_logits_equal_a_full_run_with_the_dropped_columns_masked(
    pristine_model: Any, make_inputs: MakeInputs, pruner: Pruner, padding_side: str
) -> None:
    inputs = make_inputs(*PROMPTS, padding_side=padding_side)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    short = prune_inputs(pristine_model, inputs, pruner)
    with torch.no_grad():
        logits = pristine_model(**short.inputs).logits
        oracle = full_run_with_dropped_columns_masked(pristine_model, inputs, short)
    real = short.tensors["attention_mask"].bool()
    assert logits.shape[1] < inputs["input_ids"].shape[1]
    torch.testing.assert_close(logits[real], oracle[real], rtol=1e-4, atol=2e-5)


def test_the_oracle_can_fail(pristine_model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    short = prune_inputs(pristine_model, inputs, make_pruner("cls_attention", num_tokens=8))
    assert short.record is not None
    other = replace(short, record=replace(short.record, indices=(short.record.indices + 1) % N))
    with torch.no_grad():
        right, wrong = (full_run_with_dropped_columns_masked(pristine_model, inputs, each) for each in (short, other))
    real = short.tensors["attention_mask"].bool()
    assert (right - wrong)[real].abs().max() > 1e-2


def test_without_stages_the_features_are_rows_of_the_models_own(pristine_model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    short = prune_inputs(pristine_model, inputs, make_pruner("cls_attention", num_tokens=8))
    with torch.no_grad():
        own = torch.stack(tuple(pristine_model.get_image_features(inputs["pixel_values"]).pooler_output))
    assert short.record is not None
    assert short.features is not None
    assert torch.equal(short.features, own.gather(1, short.record.indices.unsqueeze(-1).expand_as(short.features)))


def test_each_image_keeps_exactly_the_budget_and_all_text_stays(
    pristine_model: Any, make_inputs: MakeInputs, pruner: Pruner
) -> None:
    inputs = make_inputs(*PROMPTS)
    short = prune_inputs(pristine_model, inputs, pruner)
    placeholders = short.tensors["input_ids"] == IMAGE_ID
    assert placeholders.sum(dim=1).tolist() == [8, 16, 0]
    for row in range(3):
        before, after = (each["input_ids"][row][each["attention_mask"][row].bool()] for each in (inputs, short.tensors))
        assert after[after != IMAGE_ID].tolist() == before[before != IMAGE_ID].tolist()


def test_the_record_tells_what_was_done(pristine_model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    record = prune_inputs(pristine_model, inputs, make_pruner("dcp_progressive", num_tokens=8)).record
    assert record is not None
    assert (record.tokens_before, record.tokens_after) == (N, 8)
    assert (record.prompt_before, record.prompt_after) == (77, 77 - 2 * (N - 8))
    assert record.rows.tolist() == [0, 1, 1]
    assert record.indices.shape == (3, 8)
    assert (record.indices.diff(dim=1) > 0).all()
    assert record.assignment.shape == (3, N)
    assert torch.equal(record.assignment.gather(1, record.indices), torch.arange(8).expand(3, 8))
    assert record.kappa is not None
    assert record.kappa.shape == (3,)
    assert record.reselected is not None
    assert set(record.milliseconds) == {"encode", "select", "prompt"}
    assert all(value > 0 for value in record.milliseconds.values())
    assert record.stage_stats, "DCP-Prune reduces inside this encoder"


def test_a_padded_batch_equals_single_rows(pristine_model: Any, make_inputs: MakeInputs, pruner: Pruner) -> None:
    batch = prune_inputs(pristine_model, make_inputs(*PROMPTS), pruner)
    singles = [
        prune_inputs(pristine_model, make_inputs(PROMPTS[0], seeds=[0]), pruner),
        prune_inputs(pristine_model, make_inputs(PROMPTS[1], seeds=[1, 2]), pruner),
        prune_inputs(pristine_model, make_inputs(PROMPTS[2]), pruner),
    ]
    assert batch.record is not None
    chosen = torch.cat([single.record.indices for single in singles if single.record is not None])
    assert torch.equal(batch.record.indices, chosen)
    with torch.no_grad():
        together = pristine_model(**batch.inputs).logits[:, -1]
        alone = torch.cat([pristine_model(**single.inputs).logits[:, -1] for single in singles])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_adjacent_images_are_told_apart(pristine_model: Any, make_inputs: MakeInputs) -> None:
    pruner = make_pruner("cls_attention", num_tokens=8)
    both = prune_inputs(pristine_model, make_inputs("<image> <image> what", seeds=[0, 1]), pruner).record
    second = prune_inputs(pristine_model, make_inputs("<image> what", seeds=[1]), pruner).record
    assert both is not None
    assert second is not None
    assert torch.equal(both.indices[1:], second.indices)
    assert not torch.equal(both.indices[0], both.indices[1])


def test_sdpa_and_eager_choose_the_same_tokens(model: Any, make_inputs: MakeInputs, pruner: Pruner) -> None:
    inputs = make_inputs(*PROMPTS)
    chosen = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        record = prune_inputs(model, inputs, pruner).record
        assert record is not None
        chosen.append(record.indices)
    assert torch.equal(*chosen)


def test_bfloat16_keeps_its_dtype_and_runs(model: Any, make_inputs: MakeInputs, pruner: Pruner) -> None:
    short = prune_inputs(model.to(torch.bfloat16), make_inputs(*PROMPTS), pruner)
    assert short.features is not None
    assert short.features.dtype == torch.bfloat16
    assert (
        model.generate(**short.inputs, max_new_tokens=2, do_sample=False).shape[1]
        == short.tensors["input_ids"].shape[1] + 2
    )


@pytest.mark.parametrize("budget", [{"num_tokens": N}, {"num_tokens": 999}, {"keep_ratio": 1.0}])
def test_a_budget_that_drops_nothing_returns_the_inputs_and_says_so(
    pristine_model: Any, make_inputs: MakeInputs, budget: dict[str, Any]
) -> None:
    inputs = make_inputs(*PROMPTS)
    with pytest.warns(UserWarning, match="nothing was pruned: .* keeps all 36 visual tokens") as caught:
        short = prune_inputs(pristine_model, inputs, make_pruner("dcp_progressive", **budget))
    assert caught[0].filename == __file__
    assert short.inputs.keys() == inputs.keys()
    assert all(short.inputs[name] is inputs[name] for name in inputs)
    assert short.record is not None
    assert short.record.tokens_after == N


def test_a_prompt_without_images_comes_back_unchanged_and_silently(
    pristine_model: Any, make_inputs: MakeInputs, pruner: Pruner
) -> None:
    inputs = make_inputs(PROMPTS[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = prune_inputs(pristine_model, inputs, pruner)
    assert short.record is None
    assert all(short.inputs[name] is inputs[name] for name in inputs)


def test_one_encoder_pass_serves_many_questions_and_pruners(pristine_model: Any, make_inputs: MakeInputs) -> None:
    pruners = [make_pruner(name, num_tokens=8) for name in ("cls_attention", "random", "uniform")]
    prompts = [f"<image> {word} is this" for word in ("what", "where")]
    pixels = make_inputs("<image> what", seeds=[5])["pixel_values"]
    encoded = encode_images(pristine_model, pixels, *pruners).select([0, 0])
    for pruner in pruners:
        direct = make_inputs(*prompts, seeds=[5, 5])
        expected = prune_inputs(pristine_model, direct, pruner)
        del direct["pixel_values"]
        shared = prune_inputs(pristine_model, direct, pruner, encoded=encoded)
        assert shared.features is not None
        torch.testing.assert_close(shared.features, expected.features)
        assert "mm_encoder_outputs" in shared.inputs


def test_a_shared_pass_needs_equal_stages(pristine_model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs("<image> what")
    plain, staged = make_pruner("random", num_tokens=8), make_pruner("dcp_progressive", num_tokens=8)
    with pytest.raises(InvalidInputError, match="cannot share a pass"):
        encode_images(pristine_model, inputs["pixel_values"], plain, staged)
    encoded = encode_images(pristine_model, inputs["pixel_values"], plain)
    with pytest.raises(InvalidInputError, match="were encoded with the stages"):
        prune_inputs(pristine_model, inputs, staged, encoded=encoded)


def test_encoded_images_without_the_needed_signal_are_refused(pristine_model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs("<image> what")
    encoded = encode_images(pristine_model, inputs["pixel_values"], make_pruner("random", num_tokens=8))
    with pytest.raises(MissingSignalError, match="cls_attention"):
        prune_inputs(pristine_model, inputs, make_pruner("cls_attention", num_tokens=8), encoded=encoded)


def test_a_signal_that_the_model_never_gives_is_refused_before_encoding_and_can_be_brought_along(
    pristine_model: Any, make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs("<image> what")
    pruner = make_pruner("cdpruner", num_tokens=8)
    encoded = encode_images(pristine_model, inputs["pixel_values"], pruner)
    with pytest.raises(MissingSignalError, match="clip_similarity, which these tokens do not carry"):
        prune_inputs(pristine_model, inputs, pruner, encoded=encoded)
    similarity = torch.linspace(0.0, 0.3, N).unsqueeze(0)
    brought = replace(encoded, tokens=replace(encoded.tokens, clip_similarity=similarity))
    short = prune_inputs(pristine_model, inputs, pruner, encoded=brought)
    assert short.features is not None
    assert short.features.shape[1] == 8
    monkeypatch.setattr(
        "dcp_prune.integrations.transformers.images.encode",
        lambda *a: pytest.fail("the images were encoded for nothing"),
    )
    with pytest.raises(MissingSignalError, match="LlavaForConditionalGeneration does not give"):
        prune_inputs(pristine_model, inputs, pruner)


@pytest.mark.parametrize("batch_drop", ["image", "largest"])
def test_images_that_lose_tokens_at_their_own_pace_equal_images_alone(
    deep_model: Any, make_inputs: MakeInputs, batch_drop: str
) -> None:
    pruner = make_pruner("flowcut", num_tokens=4, batch_drop=batch_drop)
    together = prune_inputs(deep_model, make_inputs("<image> <image> <image> <image> what"), pruner)
    alone = [prune_inputs(deep_model, make_inputs("<image> what", seeds=[seed]), pruner) for seed in range(4)]
    assert together.record is not None
    assert together.features is not None

    def counts(short: ShortInputs) -> Tensor:
        assert short.record is not None
        return torch.stack([stats["num_tokens"] for stats in short.record.stage_stats if stats], dim=1)

    own = torch.cat([counts(short) for short in alone])
    assert (own[:, :-1] != own[:1, :-1]).any(), "this test needs images that differ"
    if batch_drop == "largest":
        assert (counts(together) == counts(together)[:1]).all()
        assert (counts(together)[:, 0] == own[:, 0].min()).all()
        return
    assert torch.equal(counts(together), own)
    for row, short in enumerate(alone):
        assert short.record is not None
        assert short.features is not None
        assert torch.equal(together.record.indices[row], short.record.indices[0])
        assert torch.equal(together.record.assignment[row], short.record.assignment[0])
        torch.testing.assert_close(together.features[row], short.features[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("flowcut", r"attention at encoder layer \d holds NaN or inf"),
        ("dcp_progressive", "visual features hold NaN or inf"),
    ],
)
def test_an_image_that_is_no_number_is_refused_inside_the_encoder_too(
    deep_model: Any, make_inputs: MakeInputs, name: str, sentence: str
) -> None:
    inputs = make_inputs("<image> what")
    inputs["pixel_values"][0, 0, 3, 5] = float("nan")
    with pytest.raises(NonFiniteError, match=sentence):
        prune_inputs(deep_model, inputs, make_pruner(name, num_tokens=4))


def test_inputs_can_be_used_again_after_beams_rewrote_them(model: Any, make_inputs: MakeInputs, pruner: Pruner) -> None:
    short = prune_inputs(model, make_inputs(PROMPTS[1]), pruner)
    first, second = (model.generate(**short.inputs, max_new_tokens=3, num_beams=3) for _ in range(2))
    assert torch.equal(first, second)


def test_restore_puts_the_original_prompt_back(model: Any, make_inputs: MakeInputs, pruner: Pruner) -> None:
    inputs = make_inputs(*PROMPTS)
    short = prune_inputs(model, inputs, pruner)
    ids = model.generate(**short.inputs, max_new_tokens=3, do_sample=False)
    restored = short.restore(ids)
    assert torch.equal(restored[:, :-3], inputs["input_ids"])
    assert torch.equal(restored[:, -3:], ids[:, -3:])


def test_logits_go_back_to_the_original_columns(pristine_model: Any, make_inputs: MakeInputs, pruner: Pruner) -> None:
    inputs = make_inputs(*PROMPTS)
    short = prune_inputs(pristine_model, inputs, pruner)
    with torch.no_grad():
        logits = pristine_model(**short.inputs).logits
    long = short.restore_logits(logits)
    assert long.shape[:2] == inputs["input_ids"].shape
    assert short.columns is not None
    for row, columns in enumerate(short.columns):
        real = columns >= 0
        assert torch.equal(long[row, columns[real]], logits[row, real])
        assert (long[row].abs().sum(dim=-1) > 0).sum() == real.sum(), "0 elsewhere"


def test_each_image_hears_the_question_of_its_own_row(
    pristine_model: Any, make_inputs: MakeInputs, processor: Any
) -> None:
    prune_inputs(pristine_model, make_inputs(*PROMPTS), ListeningPruner(num_tokens=8))
    spoken = [processor.tokenizer.convert_ids_to_tokens(words) for words in questions(pristine_model)]
    assert spoken == [["what", "is", "this", "ASSISTANT:"], *[["where", "is", "the", "cat"]] * 2]


def test_a_question_given_as_text_replaces_the_prompts_words(
    pristine_model: Any, make_inputs: MakeInputs, processor: Any
) -> None:
    inputs = make_inputs(PROMPTS[0], PROMPTS[1])
    pruner = ListeningPruner(num_tokens=8)
    prune_inputs(pristine_model, inputs, pruner, processor=processor, text=["red dog", "blue <s> cat and dog"])
    spoken = [processor.tokenizer.convert_ids_to_tokens(words) for words in questions(pristine_model)]
    assert spoken == [["red", "dog"], *[["blue", "cat", "and", "dog"]] * 2]
    with pytest.raises(InvalidInputError, match="text needs the processor"):
        prune_inputs(pristine_model, inputs, pruner, text="red dog")


def test_special_tokens_of_the_tokenizer_are_no_words_once_the_processor_is_known(
    pristine_model: Any, make_inputs: MakeInputs, processor: Any
) -> None:
    inputs = make_inputs("<image> what <unk> is")
    pruner = ListeningPruner(num_tokens=8)
    prune_inputs(pristine_model, inputs, pruner)
    assert len(questions(pristine_model)[0]) == 3
    prune_inputs(pristine_model, inputs, pruner, processor=processor)
    assert processor.tokenizer.convert_ids_to_tokens(questions(pristine_model)[0]) == ["what", "is"]


def test_a_text_aware_pruner_without_any_question_is_refused(pristine_model: Any, make_inputs: MakeInputs) -> None:
    with pytest.raises(MissingSignalError, match="text"):
        prune_inputs(pristine_model, make_inputs("<image>"), ListeningPruner(num_tokens=8))
    prune_inputs(pristine_model, make_inputs("<image>"), make_pruner("dcp_progressive", num_tokens=8))


def test_tensors_shaped_like_the_ids_are_shortened_along(pristine_model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(*PROMPTS)
    column = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
    inputs |= {"labels": column, "token_type_ids": column, "answer": "yes"}
    short = prune_inputs(pristine_model, inputs, make_pruner("uniform", num_tokens=8))
    assert short.columns is not None
    assert torch.equal(short.tensors["labels"], torch.where(short.columns < 0, -100, short.columns))
    assert torch.equal(short.tensors["token_type_ids"], short.columns.clamp(min=0))
    assert short.inputs["answer"] == "yes"


def test_rows_that_become_unequal_get_a_mask(pristine_model: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs("<image> <image> what", "<image> " + "what " * (N + 1))
    assert inputs.pop("attention_mask").all()
    short = prune_inputs(pristine_model, inputs, make_pruner("uniform", num_tokens=8))
    assert short.tensors["attention_mask"].sum(dim=1).tolist() == [2 * 8 + 1, 8 + N + 1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"input_ids": torch.tensor([[5, 6]])}, "holds no image placeholder"),
        ({"input_ids": torch.tensor([[IMAGE_ID, 6]])}, "no multiple of the 36 visual tokens"),
        ({"input_ids": torch.full((1, 2 * N), IMAGE_ID)}, "room for 2 image(s), but 1 were given"),
        ({"pixel_values": None}, "no image came with it"),
        ({"pixel_values": torch.zeros(2, 3, 84, 84)}, "room for 1 image(s), but 2 were given"),
        ({"pixel_values": torch.full((1, 3, 84, 84), torch.nan)}, "NaN or inf"),
        ({"input_ids": None}, "only together with input_ids"),
        ({"attention_mask": torch.ones(1, 1, 40, 40)}, "only with the 2-D mask"),
        ({"vision_feature_layer": -1}, "set model.config.vision_feature_layer"),
        ({"image_sizes": torch.tensor([[84, 84]])}, "cannot be set per call"),
    ],
)
def test_inputs_that_cannot_be_pruned_are_refused_in_one_sentence(
    pristine_model: Any, make_inputs: MakeInputs, pruner: Pruner, change: dict[str, Any], sentence: str
) -> None:
    inputs = make_inputs("<image> what is this") | {"attention_mask": None} | change
    with pytest.raises(InvalidInputError, match=re.escape(sentence)) as error:
        prune_inputs(pristine_model, inputs, pruner)
    assert "\n" not in str(error.value)
