"""What the app shows, as plain data: answers, kept tokens, a sweep over budgets, a leaderboard. Nothing here knows
gradio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from dcp_prune.assistant import Assistant, Reply, View
from dcp_prune.errors import InvalidInputError, RecordsError
from dcp_prune.functional.relevance import question_relevance
from dcp_prune.integrations.transformers.question import embed_question
from dcp_prune.pruners.base import Pruner
from dcp_prune.viz.overlay import Grid, absorption_map, inspection, kept_tokens

SIDE = 480
"""Longer side of a picture, in pixels."""
LONGEST_ANSWER = 32
"""In tokens."""


@dataclass(frozen=True)
class Shown:
    """One answer, ready to be shown.

    Attributes:
        record: what the JSON file holds.
        tokens: a row per kept token: its number, row, column, saliency, relevance, how many patches it stands for,
            and which.
        kept, absorbed, sheet: pictures of the kept patches, of what each stands for, and all panels of `inspect`.
    """

    record: dict[str, Any]
    tokens: list[list[Any]]
    kept: Image.Image
    absorbed: Image.Image
    sheet: Image.Image


def ask(
    assistant: Assistant, image: Image.Image, question: str, pruners: Sequence[tuple[str, Pruner]]
) -> tuple[dict[str, Any], list[Shown]]:
    """The record of the full model's answer, and what each pruner made of the same image and question.

    Raises:
        DcpPruneError: the question is empty, the model cuts the image into tiles, or lacks what a pruner reads.
    """
    prompt = assistant.prompt(question)
    view = assistant.look(image, *(pruner for _, pruner in pruners))
    if view.shape[0] * view.shape[1] != view.num_tokens:
        raise InvalidInputError(
            f"{assistant.name} cuts this image into tiles, which the app cannot draw; use dcp-prune run for the answer"
        )
    full = assistant.ask(view, prompt, max_new_tokens=LONGEST_ANSWER)
    relevance = _relevance(assistant, view, question)
    shown = []
    for name, pruner in pruners:
        reply = assistant.ask(view, prompt, pruner, max_new_tokens=LONGEST_ANSWER)
        shown.append(_shown(assistant, view, question, name, pruner, reply, full, relevance))
    return _cost(assistant, full), shown


def sweep(
    assistant: Assistant,
    image: Image.Image,
    question: str,
    make: Sequence[tuple[str, Any]],
    budgets: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """One row per budget and pruner, as they are measured: tokens, kappa, ms to the first word, answer.

    Args:
        assistant: the model.
        image: RGB.
        question: about it.
        make: the pruners' names, and for each a function of the budget that makes it.
        budgets: numbers of kept tokens.
    """
    prompt = assistant.prompt(question)
    for budget in budgets:
        pruners = [(name, of(budget)) for name, of in make]
        view = assistant.look(image, *(pruner for _, pruner in pruners))
        for name, pruner in pruners:
            reply = assistant.ask(view, prompt, pruner, max_new_tokens=LONGEST_ANSWER)
            yield {"pruner": name, "tokens": budget, "answer": reply.text} | {
                "kappa": round(reply.kappa, 4),
                "milliseconds": round(reply.milliseconds["first_token"], 1),
            }


def leaderboard(folder: Path) -> list[list[Any]]:
    """A row per method and budget in the records of sweeps under a folder: questions, pruner, budget, tokens that were
    read, mean score in per cent, mean kappa; the best of each set of questions first.

    Raises:
        RecordsError: the folder holds no records.
    """
    from dcp_prune.report.results import find_records, load_cells

    found = find_records(folder)
    if not found:
        raise RecordsError(
            f"{folder} holds no records of a sweep; name a folder that does: dcp-prune app --results FOLDER"
        )
    rows = []
    for cell in load_cells(found):
        for place, entry in enumerate(cell.entries):
            kappa = cell.distances["kappa"][place]
            mean = None if np.isnan(kappa).all() else round(float(np.nanmean(kappa)), 3)
            score, kept = 100 * float(cell.score[place].mean()), float(cell.kept[place].mean())
            rows.append([cell.name, entry.label, entry.num_tokens, round(kept, 1), round(score, 2), mean])
    return sorted(rows, key=lambda row: (row[0], -row[4]))


def _shown(
    assistant: Assistant,
    view: View,
    question: str,
    name: str,
    pruner: Pruner,
    reply: Reply,
    full: Reply,
    relevance: Float[np.ndarray, "n"] | None,
) -> Shown:
    done, everything = reply.record, np.arange(view.num_tokens)
    kept = [int(each) for each in (everything if done is None else done.indices[0].tolist()) if each >= 0]
    assignment = everything if done is None else done.assignment[0].cpu().numpy()
    trigger: Any = getattr(pruner, "trigger", None)
    record = _cost(assistant, reply) | {
        "model": assistant.name,
        "pruner": name,
        "options": repr(pruner),
        "question": question,
        "answer_all_tokens": full.text,
        "kappa": reply.kappa,
        "distance": None if done is None or "distance" not in done.stats else float(done.stats["distance"][0]),
        "threshold": None if trigger is None else trigger.threshold,
        "reselected": None if done is None or done.reselected is None else bool(done.reselected[0]),
        "num_original": view.num_tokens,
        "grid": list(view.shape),
        "indices": kept,
        "assignment": assignment.tolist(),
    }
    grid = Grid.fit(*view.shape, SIDE)
    sheet = inspection(
        view.image,
        kept=kept,
        assignment=assignment,
        saliency=view.saliency,
        shape=view.shape,
        title=question,
        subtitle=f"with {len(kept)} of {view.num_tokens} visual tokens: {reply.text}\nwith all: {full.text}",
        footer=f"{assistant.name}, {name}, {len(kept)} visual tokens, kappa {reply.kappa:.2f}",
    )
    return Shown(
        record,
        _tokens(view, kept, assignment, relevance),
        kept_tokens(view.image, kept, grid),
        absorption_map(view.image, kept, assignment, grid),
        sheet,
    )


def _tokens(
    view: View, kept: Sequence[int], assignment: np.ndarray, relevance: Float[np.ndarray, "n"] | None
) -> list[list[Any]]:
    rows = []
    for slot, index in enumerate(kept):
        row, col = divmod(index, view.shape[1])
        absorbed = [f"{r},{c}" for r, c in (divmod(int(i), view.shape[1]) for i in np.flatnonzero(assignment == slot))]
        scores = [None if each is None else round(float(each[index]), 4) for each in (view.saliency, relevance)]
        rows.append([slot + 1, row, col, *scores, len(absorbed), " ".join(absorbed)])
    return rows


def _cost(assistant: Assistant, reply: Reply) -> dict[str, Any]:
    return {
        "answer": reply.text,
        "num_tokens": reply.visual_tokens,
        "prefill_tokens": reply.prefill_tokens,
        "milliseconds": reply.milliseconds,
        "kv_cache_bytes": kv_cache_bytes(assistant.model, reply.prefill_tokens),
    }


def kv_cache_bytes(model: Any, tokens: int) -> int:
    """Keys and values of a prompt in all layers, as they are cached without a sliding window."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * tokens * model.dtype.itemsize


@torch.inference_mode()
def _relevance(assistant: Assistant, view: View, question: str) -> Float[np.ndarray, "n"] | None:
    text, mask = embed_question(assistant.model, assistant.processor, [question])
    if text is None:
        return None
    features = view.seen.full.features[:1]
    return question_relevance(features.float(), text.float(), text_mask=mask)[0].cpu().numpy()
