"""Specs are read as they are written, and what they cannot mean is refused."""

from __future__ import annotations

import json
import math

import pytest

from dcp_prune.errors import InvalidInputError, UnknownPrunerError
from dcp_prune.eval.specs import TextCondition, parse_spec, plan
from dcp_prune.registry import make_pruner


def test_a_spec_names_a_pruner_its_options_and_what_it_reads() -> None:
    spec = parse_spec(' dcp(text_weight=0, threshold=inf, schedule=((0.5, 0.5),), anchors="saliency")@noise=0.5 ')
    assert spec.pruner == "dcp"
    assert spec.options == {
        "text_weight": 0,
        "threshold": math.inf,
        "schedule": ((0.5, 0.5),),
        "anchors": "saliency",
    }
    assert spec.text == TextCondition("noise", 0.5)
    assert str(spec.text) == "noise=0.5"
    assert spec.label == 'dcp(text_weight=0, threshold=inf, schedule=((0.5, 0.5),), anchors="saliency")@noise=0.5'
    method = spec.at(16)
    assert (method.name, method.registered, method.num_tokens) == (spec.label, "dcp", 16)
    assert method.options["trigger"]["threshold"] == "inf"  # JSON has no inf
    assert method.options["acgr"]["schedule"] == [[0.5, 0.5]]


def test_the_options_of_a_record_make_the_pruner_again() -> None:
    method = parse_spec('dcp(text_weight=0,distance="kappa",threshold=0.5,recovery=(5.0,0.0))').at(16)
    assert make_pruner("dcp", num_tokens=16, **json.loads(json.dumps(method.options))) == method.pruner


def test_a_bare_name_is_a_spec() -> None:
    spec = parse_spec("mmtok")
    assert (spec.pruner, spec.options, str(spec.text)) == ("mmtok", {}, "question")
    assert parse_spec("mmtok@wrong").text.kind == "wrong"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("dcp(text_weight=)", "cannot be read"),
        ("dcp(0.5)", "cannot be read"),
        ("dcp(**{})", "cannot be read"),
        ("dcp(text_weight=open('x'))", "cannot be read"),
        ("dcp(text_weight=0,text_weight=1)", "each field once"),
        (f"dcp(text_weight={'-' * 100_000}1)", r"'dcp\(text_weight=-+\.\.\.' cannot be read"),
        (f"dcp(text_weight={'(' * 100_000})", "cannot be read"),
        ("dcp(text_weight=0", "no pruner is named"),
        ("dcp@loud", "no condition @loud"),
        ("dcp@noise", "no condition @noise"),
        ("dcp@noise=2", "from 0 to 1"),
        ("dcp@noise=nan", "from 0 to 1"),
        ("dcp(num_tokens=4)", "sets num_tokens"),
        ("dcp(num_tokens=(4,8))", "sets num_tokens.*or max_distance beside a range"),
        (
            "dcp(max_distance=0.1)",
            r"no range to pick from; write .* dcp\(max_distance=0.05,num_tokens=\(8,128\)\)",
        ),
        ("dcp(max_distance=0.1,num_tokens=4)", "no range to pick from"),
        ("none@wrong", "selects nothing"),
        ("none(a=1)", "no pruner is named|selects nothing"),
    ],
)
def test_what_is_no_spec_is_refused_in_one_sentence(text: str, complaint: str) -> None:
    with pytest.raises((InvalidInputError, UnknownPrunerError), match=complaint):
        parse_spec(text)


def test_a_condition_on_a_text_that_nobody_reads_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="random does not read the question"):
        plan(["random@wrong"], [16])


def test_options_that_the_pruner_lacks_are_refused_before_any_work() -> None:
    with pytest.raises(InvalidInputError, match="no option 'depth'"):
        plan(["random(depth=3)"], [16])


def test_two_settings_of_one_pruner_take_part_side_by_side() -> None:
    methods = plan(["dcp", "dcp(text_weight=0)", "dcp@none", "dcp"], [16])
    assert [method.name for method in methods] == ["dcp", "dcp(text_weight=0)", "dcp@none"]


def test_a_range_is_a_budget_of_its_own_beside_fixed_ones() -> None:
    label = "dcp(max_distance=0.1,num_tokens=(4,40))"
    methods = plan(["none", "dcp", label], [0, 16, 8])
    assert [(method.name, method.num_tokens) for method in methods] == [
        ("none", 0),
        (label, 40),
        ("none", None),
        ("dcp", 16),
        ("dcp", 8),
    ]
    assert [method.is_adaptive for method in methods] == [False, True, False, False, False]
    assert methods[1].options["max_distance"] == 0.1
    assert methods[1].options["num_tokens"] == [4, 40]
    assert not {"max_distance", "bounded", "num_tokens"} & methods[3].options.keys(), (
        "records of fixed budgets stay as they were"
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("dcp(max_distance=0.1,num_tokens=(8,4))", r"write it as \(4, 8\)"),
        ("dcp(max_distance=0.1,num_tokens=())", "fewest, most"),
        ("mmtok(max_distance=0.1,num_tokens=(4,8))", "no option 'max_distance'"),
    ],
)
def test_a_range_that_cannot_be_is_refused_before_any_work(text: str, complaint: str) -> None:
    with pytest.raises(InvalidInputError, match=complaint):
        plan([text], [16])
