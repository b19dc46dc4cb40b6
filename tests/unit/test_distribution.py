"""Kappa and the other distances: against float64 references, and the properties that make them distances."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance_nd
from torch import Tensor

from dcp_prune import InvalidInputError, kappa
from dcp_prune.functional.distribution import DISTANCES, coverage, frechet, mmd, sliced_wasserstein

NAMES = sorted(DISTANCES)
quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def drawn(seed: int, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + shift


def reference_kl(p: np.ndarray, q: np.ndarray, eps: float) -> float:
    mean_p, mean_q = p.mean(axis=0), q.mean(axis=0)
    var_p, var_q = p.var(axis=0) + eps, q.var(axis=0) + eps
    return float(np.mean(0.5 * (var_p / var_q + (mean_p - mean_q) ** 2 / var_q - 1.0 - np.log(var_p / var_q))))


def reference_kappa(kept: Tensor, full: Tensor, direction: str) -> list[float]:
    values = []
    for k, f in zip(kept.double().numpy(), full.double().numpy(), strict=True):
        eps = 1e-6 * f.var(axis=0).mean()
        forward, reverse = reference_kl(k, f, eps), reference_kl(f, k, eps)
        values.append({"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[direction])
    return values


@quick
@given(
    seed=seeds,
    b=st.integers(1, 3),
    k=st.integers(2, 8),
    extra=st.integers(0, 30),
    d=st.integers(1, 9),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    shift=st.sampled_from([0.0, 3.0]),
    direction=st.sampled_from(["forward", "reverse", "symmetric"]),
)
def test_kappa_equals_the_float64_reference(seed, b, k, extra, d, scale, shift, direction):
    full = drawn(seed, b, k + extra, d, scale=scale, shift=shift * scale)
    kept = full[:, :k]
    assert kappa(kept, full, direction=direction).tolist() == pytest.approx(
        reference_kappa(kept, full, direction), rel=2e-3, abs=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
@quick
@given(seed=seeds, n=st.integers(1, 20), d=st.integers(1, 8))
def test_a_full_set_is_at_no_distance_from_itself_in_any_order(name, seed, n, d):
    full = drawn(seed, 2, n, d)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert DISTANCES[name](full[:, order], full).tolist() == pytest.approx([0.0, 0.0], abs=2e-3)


@pytest.mark.parametrize("name", NAMES)
@quick
@given(seed=seeds, k=st.integers(1, 6), n=st.integers(6, 20), d=st.integers(1, 8))
def test_distances_are_finite_and_never_negative(name, seed, k, n, d):
    full = drawn(seed, 3, n, d)
    value = DISTANCES[name](full[:, :k], full)
    assert value.shape == (3,)
    assert value.dtype == torch.float32
    assert torch.isfinite(value).all()
    assert (value >= 0).all()


@pytest.mark.parametrize("name", NAMES)
@quick
@given(seed=seeds)
def test_the_order_of_tokens_does_not_matter(name, seed):
    full, generator = drawn(seed, 2, 18, 5), torch.Generator().manual_seed(seed)
    kept = full[:, :5]
    weights = torch.rand(2, 18, generator=generator)
    order = torch.randperm(18, generator=generator)
    straight = DISTANCES[name](kept, full, weights=weights)
    shuffled = DISTANCES[name](kept.flip(1), full[:, order], weights=weights[:, order])
    assert shuffled.tolist() == pytest.approx(straight.tolist(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_shifted_subset_is_farther_than_a_fair_one(name):
    full = drawn(0, 1, 200, 16)
    fair, shifted = full[:, ::10], full[:, full[0, :, :8].sum(dim=1).argsort()[:20]]
    assert DISTANCES[name](shifted, full) > DISTANCES[name](fair, full)


@quick
@given(seed=seeds, direction=st.sampled_from(["forward", "reverse", "symmetric"]))
def test_kappa_ignores_an_affine_map_of_each_channel(seed, direction):
    full = drawn(seed, 2, 40, 6)
    generator = torch.Generator().manual_seed(seed + 1)
    scale = torch.rand(6, generator=generator) * 2.0 + 0.5
    scale[::2] *= -1.0
    shift = torch.randn(6, generator=generator)
    plain = kappa(full[:, :10], full, direction=direction)
    mapped = kappa(full[:, :10] * scale + shift, full * scale + shift, direction=direction)
    assert mapped.tolist() == pytest.approx(plain.tolist(), rel=1e-2, abs=1e-4)


def test_kappa_depends_on_its_direction_and_the_symmetric_one_is_the_mean():
    full = drawn(1, 1, 50, 4)
    kept = full[:, :4] * 0.3
    forward, reverse = kappa(kept, full), kappa(kept, full, direction="reverse")
    assert abs(float(forward - reverse)) > 0.1
    assert float(kappa(kept, full, direction="symmetric")) == pytest.approx(float(forward + reverse) / 2)
    assert float(DISTANCES["kappa_reverse"](kept, full)) == float(reverse)


def test_an_unknown_direction_is_refused():
    with pytest.raises(InvalidInputError, match="forward, reverse or symmetric"):
        kappa(torch.ones(1, 2, 2), torch.ones(1, 2, 2), direction="backward")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_one_colour_gives_zero_and_not_nan(name):
    full = torch.full((1, 30, 7), 0.3) * torch.arange(1, 8)
    assert float(DISTANCES[name](full[:, :4], full)) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_masked_tokens_count_as_if_they_were_not_there(name):
    full, garbage = drawn(2, 2, 20, 6), torch.full((2, 5, 6), 99.0)
    kept = full[:, ::4]
    padded_full = torch.cat((full, garbage), dim=1)
    padded_kept = torch.cat((kept, garbage[:, :2]), dim=1)
    kept_mask = torch.arange(7).expand(2, 7) < 5
    full_mask = torch.arange(25).expand(2, 25) < 20
    with_padding = DISTANCES[name](padded_kept, padded_full, kept_mask=kept_mask, full_mask=full_mask)
    assert with_padding.tolist() == pytest.approx(DISTANCES[name](kept, full).tolist(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_two_is_a_token_twice_over(name):
    full = drawn(3, 1, 12, 5)
    weights = torch.ones(1, 12)
    weights[0, :4] = 2.0
    doubled = torch.cat((full, full[:, :4]), dim=1)
    weighted = DISTANCES[name](full[:, 5:9], full, weights=weights)
    assert weighted.tolist() == pytest.approx(DISTANCES[name](full[:, 5:9], doubled).tolist(), rel=1e-3)
    assert weighted.tolist() != pytest.approx(DISTANCES[name](full[:, 5:9], full).tolist(), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_features_are_measured_in_float32(name):
    full = drawn(4, 1, 300, 8, shift=20.0).bfloat16()
    value = DISTANCES[name](full[:, :16], full)
    assert value.dtype == torch.float32
    assert value.tolist() == pytest.approx(DISTANCES[name](full[:, :16].float(), full.float()).tolist(), rel=1e-6)


def test_frechet_is_the_closed_form_in_units_of_the_mean_variance():
    full, kept = drawn(5, 1, 60, 4, scale=3.0), drawn(6, 1, 9, 4)
    k, f = kept[0].double().numpy(), full[0].double().numpy()
    expected = np.mean((k.mean(0) - f.mean(0)) ** 2 + (k.std(0) - f.std(0)) ** 2) / f.var(0).mean()
    assert float(frechet(kept, full)) == pytest.approx(expected, rel=1e-4)


def test_sliced_wasserstein_in_one_dimension_is_the_exact_transport_cost():
    kept, full = drawn(7, 1, 3, 1), drawn(8, 1, 5, 1)
    # 3 and 5 points, each split into equal atoms until both have 15: the optimal plan on a line matches sorted atoms.
    atoms_k = np.sort(np.repeat(kept.double().numpy().ravel(), 5))
    atoms_f = np.sort(np.repeat(full.double().numpy().ravel(), 3))
    expected = np.sqrt(np.mean((atoms_k - atoms_f) ** 2) / full.double().numpy().var())
    assert float(sliced_wasserstein(kept, full)) == pytest.approx(expected, rel=1e-4)


def test_sliced_wasserstein_is_below_the_full_transport_distance_and_reproducible():
    kept, full = drawn(9, 1, 6, 3), drawn(10, 1, 6, 3, shift=1.0)
    costs = [
        np.mean(np.sum((kept[0].numpy()[list(order)] - full[0].numpy()) ** 2, axis=1))
        for order in itertools.permutations(range(6))
    ]
    scale = float(full.var(dim=1, correction=0).mean())
    value = float(sliced_wasserstein(kept, full))
    assert 0 < value < np.sqrt(min(costs) / scale)
    assert wasserstein_distance_nd(kept[0].numpy(), full[0].numpy()) > 0
    torch.manual_seed(123)
    assert float(sliced_wasserstein(kept, full)) == value


def test_mmd_is_the_v_statistic_of_the_stated_kernel():
    full, kept = drawn(11, 1, 15, 3), drawn(12, 1, 4, 3, shift=1.0)
    k, f = kept[0].double().numpy(), full[0].double().numpy()
    bandwidth = f.var(0).sum()

    def kernel(x, y):
        return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / (2 * bandwidth)).mean()

    assert float(mmd(kept, full)) == pytest.approx(kernel(k, k) + kernel(f, f) - 2 * kernel(k, f), rel=1e-3)


def test_coverage_is_the_weighted_share_that_no_kept_token_resembles():
    full = torch.eye(4).unsqueeze(0)
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert float(coverage(full[:, :2], full, weights=weights)) == pytest.approx(0.7)
    assert float(coverage(full[:, :2], full)) == pytest.approx(0.5)
    assert float(coverage(full[:, :2], full, weights=torch.zeros(1, 4))) == pytest.approx(0.5)


def test_coverage_sees_a_missed_word_to_which_kappa_is_blind():
    full = drawn(13, 1, 100, 16)
    weights = torch.zeros(1, 100)
    weights[0, 7] = 1.0
    order = torch.arange(100)
    with_it, without_it = full[:, order % 7 == 0], full[:, order % 7 == 1]
    assert coverage(with_it, full, weights=weights) < 0.01 < 0.2 < coverage(without_it, full, weights=weights)
    assert abs(float(kappa(with_it, full) - kappa(without_it, full))) < 0.1
