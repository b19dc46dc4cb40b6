"""The smallest budget that surely keeps the wanted share of answers, and how sure that is, in words.

Budgets are tested one after the other from the largest down, see `decide`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dcp_prune.errors import InvalidInputError
from dcp_prune.eval.compare import Agreement, Comparison
from dcp_prune.eval.data.pictures import PictureQuestions
from dcp_prune.eval.statistics.bounds import fewest_images, images_needed, share_lower_bound
from dcp_prune.eval.statistics.intervals import CONFIDENCE


@dataclass(frozen=True)
class Verdict:
    """The smallest budget of one pruner that surely keeps the wanted agreement.

    Attributes:
        pruner: its name.
        keep: the wanted share of equal answers.
        confidence: with which the statement holds.
        num_tokens: the budget; None if none was shown to.
        tested: budgets from the largest down to the first that failed, if any did.
        measured: the smallest budget whose observed agreement, and that of all larger ones, is at least `keep`,
            however unsure; None if there is none.
        images_needed: about how many images like these would show the next budget that comes into question; None
            if none comes into question, or if no number would.
        sentence: all of this in words.
    """

    pruner: str
    keep: float
    confidence: float
    num_tokens: int | None
    tested: tuple[int, ...]
    measured: int | None
    images_needed: int | None
    sentence: str


def decide(comparison: Comparison, keep: float) -> tuple[Verdict, ...]:
    """For each pruner, the smallest budget that keeps the wanted agreement, and how sure that is.

    Budgets are tested one after the other from the largest down, each at the full confidence: does the lower bound of
    its agreement reach `keep`? The first that fails ends it, and the last that passed is the answer. A wrong answer
    needs the first budget on the way that is really too small to pass its own test, which happens with at most
    1 - confidence, so no correction for the number of budgets is due (fixed-sequence testing, Maurer, Hothorn and
    Lehmacher 1995). Several pruners share the error equally (Bonferroni).

    Args:
        comparison: from `compare`.
        keep: the wanted share of answers that stay the same, in (0, 1).

    Raises:
        InvalidInputError: `keep` lies outside (0, 1).
    """
    check_keep(keep)
    names = dict.fromkeys(answers.method.name for answers in comparison.answers)
    confidence = 1 - (1 - CONFIDENCE) / len(names)
    return tuple(_verdict(comparison, name, keep, confidence) for name in names)


def check_keep(keep: float) -> None:
    """Makes sure that `keep` is a share that can be shown.

    Raises:
        InvalidInputError: it is not.
    """
    if not 0 < keep < 1:
        raise InvalidInputError(
            f"the wanted agreement must be a share above 0 and below 1, got {keep}; no number of questions can prove 1"
        )


def too_few(questions: PictureQuestions, keep: float, pruners: int = 1) -> str | None:
    """Says, before anything is run, if even complete agreement could not show `keep` with so few images."""
    needed = fewest_images(keep, confidence=1 - (1 - CONFIDENCE) / pruners)
    images = len(questions.images)
    if images >= needed:
        return None
    return (
        f"with {_count(images, 'image')} even complete agreement cannot show that {_percent(keep)} of the answers stay "
        f"the same; that takes at least {_count(needed, 'image')}, however many questions are asked about each"
    )


def summarise(comparison: Comparison, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The result file's content but for model and environment: `results` per method, `verdicts`, every answer."""
    questions = comparison.questions
    sure = {verdict.pruner: verdict.confidence for verdict in verdicts}
    return {
        "images": len(questions.images),
        "questions": len(questions.asked),
        "all_tokens": asdict(comparison.cost),
        "results": [
            {
                "pruner": answers.method.name,
                "num_tokens": answers.method.num_tokens,
                "agreement": float(answers.same.mean()),
                "agreement_at_least": share_lower_bound(
                    answers.same, questions.cluster, confidence=sure[answers.method.name]
                ),
                "confidence": sure[answers.method.name],
                "exact_agreement": float(answers.exact.mean()),
                "kl_first_token_nats": float(answers.divergence.mean()),
                "kl_first_token_nats_median": float(np.median(answers.divergence)),
                "kappa": float(answers.kappa.mean()),
                **asdict(answers.cost),
            }
            for answers in comparison.answers
        ],
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "answers": [
            {
                "image": str(asked.image),
                "question": asked.question,
                "all_tokens": comparison.texts[at],
                "pruned": [
                    {
                        "pruner": answers.method.name,
                        "num_tokens": answers.method.num_tokens,
                        "answer": answers.texts[at],
                        "same": bool(answers.same[at]),
                        "kl_first_token_nats": float(answers.divergence[at]),
                        "kappa": float(answers.kappa[at]),
                    }
                    for answers in comparison.answers
                ],
            }
            for at, asked in enumerate(questions.asked)
        ],
    }


