"""Which words of a prompt belong to which image: what a text-aware pruner reads, and what enters the cache key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcp_prune.integrations.vllm.settings import TextScope


@dataclass(frozen=True)
class Words:
    """Finds the words of each image in a prompt that holds one placeholder per image.

    Attributes:
        scope: as in `Settings`.
        image_token_id: of the placeholder.
        special_ids: ids that are no words.
        turn_ends: token sequences, each of which ends a turn; the words of a turn include it.
    """

    scope: TextScope
    image_token_id: int
    special_ids: frozenset[int]
    turn_ends: tuple[tuple[int, ...], ...] = ()

    def find(self, prompt: Sequence[int], num_images: int) -> list[tuple[int, ...]]:
        """Ids of the words of each image, in the order of the images; no id where there is none.

        With the scope `turn` these are the words behind the image, up to the next image or the end of the turn; an
        image that another one follows at once shares the words of that one. A turn with no words behind its images
        gives all of its words to them.
        """
        ids = np.asarray(prompt, dtype=np.int64)
        images = np.flatnonzero(ids == self.image_token_id)[:num_images]
        word = ~np.isin(ids, [*self.special_ids, self.image_token_id])
        found: list[tuple[int, ...]] = [()] * num_images
        if self.scope == "none" or not num_images:
            return found
        if self.scope == "prompt":
            return [tuple(ids[word].tolist())] * num_images
        ends, marks = self._turn_ends(ids)
        asks = word & ~marks
        for image, column in enumerate(images.tolist()):
            end = ends[np.searchsorted(ends, column, side="right")]
            start = max(ends[ends <= column], default=0)
            begin, stop = column, end
            for border in [*images[(images > column) & (images < end)].tolist(), end]:
                stop = border
                if asks[begin:border].any():
                    break
                begin = border if border < end else begin
            span = slice(begin, stop) if asks[begin:stop].any() else slice(start, end)
            found[image] = tuple(ids[span][word[span]].tolist())
        return found

    def _turn_ends(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Columns behind the ends of turns, ascending, the prompt's own end last; and what belongs to such an end."""
        ends = [np.array([len(ids)])]
        marks = np.zeros(len(ids), dtype=bool)
        for mark in self.turn_ends:
            if len(mark) > len(ids):
                continue
            windows = np.lib.stride_tricks.sliding_window_view(ids, len(mark))
            starts = np.flatnonzero((windows == np.array(mark)).all(axis=1))
            ends.append(starts + len(mark))
            marks[(starts[:, None] + np.arange(len(mark))).ravel()] = True
        return np.unique(np.concatenate(ends)), marks


def turn_ends(tokenizer: Any, turn_end: str | None = None) -> tuple[tuple[int, ...], ...]:
    """What ends a turn: the given text, or what the chat template writes before an answer, or the end-of-text token."""
    if turn_end is not None:
        return (tuple(tokenizer.encode(turn_end, add_special_tokens=False)),)
    ask = [{"role": "user", "content": "?"}]
    try:
        closed, opened = (
            tokenizer.encode(
                tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=opens),
                add_special_tokens=False,
            )
            for opens in (False, True)
        )
    except (AttributeError, TypeError, ValueError):  # it has no template, or one that wants other messages
        closed = opened = []
    mark = tuple(opened[len(closed) :]) if opened[: len(closed)] == closed else ()
    if mark:
        return (mark,)
    eos = getattr(tokenizer, "eos_token_id", None)
    return () if eos is None else ((eos,),)
