"""The usual way of scoring free answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBERS: dict[str, str] = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_ARTICLES = frozenset({"a", "an", "the"})


def normalised(answer: str) -> str:
    """An answer as VQA benchmarks compare it: lower case, without punctuation and articles, small numbers as digits.

    An answer of nothing but articles keeps them ("a" may be the letter of a choice).
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", answer.lower()).replace("'", "").replace("\u2019", "")
    words = re.sub(r"(?<!\d)[.:]|[.:](?!\d)|[^\w\s.:]|_", " ", text).split()
    kept = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_NUMBERS.get(word, word) for word in kept)


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 if the answer equals any of the truths, both `normalised`, else 0."""
    return float(normalised(answer) in {normalised(truth) for truth in truths})
