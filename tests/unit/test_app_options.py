"""What the app shows, without a browser: options as the dataclasses have them, and what it makes of a question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_prune.app.asking import ask, kv_cache_bytes, leaderboard, sweep
from dcp_prune.app.options import options_of, value_of
from dcp_prune.assistant import Assistant
from dcp_prune.errors import InvalidInputError, RecordsError
from dcp_prune.registry import list_pruners, make_pruner
from dcp_prune.testbed.model import make_model, make_processor
from tiny_llava import make_image


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant("tiny", make_model(0).eval(), make_processor())


@pytest.mark.parametrize("name", list_pruners())
def test_every_option_as_a_form_shows_it_means_its_default_and_is_taken(name: str) -> None:
    for each in options_of(name):
        plain = each.choices or isinstance(each.default, bool)
        value = value_of(each, each.default if plain else repr(each.default))
        assert value == each.default
        make_pruner(name, num_tokens=4, **{each.name: value})


def test_options_have_their_words_and_their_help() -> None:
    found = {each.name: each for each in options_of("dcp")}
    assert found["bounded"].choices == ("demand", "coverage")
    assert found["threshold"].help.startswith("re-select where the distance is above it")
    assert found["recovery"].help.startswith("A change switches acgr on.")
    assert not found.keys() & {"num_tokens", "keep_ratio", "acgr", "tatcs"}


def test_what_is_no_literal_is_refused() -> None:
    (schedule,) = [each for each in options_of("dcp") if each.name == "schedule"]
    with pytest.raises(InvalidInputError, match="schedule cannot be read"):
        value_of(schedule, "__import__('os')")


def test_the_record_says_what_was_kept_and_what_it_cost(assistant: Assistant) -> None:
    pruner = make_pruner("dcp", num_tokens=4)
    full, (shown,) = ask(assistant, make_image(0), "what is this ?", [("dcp", pruner)])
    record = shown.record
    assert record["num_tokens"] == len(record["indices"]) == len(shown.tokens) == 4
    assert full["prefill_tokens"] - record["prefill_tokens"] == record["num_original"] - 4
    assert sum(row[5] for row in shown.tokens) == sum(slot >= 0 for slot in record["assignment"])
    assert record["threshold"] == 0
    assert record["reselected"] is True


def test_the_size_of_the_cache_is_that_of_the_cache(assistant: Assistant) -> None:
    model: Any = assistant.model
    with torch.inference_mode():
        cache = model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(model, 3) == held


def test_a_sweep_has_a_row_for_each_budget_and_pruner(assistant: Assistant) -> None:
    make = [("A: random", lambda k: make_pruner("random", num_tokens=k))]
    rows = list(sweep(assistant, make_image(0), "what is this ?", make, [2, 4]))
    assert [(row["pruner"], row["tokens"]) for row in rows] == [("A: random", 2), ("A: random", 4)]


def test_a_leaderboard_of_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="holds no records of a sweep"):
        leaderboard(tmp_path)
