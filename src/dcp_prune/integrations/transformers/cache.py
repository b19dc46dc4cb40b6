"""Conversations that go on: what is in a key-value cache, and where the new part of a prompt begins.

What is known of a cache travels with it, as an attribute, through `copy.deepcopy` and pickling. Which row is which, and
how much of the prompt is left, is read from the keys in it, so that it does not matter who reordered, selected,
repeated or cropped them, or put them into another cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dcp_prune.errors import InvalidInputError

_ATTRIBUTE = "pruned_prompt"
_KEY_SIZE = 8
"""Numbers of one head's key that stand for the whole of it: enough to tell tokens apart."""


@dataclass(frozen=True, eq=False)
class CachedPrompt:
    """The beginning of a conversation as it is in a key-value cache.

    Attributes:
        columns: of the original prompt, in the order in which they were cached; -1 is padding. `b m`.
        width: columns of the original prompt.
        ids: the original prompt and what was generated behind it, where all of it is known. `b w`.
        next_position: where the column behind it lies, where positions do more than count tokens. `b 1`.
        keys: part of what was cached for these columns, or for the first of them, by which rows are known again; None
            where the cache does not show it. `b n c`.
    """

    columns: Int[Tensor, "b m"]
    width: int
    ids: Int[Tensor, "b w"] | None
    next_position: Int[Tensor, "b 1"] | None = None
    keys: Float[Tensor, "b n c"] | None = None

    def select(self, rows: Sequence[int] | Int[Tensor, " r"]) -> CachedPrompt:
        """The same of these rows, in this order."""

        def take(value: Tensor | None) -> Any:
            return None if value is None else value[torch.as_tensor(rows, device=value.device)]

        return replace(
            self,
            columns=take(self.columns),
            ids=take(self.ids),
            next_position=take(self.next_position),
            keys=take(self.keys),
        )

    def repeat(self, times: int) -> CachedPrompt:
        """Each row so many times, one behind the other."""
        return self.select(torch.arange(len(self.columns)).repeat_interleave(times))

    def followed_by(self, ids: Int[Tensor, "b n"]) -> CachedPrompt:
        """The same with tokens behind it that are in the cache as they are."""
        new = torch.arange(self.width, self.width + ids.shape[1], device=self.columns.device)
        return replace(
            self,
            columns=torch.cat((self.columns, new.expand(len(self.columns), -1)), dim=1),
            width=self.width + ids.shape[1],
            ids=None if self.ids is None else torch.cat((self.ids, ids.to(self.ids)), dim=1),
            next_position=None if self.next_position is None else self.next_position + ids.shape[1],
        )

    def crop(self, length: int) -> CachedPrompt:
        """What is left of it in a cache of this length.

        Raises:
            InvalidInputError: the end that was cropped is not the end of the original prompt, column by column.
        """
        cut = self.columns.shape[1] - length
        if cut <= 0:
            return self
        width = self.width - cut
        last = torch.arange(width, self.width, device=self.columns.device)
        if not (self.columns[:, length:] == last).all():
            raise InvalidInputError(
                f"{cut} columns were cropped off the prompt in this cache, more than the text behind its images, so "
                "nobody can say how much of the prompt was meant; crop less, or start with an empty cache"
            )
        return replace(
            self,
            columns=self.columns[:, :length],
            width=width,
            ids=None if self.ids is None else self.ids[:, :width],
            next_position=None if self.next_position is None else self.next_position - cut,
            keys=None if self.keys is None else self.keys[:, :length],
        )


