"""The parts of the vLLM plug-in that need no vLLM: settings, words, requests, the cache, versions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dcp_prune.errors import InvalidInputError, UnknownPrunerError, UnsupportedModelError
from dcp_prune.integrations.vllm import pruned_architecture
from dcp_prune.integrations.vllm._compat import check_version
from dcp_prune.integrations.vllm.cache import LRUCache, tensor_bytes
from dcp_prune.integrations.vllm.request import ImageRequest, from_inputs, to_inputs
from dcp_prune.integrations.vllm.settings import Settings
from dcp_prune.integrations.vllm.words import Words, turn_ends
from dcp_prune.registry import get_pruner, list_pruners
from dcp_prune.testbed.language import make_tokenizer, vocabulary
from dcp_prune.tokens import VisualTokens

IMAGE, BOS, ASK, END = 9, 1, 7, 8
"""The placeholder, a special token, and the two tokens that end a turn."""


def settings_of(**given: Any) -> Settings:
    return Settings.of(SimpleNamespace(dcp_prune=given))


def words(scope: Any, *prompt: int, images: int | None = None) -> list[tuple[int, ...]]:
    finder = Words(scope, IMAGE, frozenset({BOS}), ((ASK, END),))
    return finder.find(prompt, prompt.count(IMAGE) if images is None else images)


def test_the_plugin_loads_without_vllm_or_anything_heavy() -> None:
    code = "import sys, dcp_prune.integrations.vllm as plugin; print(plugin.register.__name__, sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.startswith("register")
    assert not {"'vllm'", "'torch'", "'transformers'"} & set(done.stdout.split(", "))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_where_vllm_has_to_be_tested_its_absence_is_a_failure() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/vllm_plugin"]
    asked = {**os.environ, "DCP_PRUNE_TEST_VLLM": "1"}
    done = subprocess.run(
        command, check=False, cwd=Path(__file__).parents[2], env=asked, text=True, capture_output=True
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "vLLM is not installed, so nothing of it would be tested; run: make test-vllm" in done.stderr


def test_architectures_are_mapped_by_name() -> None:
    assert pruned_architecture("LlavaForConditionalGeneration") == "DcpLlavaForConditionalGeneration"
    assert pruned_architecture("LlavaNextForConditionalGeneration") == "DcpLlavaNextForConditionalGeneration"
    assert pruned_architecture("BertModel") is None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "does not say how many visual tokens to keep"),
        ({"num_token": 16}, "no setting 'num_token'; did you mean num_tokens?"),
        ({"num_tokens": 0}, "num_tokens must be a whole number of at least 1, got 0"),
        ({"num_tokens": 16.5}, "num_tokens must be a whole number"),
        ({"num_tokens": [8, 128]}, "vLLM has to know before it sees one; give num_tokens as one number"),
        ({"num_tokens": 16, "options": {"max_distance": 0.1}}, "without max_distance"),
        ({"num_tokens": 16, "text_scope": "all"}, "text_scope must be one of turn, prompt, none, got 'all'"),
        ({"num_tokens": 16, "options": 3}, "options must be an object"),
        ({"num_tokens": 16, "options": {"keep_ratio": 0.1}}, "the budget is num_tokens beside options"),
        ({"num_tokens": 16, "options": {"threshhold": 1}}, "did you mean threshold?"),
        ({"num_tokens": 16, "options": {"scope": "tile"}}, "scope 'tile' lets the size of an image decide"),
        ({"num_tokens": 16, "turn_end": ""}, "turn_end must be a text"),
        ({"num_tokens": 16, "max_images_per_batch": 0}, "max_images_per_batch must be a whole number of at least 1"),
        ({"num_tokens": 16, "stage1_cache_mb": -1}, "stage1_cache_mb must be a whole number of at least 0"),
        ({"num_tokens": 16, "pruner": "mmtok", "text_scope": "none"}, "'mmtok' cannot choose without the question"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        settings_of(**given)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_pruner_is_refused_with_a_near_name() -> None:
    with pytest.raises(UnknownPrunerError, match="did you mean dcp"):
        settings_of(num_tokens=16, pruner="dpc")


def test_a_model_without_settings_is_told_how_to_write_them() -> None:
    with pytest.raises(InvalidInputError, match=re.escape('"dcp_prune": {"num_tokens": 16}')):
        Settings.of(SimpleNamespace())


@pytest.mark.parametrize("name", list_pruners())
def test_every_registered_pruner_can_be_named(name: str) -> None:
    if get_pruner(name).text_space != "embeddings":
        with pytest.raises(InvalidInputError, match="which vLLM keeps in fused projections; use dcp here"):
            settings_of(num_tokens=16, pruner=name)
        return
    settings = settings_of(num_tokens=16, pruner=name)
    assert settings.make_pruner(4).budget.num_tokens == 4
    assert Settings.of(SimpleNamespace(dcp_prune=settings.as_overrides())) == settings


def test_pruners_that_let_images_bear_on_each_other_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="batches images of different requests"):
        settings_of(num_tokens=16, pruner="cdpruner", options={"relevance_extent": "batch"})


def test_the_fingerprint_tells_pruners_and_options_apart_but_not_budgets() -> None:
    prints = {
        settings_of(num_tokens=k, pruner=name, options=options).fingerprint
        for k in (8, 16)
        for name, options in (("dcp", {}), ("dcp", {"text_weight": 0.5}), ("dcp_progressive", {}))
    }
    assert len(prints) == 3


def test_words_of_an_image_reach_from_it_to_the_end_of_its_turn() -> None:
    assert words("turn", BOS, 2, IMAGE, 3, 4, ASK, END) == [(3, 4, ASK, END)]
    assert words("turn", BOS, IMAGE, 3, ASK, END, 5, ASK, END) == [(3, ASK, END)]


def test_words_of_an_image_do_not_change_as_the_conversation_goes_on() -> None:
    first = (BOS, IMAGE, 3, ASK, END)
    assert [*words("turn", *first), (5, ASK, END)] == words("turn", *first, 2, IMAGE, 5, ASK, END)


def test_each_of_several_images_has_its_own_words_and_neighbours_share_them() -> None:
    assert words("turn", IMAGE, 3, IMAGE, 4, ASK, END) == [(3,), (4, ASK, END)]
    assert words("turn", IMAGE, IMAGE, 4, ASK, END) == [(4, ASK, END)] * 2


def test_a_question_in_front_of_its_image_counts_where_none_follows() -> None:
    assert words("turn", BOS, 5, 2, ASK, END, 3, 4, IMAGE, ASK, END)[0] == (3, 4, ASK, END)


def test_the_scope_of_the_prompt_gives_every_image_all_words_and_the_scope_none_gives_none() -> None:
    prompt = (BOS, 2, IMAGE, 3, ASK, END, IMAGE, 4)
    assert words("prompt", *prompt) == [(2, 3, ASK, END, 4)] * 2
    assert words("none", *prompt) == [(), ()]


def test_prompts_without_words_or_with_too_few_placeholders_give_no_words() -> None:
    assert words("turn", BOS, IMAGE, IMAGE) == [(), ()]
    assert words("turn", BOS, IMAGE, 3, images=2) == [(3,), ()]
    assert words("turn", BOS, 3, images=0) == []


def test_the_end_of_a_turn_is_read_from_the_chat_template() -> None:
    tokenizer = make_tokenizer(vocabulary())
    assert turn_ends(tokenizer) == ((tokenizer.convert_tokens_to_ids("ASSISTANT:"),),)
    assert turn_ends(tokenizer, "USER:") == ((tokenizer.convert_tokens_to_ids("USER:"),),)
    tokenizer.chat_template = None
    assert turn_ends(tokenizer) == ((tokenizer.eos_token_id,),)


def test_requests_survive_the_way_to_the_model() -> None:
    requests = [ImageRequest.of(16, (3, 4), "a"), ImageRequest.of(4, (), "b"), ImageRequest.of(4, (5,), None)]
    assert from_inputs(to_inputs(requests)) == requests
    assert [request.is_real for request in requests] == [True, True, False]
    assert len({request.key for request in requests}) == 3


def test_requests_that_were_lost_on_the_way_are_missed() -> None:
    with pytest.raises(InvalidInputError, match="without their budget and question"):
        from_inputs({"pixel_values": torch.zeros(1)})


@pytest.mark.parametrize("asked", [17, 0, -1, 2.0, "8", True])
def test_a_request_gets_at_most_the_budget_of_the_server(asked: Any) -> None:
    settings = settings_of(num_tokens=16)
    assert [settings.budget_of(given) for given in (None, 1, 16)] == [16, 1, 16]
    with pytest.raises(InvalidInputError, match="an image may have 1 to 16 visual tokens on this server"):
        settings.budget_of(asked)


def test_the_cache_keeps_what_was_used_last_within_its_bytes() -> None:
    cache = LRUCache[str](100)
    cache.put("a", "A", 60)
    cache.put("b", "B", 40)
    assert cache.get("a") == "A"
    cache.put("c", "C", 30)  # b was not used for longest
    assert [cache.get(key) for key in "abc"] == ["A", None, "C"]
    assert (cache.hits, cache.lookups, cache.size, len(cache)) == (3, 4, 90, 2)
    cache.put("d", "D", 101)
    assert cache.get("d") is None
    cache.put("a", "A", 10)
    assert cache.size == 40


def test_the_size_of_tokens_counts_every_tensor() -> None:
    tokens = VisualTokens.from_features(torch.zeros(1, 4, 8), cls_attention=torch.zeros(1, 4))
    assert tensor_bytes(tokens) >= 4 * 8 * 4 * 2


@pytest.mark.parametrize("version", ["0.30.2", "0.9.2"])
def test_an_old_vllm_is_refused(version: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"install 0\.31 to 0\.32"):
        check_version(version)


@pytest.mark.parametrize("version", ["0.33.0", "1.0", "dev"])
def test_an_unknown_vllm_is_warned_of(version: str) -> None:
    with pytest.warns(UserWarning, match="compare some answers first"):
        check_version(version)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("version", ["0.31.0", "0.32.0+cpu", "0.32.1rc2"])
def test_a_known_vllm_passes_in_silence(version: str) -> None:
    check_version(version)
