"""Pruners that every test of an integration runs with."""

from __future__ import annotations

from typing import Any

import pytest

from dcp_prune.pruners.base import Pruner
from dcp_prune.registry import make_pruner

PRUNERS: dict[str, dict[str, Any]] = {
    "dcp": {},  # with stages inside the encoder, and the question
    "flowcut": {},  # with a stage at every layer, each of which remembers the one before
    "cls_attention": {},  # with a signal of the encoder
    "random": {},  # with nothing at all
}


@pytest.fixture(params=sorted(PRUNERS))
def pruner(request: pytest.FixtureRequest) -> Pruner:
    """8 of 36 tokens."""
    return make_pruner(request.param, num_tokens=8, **PRUNERS[request.param])
