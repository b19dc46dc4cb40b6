"""Who takes part in an evaluation: a pruner with its options, its budget, and what it reads of the question."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from dcp_prune.budget import is_range
from dcp_prune.errors import InvalidInputError
from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import get_pruner, make_pruner
from dcp_prune.tokens import Signal

ALL_TOKENS = "none"
"""Name under which the unpruned model, and the model without any image, take part."""

TextKind = Literal["question", "lookup", "none", "wrong", "noise"]


@dataclass(frozen=True)
class TextCondition:
    """What the pruner reads; the language model always reads the right question.

    Attributes:
        kind: `question` (the right one), `lookup` (the right one, in the terms of the language model's first attention
            layer, whatever the pruner's own `text_space`), `none`, `wrong` (the question of the same slot of another
            image) or `noise` (the right one, its word embeddings mixed with noise).
        noise: share of noise, in [0, 1]; 0 unless the kind is `noise`.
    """

    kind: TextKind = "question"
    noise: float = 0.0

    def __str__(self) -> str:
        return f"noise={self.noise:g}" if self.kind == "noise" else self.kind

    @classmethod
    def parse(cls, text: str) -> TextCondition:
        """A condition as it is written behind the `@` of a spec.

        Raises:
            InvalidInputError: no such condition, or a share outside [0, 1].
        """
        kind, equals, share = text.partition("=")
        if kind == "noise" and equals:
            try:
                value = float(share)
            except ValueError:
                value = math.nan
            if 0.0 <= value <= 1.0:
                return cls("noise", value)
            raise InvalidInputError(f"the share of noise in @{text} must be a number from 0 to 1")
        if not equals and kind != "noise" and kind in get_args(TextKind):
            return cls(kind)  # type: ignore[arg-type]
        raise InvalidInputError(f"there is no condition @{text}; use @question, @lookup, @none, @wrong or @noise=SHARE")


QUESTION = TextCondition()


@dataclass(frozen=True)
class Method:
    """One contender: a pruner at a budget, the unpruned model (`num_tokens` is None), or no image (0).

    Attributes:
        name: the label, unique together with `num_tokens`: the spec as it was written, or `ALL_TOKENS`.
        num_tokens: visual tokens that the language model reads, of a range the most; None for all.
        pruner: None where nothing is selected.
        text: what the pruner reads of the question.
        registered: the pruner's registered name, where it is not the label itself.
    """

    name: str
    num_tokens: int | None
    pruner: Pruner | None = None
    text: TextCondition = QUESTION
    registered: str = ""

    @property
    def reads_text(self) -> bool:
        """Whether the selection depends on the question."""
        return self.pruner is not None and Signal.TEXT in self.pruner.requires | self.pruner.optional

    @property
    def is_adaptive(self) -> bool:
        """Whether every question gets a number of tokens of its own."""
        return self.pruner is not None and self.pruner.budget.is_range

    @property
    def options(self) -> dict[str, Any]:
        """The pruner's whole configuration as plain JSON values, without a fixed budget and what only a range needs."""
        fields = {} if self.pruner is None else asdict(self.pruner)
        left_out = {"keep_ratio"} | (set() if self.is_adaptive else {"num_tokens", "max_distance", "bounded"})
        if fields.get("scope") == "image":
            left_out.add("scope")
        return {name: _plain(value) for name, value in fields.items() if name not in left_out}


@dataclass(frozen=True)
class Spec:
    """A pruner as it is written: `name`, `name(field=value, ...)`, and `@condition` behind it.

    With `num_tokens=(fewest, most)` among the fields it has a budget of its own, whatever others keep.

    Attributes:
        label: the text itself.
        pruner: registered name, or `ALL_TOKENS`.
        options: the fields that were set.
        text: the condition.
    """

    label: str
    pruner: str
    options: dict[str, Any]
    text: TextCondition

    @property
    def is_adaptive(self) -> bool:
        """Whether the spec brings its own budget, a range."""
        return "num_tokens" in self.options

    def at(self, num_tokens: int, options: dict[str, Any] | None = None) -> Method:
        """The method at this budget, or at its own; `options` hold for fields that the spec does not set.

        Raises:
            InvalidInputError: the pruner refuses an option or the budget, or a condition on a text it does not read.
        """
        if self.pruner == ALL_TOKENS:
            return Method(self.label, None)
        pruner = make_pruner(self.pruner, **{"num_tokens": num_tokens, **(options or {}), **self.options})
        most = max(self.options["num_tokens"]) if self.is_adaptive else num_tokens
        method = Method(self.label, most, pruner, self.text, self.pruner)
        if self.text != QUESTION and not method.reads_text:
            raise InvalidInputError(f"{self.label}: {self.pruner} does not read the question; leave out @{self.text}")
        return method