def remember(cache: Any, prompt: CachedPrompt) -> CachedPrompt:
    """Writes on a cache what is in it; each row of the prompt may have become several, one behind the other."""
    prompt = prompt.repeat(max(1, _num_rows(cache, len(prompt.columns)) // len(prompt.columns)))
    keys = _first_keys(cache, prompt.columns.shape[1])
    prompt = replace(prompt, keys=None if keys is None else keys.clone())
    setattr(cache, _ATTRIBUTE, prompt)
    return prompt


def forget(cache: Any) -> None:
    """Of a cache that begins anew."""
    if is_pruned(cache):
        delattr(cache, _ATTRIBUTE)


def is_pruned(cache: Any) -> bool:
    """Whether something is written on this cache; no value is computed."""
    return getattr(cache, _ATTRIBUTE, None) is not None


def knows_position(cache: Any) -> bool:
    """Whether it is written on this cache where the next token will lie; no value is computed."""
    return is_pruned(cache) and getattr(cache, _ATTRIBUTE).next_position is not None


def recall(cache: Any, num_rows: int, recent: Iterable[CachedPrompt] = ()) -> CachedPrompt | None:
    """What is known of the prompt in a cache; None if it is empty, or was filled without pruning.

    Args:
        cache: of transformers, or None.
        num_rows: of the prompt that goes on; the cache may hold several rows for each of them.
        recent: of caches that were filled lately, should what is written on this one have been lost on the way.

    Raises:
        InvalidInputError: the cache was changed so that nobody can say what is in it.
    """
    filled = 0 if cache is None else int(cache.get_seq_length())
    if filled == 0:
        return None
    written = getattr(cache, _ATTRIBUTE, None)
    if written is None:
        whole = (each for each in recent if each.keys is not None and each.columns.shape[1] <= filled)
        found = next((prompt for each in whole if (prompt := _recognise(cache, each, filled)) is not None), None)
        if found is None:
            return None
    else:
        found = _recognise(cache, written, filled)
        if found is None:
            raise InvalidInputError(
                "this cache holds another prompt than the one that was pruned into it, or rows that nobody can tell "
                "apart; start with an empty cache"
            )
    found = found.crop(filled)
    each, rest = divmod(len(found.columns), num_rows)
    groups = found.columns[: each * num_rows].unflatten(0, (num_rows, each)) if each else found.columns
    if rest or not each or not (groups == groups[:, :1]).all():
        raise InvalidInputError(
            f"this cache holds {len(found.columns)} rows, which are not those of a prompt of {num_rows}; select or "
            "repeat its rows as those of the prompt"
        )
    return found.select(range(0, len(found.columns), each))


def _recognise(cache: Any, prompt: CachedPrompt, filled: int) -> CachedPrompt | None:
    """The rows of a prompt in the order in which they are in a cache; None if one of them is not there."""
    if prompt.keys is None:
        # Such caches do not show what is in them: no order can be read, so none must be needed.
        same = len(prompt.columns) == _num_rows(cache, len(prompt.columns))
        return prompt if same and (prompt.columns == prompt.columns[:1]).all() else None
    length = min(filled, prompt.keys.shape[1])
    now = _first_keys(cache, length)
    if now is None:
        return None
    known = prompt.keys[:, :length].to(now)
    if now.shape[1:] != known.shape[1:]:
        return None
    if now.shape == known.shape and torch.equal(now, known):
        return prompt
    equal = torch.stack([(row == known).flatten(1).all(dim=1) for row in now])
    return prompt.select(equal.int().argmax(dim=1)) if equal.any(dim=1).all() else None


def _first_keys(cache: Any, length: int) -> Float[Tensor, "b n c"] | None:
    """Part of the keys of the first columns, in the first layer that keeps them all; None if there is no such layer."""
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if not isinstance(keys, Tensor) or keys.ndim != 4 or getattr(layer, "is_sliding", False):
            continue
        if keys.shape[2] >= int(layer.get_seq_length()) > 0:  # a quantised layer shows its latest only
            return keys[:, 0, :length, :_KEY_SIZE].detach().nan_to_num()
    return None


def _num_rows(cache: Any, otherwise: int) -> int:
    shown = (getattr(layer, "keys", None) for layer in cache.layers)
    return next((len(keys) for keys in shown if isinstance(keys, Tensor) and keys.ndim == 4), otherwise)


@dataclass(frozen=True, eq=False)
class NewTurn:
    """Where the new part of a conversation begins; without a cache, all of it is new.

    Attributes:
        head: columns of the original conversation before the new part, as far as they are in the cache. `b h`.
        head_width: columns of the original conversation before the new part, dropped ones included.
        start: column of `input_ids` where the new part begins.
    """

    head: Int[Tensor, "b h"]
    head_width: int
    start: int

    @property
    def cut(self) -> int:
        return self.head_width - self.head.shape[1]


def find_new_turn(
    ids: Int[Tensor, "b l"], mask: Tensor | None, cache: Any, cached: CachedPrompt | None, whole_prompt: bool
) -> NewTurn:
    """Where the part of `ids` begins that is not in the cache.

    Args:
        ids, mask: as given.
        cache: as given.
        cached: what is known of the prompt in it.
        whole_prompt: see `shorten`.

    Raises:
        InvalidInputError: the prompt is not the one that is in the cache, or the mask is of another length.
    """
    b, length = ids.shape
    filled = 0 if cache is None else int(cache.get_seq_length())
    if filled == 0:
        return NewTurn(ids.new_empty(b, 0), 0, 0)
    if cached is None:
        known, width = torch.arange(filled, device=ids.device).expand(b, filled), filled
    else:
        known, width = cached.columns.to(ids.device), cached.width
    if not whole_prompt or (mask is not None and mask.shape[1] > length):
        # Only the new tokens were passed; tokens generated in between are in the cache as they are.
        between = torch.arange(width, filled + width - known.shape[1], device=ids.device).expand(b, -1)
        turn = NewTurn(torch.cat((known, between), dim=1), width + between.shape[1], 0)
        if cached is not None and mask is not None and mask.shape[1] != turn.head_width + length:
            raise InvalidInputError(
                f"attention_mask has {mask.shape[1]} columns, but {turn.head_width} of the conversation are in the "
                f"cache, dropped ones included, and {length} are new; pass a mask of {turn.head_width + length}"
            )
        return turn
    if cached is not None and cached.ids is not None and not torch.equal(ids[:, :width], cached.ids.to(ids.device)):
        raise InvalidInputError(
            f"these input_ids do not begin with the prompt that is in the cache, which holds {filled} columns of it, "
            "dropped ones not counted; pass the ids that generate returned, followed by the new turn, crop that many "
            "columns off that are not to stay, or start with an empty cache"
        )
    return NewTurn(known, width, width)
