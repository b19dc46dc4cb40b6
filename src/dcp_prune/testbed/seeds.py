"""The one place that splits seeds: what is trained on is never tuned on, what is tuned on is never reported on."""

from __future__ import annotations

TRAINING = range(900_000_000)
"""Scenes that checkpoints are trained on."""
TUNING = range(900_000_000, 1_000_000_000)
"""Scenes for choosing parameters of pruners."""
HELD_OUT = range(1_000_000_000, 2_000_000_000)
"""Scenes for every reported number."""


def split_of(seed: int) -> str:
    """`training`, `tuning` or `held-out`.

    Raises:
        ValueError: the seed lies in no split.
    """
    for name, seeds in (("training", TRAINING), ("tuning", TUNING), ("held-out", HELD_OUT)):
        if seed in seeds:
            return name
    raise ValueError(f"seed {seed} lies in no split; seeds run from 0 to {HELD_OUT.stop - 1}")