def parse_spec(text: str) -> Spec:
    """Reads `dcp`, `dcp(text_weight=0)`, `mmtok@wrong`, `dcp(anchors="saliency",recovery=5.0)@noise=0.5` and
    `dcp(max_distance=0.05,num_tokens=(8,128))`; values are Python literals or `inf`.

    A field of a group, as `DCPPruner.tatcs` is one, is written by its own name: `make_pruner` finds the group.

    Raises:
        UnknownPrunerError: no pruner of that name.
        InvalidInputError: anything else that cannot be read, in one sentence.
    """
    label = text.strip()
    call, at, condition = label.rpartition("@") if "@" in label.rpartition(")")[2] else (label, "", "")
    name, options = _parse_call(call.strip(), label)
    spec = Spec(label, name, options, TextCondition.parse(condition.strip()) if at else QUESTION)
    if name == ALL_TOKENS:
        if label != ALL_TOKENS:
            raise InvalidInputError(f"{label!r}: {ALL_TOKENS} selects nothing, so it takes neither options nor @text")
        return spec
    get_pruner(name)
    budget = [field for field in ("num_tokens", "keep_ratio") if field in options]
    if "max_distance" in options:
        if not is_range(options.get("num_tokens")):
            raise InvalidInputError(
                f"{label!r} has a bound but no range to pick from; write the range as well, as in "
                f"{name}(max_distance=0.05,num_tokens=(8,128))"
            )
    elif budget:
        raise InvalidInputError(
            f"{label!r} sets {budget[0]}, which all pruners share; give it as the budget instead, or max_distance "
            "beside a range"
        )
    return spec


def plan(specs: Sequence[str], budgets: Sequence[int], options: dict[str, Any] | None = None) -> tuple[Method, ...]:
    """The methods for these specs and budgets, without duplicates.

    `none` stands for all tokens whatever the budget, and budget 0 for no image whatever the pruner; a spec with a range
    takes part once.

    Args:
        specs: as `parse_spec` reads them.
        budgets: numbers of visual tokens, 0 included.
        options: further fields of every pruner.

    Raises:
        UnknownPrunerError: an unknown name.
        InvalidInputError: no spec, no budget, a spec that cannot be read, or a budget that is negative or no whole
            number.
    """
    if not specs or not budgets:
        raise InvalidInputError("name at least one pruner and one number of visual tokens")
    parsed = [parse_spec(text) for text in specs]
    methods: dict[tuple[str, int | None], Method] = {}
    if 0 in budgets:
        methods[ALL_TOKENS, 0] = Method(ALL_TOKENS, 0)
    for budget in budgets:
        for spec in parsed:
            if isinstance(budget, int) and budget == 0 and not spec.is_adaptive:
                continue
            method = spec.at(budget, options)
            methods.setdefault((method.name, method.num_tokens), method)
    return tuple(methods.values())


def _parse_call(call: str, label: str) -> tuple[str, dict[str, Any]]:
    if not call.endswith(")"):
        return call, {}
    name, _, arguments = call.partition("(")
    try:
        tree = ast.parse(f"f({arguments}", mode="eval").body
        if not isinstance(tree, ast.Call) or tree.args or not all(keyword.arg for keyword in tree.keywords):
            raise ValueError
        options = {str(keyword.arg): _literal(keyword.value) for keyword in tree.keywords}
        if len(options) < len(tree.keywords):
            raise ValueError
        return name.strip(), options
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two of signs and brackets in thousands
        shown = repr(label if len(label) <= 100 else f"{label[:97]}...")
        raise InvalidInputError(
            f"{shown} cannot be read; write name(field=value, ...) with numbers, 'text', True, False or None, "
            "each field once"
        ) from None


def _literal(node: ast.expr) -> Any:
    """A Python literal; `inf` counts as one, since some thresholds are."""
    infinite = ast.Name("inf", ast.Load())
    if ast.dump(node) == ast.dump(infinite):
        return math.inf
    return ast.literal_eval(node)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
