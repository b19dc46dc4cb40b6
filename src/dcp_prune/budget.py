"""How many visual tokens are kept, decided before any feature exists."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dcp_prune.errors import InvalidInputError

Scope = Literal["image", "tile"]


@dataclass(frozen=True)
class Budget:
    """Visual tokens to keep: exactly one of `num_tokens` and `keep_ratio`, checked at construction.

    Attributes:
        num_tokens: a count, at least 1.
        keep_ratio: a share of the tokens in (0, 1]; the count is rounded half up and never below 1.
        scope: what the budget is for: an `image` with all its tiles together, or each `tile` by itself, where a model
            cuts images into tiles. An image of one tile is the same in both.

    Raises:
        InvalidInputError: both or neither given, a count that is no positive integer, a share outside (0, 1], a scope
            that is neither.
    """

    num_tokens: int | None = None
    keep_ratio: float | None = None
    scope: Scope = "image"

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise InvalidInputError(f"scope must be one of {', '.join(get_args(Scope))}, got {self.scope!r}")
        if (self.num_tokens is None) == (self.keep_ratio is None):
            given = "neither" if self.num_tokens is None else "both"
            raise InvalidInputError(f"give exactly one of num_tokens (a count) and keep_ratio (a share), not {given}")
        if self.num_tokens is not None:
            if isinstance(self.num_tokens, bool) or not isinstance(self.num_tokens, int):
                raise InvalidInputError(
                    f"num_tokens must be a whole number of visual tokens, got {self.num_tokens!r}; "
                    "for a share of the tokens use keep_ratio"
                )
            if self.num_tokens < 1:
                raise InvalidInputError(
                    f"num_tokens must be at least 1, got {self.num_tokens}; at least one visual token has to be kept"
                )
        if self.keep_ratio is not None:
            number = isinstance(self.keep_ratio, int | float) and not isinstance(self.keep_ratio, bool)
            if not number or not 0 < self.keep_ratio <= 1:
                raise InvalidInputError(
                    f"keep_ratio must be a share of the visual tokens in (0, 1], got {self.keep_ratio!r}"
                )

    def resolve(self, num_original: int) -> int:
        """The exact number of tokens kept of `num_original`; at most `num_original`."""
        if self.num_tokens is not None:
            return min(self.num_tokens, num_original)
        assert self.keep_ratio is not None
        return max(1, math.floor(self.keep_ratio * num_original + 0.5))