def _verdict(comparison: Comparison, name: str, keep: float, confidence: float) -> Verdict:
    cluster = comparison.questions.cluster
    mine = [answers for answers in comparison.answers if answers.method.name == name]
    largest_first = sorted(mine, key=lambda answers: -_budget(answers))
    passed: list[tuple[Agreement, float]] = []
    failed = None
    for answers in largest_first:
        bound = share_lower_bound(answers.same, cluster, confidence=confidence)
        if bound < keep:
            failed = answers
            break
        passed.append((answers, bound))
    measured = [*itertools.takewhile(lambda answers: answers.same.mean() >= keep, largest_first)]
    needed = None if failed is None else images_needed(failed.same, cluster, keep, confidence=confidence)
    sentences = [f"no budget was shown to keep {_percent(keep)} of the answers"]
    if passed:
        sentences = [_shown(comparison, *passed[-1], keep, confidence)]
    if failed is not None:
        sentences.append(_not_shown(comparison, failed, keep, needed))
    if measured and measured[-1] not in (failed, *(answers for answers, _ in passed)):
        sentences.append(f"Here {_budget(measured[-1])} tokens were enough, which may be luck")
    return Verdict(
        pruner=name,
        keep=keep,
        confidence=confidence,
        num_tokens=_budget(passed[-1][0]) if passed else None,
        tested=tuple(_budget(answers) for answers in (*(answers for answers, _ in passed), failed) if answers),
        measured=_budget(measured[-1]) if measured else None,
        images_needed=needed,
        sentence=f"{name}: {'. '.join(sentences)}.",
    )


def _budget(answers: Agreement) -> int:
    assert answers.method.num_tokens is not None  # see check_method
    return answers.method.num_tokens


def _shown(comparison: Comparison, answers: Agreement, bound: float, keep: float, confidence: float) -> str:
    return (
        f"{_budget(answers)} of {comparison.cost.visual_tokens} visual tokens keep at least {_percent(keep)} of the "
        f"answers: {_percent(answers.same.mean())} of {_count(len(answers.same), 'answer')} stayed the same, and with "
        f"{_percent(confidence)} confidence at least {_percent(bound, down=True)} do on images like these"
    )


def _not_shown(comparison: Comparison, answers: Agreement, keep: float, needed: int | None) -> str:
    share, images = float(answers.same.mean()), len(comparison.questions.images)
    seen = f"At {_budget(answers)} tokens {_percent(share)} stayed the same"
    if share < keep:
        return f"{seen}, less than wanted"
    if needed is None:
        return f"{seen}, too close to {_percent(keep)} for any sensible number of images to decide"
    questions = round(needed * len(answers.same) / images)
    return (
        f"{seen}, on too few images to be sure: if it goes on like this, about {_count(needed, 'image')} with "
        f"{_count(questions, 'question')} would show it; there were {images:,} with {len(answers.same):,}"
    )


def _percent(share: float, *, down: bool = False) -> str:
    """With one decimal if need be; `down` never claims more than there is."""
    tenths = math.floor(1000 * share + 1e-9) if down else round(1000 * share)
    return f"{tenths / 10:.1f}".removesuffix(".0") + " %"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
