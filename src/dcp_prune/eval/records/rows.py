"""What one answer is in the records of a sweep: the columns, and a parquet file of them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import polars as pl

_TEXT = pl.Categorical
SCHEMA: Mapping[str, Any] = {
    "method": _TEXT,
    "pruner": _TEXT,
    "num_tokens": pl.Int32,
    "text": _TEXT,
    "image": _TEXT,
    "question": _TEXT,
    "task": _TEXT,
    "truth": _TEXT,
    "answer": _TEXT,
    "score": pl.Float32,
    "kappa": pl.Float32,
}
"""Columns that every row has: `method` is the label, unique together with `num_tokens` (the budget, of a range the
most; for `none` the image's count, or 0 without an image); `text` is what the pruner read; `score` lies in [0, 1];
`kappa` is null without an image."""

KEY = ("method", "num_tokens", "question")
"""What tells a row from every other."""
_DIGITS = 4


def to_part(rows: pl.DataFrame) -> bytes:
    """Rows as the content of a parquet file: strings once each, distances to four significant digits."""
    texts = [name for name, dtype in SCHEMA.items() if dtype is _TEXT]
    distances = [name for name in rows.columns if name == "kappa" or name.startswith(("eval.", "run."))]
    stream = io.BytesIO()
    rows.with_columns(
        *(pl.col(name).cast(_TEXT) for name in texts),
        *(pl.col(name).cast(pl.Float32).round_sig_figs(_DIGITS) for name in distances),
    ).write_parquet(stream, compression="zstd", compression_level=10)
    return stream.getvalue()
