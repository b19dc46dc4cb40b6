"""Pruners by name: lazily found, added by others, and near names suggested."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from dcp_prune import (
    DcpPruneError,
    DCPPruner,
    InvalidInputError,
    RandomPruner,
    UnknownPrunerError,
    get_pruner,
    list_pruners,
    make_pruner,
    register_pruner,
    registry,
)


@pytest.fixture(autouse=True)
def _leave_no_names_behind(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))


def test_the_built_in_pruners_are_listed_and_found():
    assert {"dcp", "random", "uniform", "cls_attention"} <= set(list_pruners())
    assert list(list_pruners()) == sorted(list_pruners())
    assert get_pruner("dcp") is DCPPruner


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(UnknownPrunerError, match="no pruner is named 'randon'; did you mean random") as refused:
        get_pruner("randon")
    assert not str(refused.value).startswith("'"), "a sentence, not the repr of one"
    with pytest.raises(UnknownPrunerError, match="did you mean dcp"):
        get_pruner("DCP")


def test_a_name_like_no_other_is_answered_with_all_of_them():
    with pytest.raises(UnknownPrunerError, match=r"there are .*cls_attention, .*uniform"):
        get_pruner("zzzzzz")


def test_a_pruner_is_made_with_its_options():
    assert make_pruner("random", num_tokens=4, seed=7) == RandomPruner(num_tokens=4, seed=7)


def test_an_unknown_option_is_answered_with_the_one_that_was_meant():
    with pytest.raises(InvalidInputError, match="no option 'num_token'; did you mean num_tokens"):
        make_pruner("dcp", num_token=16)
    with pytest.raises(InvalidInputError, match="it has num_tokens, keep_ratio"):
        make_pruner("uniform", num_tokens=16, colour="red")


def test_a_pruner_can_be_registered_as_a_class_or_as_a_place():
    register_pruner("mine", RandomPruner)
    register_pruner("theirs", "dcp_prune.pruners.random:RandomPruner")
    assert get_pruner("mine") is get_pruner("theirs") is RandomPruner
    assert {"mine", "theirs"} <= set(list_pruners())


def test_a_name_cannot_be_taken_twice():
    register_pruner("mine", RandomPruner)
    register_pruner("mine", RandomPruner)
    with pytest.raises(InvalidInputError, match="'mine' is already registered"):
        register_pruner("mine", DCPPruner)
    with pytest.raises(InvalidInputError, match="'dcp' is already registered"):
        register_pruner("dcp", "elsewhere:Pruner")


def test_a_place_must_name_a_module_and_a_class():
    with pytest.raises(InvalidInputError, match="module:Class"):
        register_pruner("mine", "just_a_module")


def test_a_place_that_cannot_be_imported_is_named():
    register_pruner("gone", "dcp_prune.pruners.gone:GonePruner")
    with pytest.raises(DcpPruneError, match=r"'gone' is registered as 'dcp_prune\.pruners\.gone:GonePruner'"):
        get_pruner("gone")


def test_entry_points_of_other_packages_are_found_but_do_not_replace_built_in_names(monkeypatch):
    group = registry.ENTRY_POINT_GROUP
    points = EntryPoints(
        (
            EntryPoint("foreign", "dcp_prune.pruners.random:RandomPruner", group),
            EntryPoint("dcp", "dcp_prune.pruners.random:RandomPruner", group),
        )
    )
    monkeypatch.setattr(registry, "entry_points", points.select)
    assert "foreign" in list_pruners()
    assert get_pruner("foreign") is RandomPruner
    assert get_pruner("dcp") is DCPPruner


def test_listing_pruners_imports_none_of_them():
    code = "import sys, dcp_prune; dcp_prune.list_pruners(); assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
