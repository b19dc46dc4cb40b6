"""How many visual tokens to keep, known before any feature exists; or the range from which a bound picks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dcp_prune.errors import InvalidInputError

Scope = Literal["image", "tile"]
DEFAULT_NUM_TOKENS = 16
"""The default budget: the one that the paper is about."""


@dataclass(frozen=True)
class Budget:
    """Visual tokens to keep: exactly one of `num_tokens` and `keep_ratio`, checked at construction.

    Attributes:
        num_tokens: a count, at least 1; or a range (fewest, most) of counts.
        keep_ratio: a share of the tokens in (0, 1]; the count is rounded half up and never below 1. Or a range of
            shares.
        scope: what the budget is for: an `image` with all its tiles, or each `tile` by itself, if a model cuts images
            into tiles. Both mean the same for an image of one tile. A video counts as an image, and its frames as
            tiles.
        max_distance: the bound that picks from a range: the fewest tokens whose distance to the full set is below it.
            A range and a bound go together.

    Raises:
        InvalidInputError: both count and share, or neither; a count that is not a positive integer; a share outside
            (0, 1]; a range whose first end is the larger one; a range without a bound, or a bound without a range; a
            bound below 0; an unknown scope.
    """

    num_tokens: int | tuple[int, int] | None = None
    keep_ratio: float | tuple[float, float] | None = None
    scope: Scope = "image"
    max_distance: float | None = None

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise InvalidInputError(
                f"scope must be one of {', '.join(get_args(Scope))}, got {self.scope!r}; of a video, image is all of "
                "it and tile is one frame"
            )
        if (self.num_tokens is None) == (self.keep_ratio is None):
            given = "neither" if self.num_tokens is None else "both"
            raise InvalidInputError(f"give exactly one of num_tokens (a count) and keep_ratio (a share), not {given}")
        if self.num_tokens is not None:
            _check("num_tokens", self.num_tokens, _check_count)
        else:
            _check("keep_ratio", self.keep_ratio, _check_share)
        bound = self.max_distance
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float) or not bound >= 0):
            raise InvalidInputError(f"max_distance must be a number of at least 0, got {bound!r}")
        if self.is_range and bound is None:
            raise InvalidInputError(
                f"the range {self._name}={self._given!r} needs max_distance, which picks from it; give that, or a "
                f"fixed {self._name}"
            )
        if bound is not None and not self.is_range:
            raise InvalidInputError(
                f"max_distance={bound!r} picks from a range, so {self._name} must be (fewest, most), "
                f"got {self._given!r}"
            )

    @property
    def is_range(self) -> bool:
        """Whether every image gets a number of its own, from a range."""
        return is_range(self._given)

    def resolve(self, num_original: int) -> int:
        """The exact number of tokens kept of `num_original`, of a range the most; at most `num_original`."""
        return self._counts(num_original)[-1]

    def fewest(self, num_original: int) -> int:
        """The number of tokens kept of `num_original` at the least; without a range that is `resolve`."""
        return self._counts(num_original)[0]

    @property
    def _given(self) -> Any:
        return self.keep_ratio if self.num_tokens is None else self.num_tokens

    @property
    def _name(self) -> str:
        return "keep_ratio" if self.num_tokens is None else "num_tokens"

    def _counts(self, num_original: int) -> tuple[int, ...]:
        ends = self._given if self.is_range else (self._given,)
        if self.num_tokens is not None:
            return tuple(min(count, num_original) for count in ends)
        return tuple(min(max(1, math.floor(share * num_original + 0.5)), num_original) for share in ends)


def is_range(given: object) -> bool:
    """Whether a budget is written as several numbers instead of one."""
    return isinstance(given, tuple | list)


def _check(name: str, given: Any, check_end: Callable[[Any], None]) -> None:
    ends = given if is_range(given) else (given,)
    if is_range(given) and len(given) != 2:
        raise InvalidInputError(f"{name} as a range must be (fewest, most), got {given!r}")
    for end in ends:
        check_end(end)
    if ends[0] > ends[-1]:
        raise InvalidInputError(
            f"the range {name}={given!r} ends below its beginning; write it as ({given[1]}, {given[0]})"
        )


def _check_count(count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise InvalidInputError(
            f"num_tokens must be a whole number of visual tokens, got {count!r}; "
            "for a share of the tokens use keep_ratio"
        )
    if count < 1:
        raise InvalidInputError(f"num_tokens must be at least 1, got {count}; at least one visual token has to be kept")


def _check_share(share: Any) -> None:
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if not number or not 0 < share <= 1:
        raise InvalidInputError(f"keep_ratio must be a share of the visual tokens in (0, 1], got {share!r}")
