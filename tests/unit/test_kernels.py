"""The Triton kernels pick what the loops of torch operators pick; here under Triton's interpreter, on a CPU.

Triton reads `TRITON_INTERPRET` when it is first imported, so `make test-kernels` runs this file by itself.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch

from dcp_prune.functional import fused
from dcp_prune.functional.clustering import facility_location
from dcp_prune.functional.selection import farthest_point
from dcp_prune.functional.similarity import cosine_similarity


@pytest.fixture(scope="module")
def kernels() -> Any:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("make test-kernels runs these")
    return importlib.import_module("dcp_prune.functional.kernels")


@pytest.fixture
def fuse(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the functions take the kernels on a CPU as well; the names of those that ran."""
    ran: list[str] = []
    for name in ("coverage_picks", "farthest_picks"):
        inner = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *given, _n=name, _f=inner: (ran.append(_n), _f(*given))[1])
    monkeypatch.setattr("dcp_prune.functional.clustering.coverage_is_fused", lambda matrix: True)
    monkeypatch.setattr("dcp_prune.functional.selection.farthest_is_fused", lambda matrix: True)
    return ran


def draw(b: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    similarity = cosine_similarity(torch.randn(b, n, 8, generator=generator))
    weights = torch.rand(b, n, generator=generator)
    mask = torch.ones(b, n, dtype=torch.bool)
    mask[-1, n // 2 :] = False
    return similarity, weights, mask


SIZES = [(1, 12, 3), (2, 40, 9), (3, 33, 16)]


@pytest.mark.parametrize(("b", "n", "k"), SIZES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by", ["demand", "merit", None])
def test_facility_location_is_the_same_in_one_kernel(fuse: list[str], monkeypatch, b, n, k, masked, by) -> None:
    similarity, weights, mask = draw(b, n)
    given: dict[str, Any] = {"mask": mask if masked else None, **({by: weights} if by else {})}
    picks = facility_location(similarity, k, **given)
    assert fuse == ["coverage_picks"]
    monkeypatch.setattr("dcp_prune.functional.clustering.coverage_is_fused", lambda matrix: False)
    assert picks.equal(facility_location(similarity, k, **given))


@pytest.mark.parametrize(("b", "n", "k"), SIZES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_farthest_point_is_the_same_in_one_kernel(fuse: list[str], monkeypatch, b, n, k, masked, weighted) -> None:
    similarity, weights, mask = draw(b, n)
    given: dict[str, Any] = {"mask": mask if masked else None, "weights": weights if weighted else None}
    picks = farthest_point(similarity, k, **given)
    assert fuse == ["farthest_picks"]
    monkeypatch.setattr("dcp_prune.functional.selection.farthest_is_fused", lambda matrix: False)
    assert picks.equal(farthest_point(similarity, k, **given))


def test_on_ties_the_earlier_token_wins_in_the_kernels_too(fuse: list[str]) -> None:
    alike = torch.ones(1, 40, 40)
    assert facility_location(alike, 5).tolist() == [[0, 1, 2, 3, 4]]
    assert farthest_point(alike, 5).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_run_and_pick_what_the_loops_pick() -> None:
    similarity, weights, _ = (each.cuda() for each in draw(2, 576))
    assert fused.coverage_is_fused(similarity)
    picks = facility_location(similarity, 16, demand=weights)
    assert picks.cpu().equal(facility_location(similarity.cpu(), 16, demand=weights.cpu()))
    assert farthest_point(similarity, 16).cpu().equal(farthest_point(similarity.cpu(), 16))


def test_on_a_cpu_no_kernel_is_asked_for() -> None:
    matrix = torch.eye(4).unsqueeze(0)
    assert not fused.coverage_is_fused(matrix)
    assert not fused.farthest_is_fused(matrix)
