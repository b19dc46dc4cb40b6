"""How far the kept tokens are from the full set: kappa and other distances, all under one signature.

Every distance takes the kept tokens `b k d` and the full set `b n d`, optional masks, and optional weights that say how
much each token of the full set counts; it works in float32, returns one number per image `b`, never negative, and 0 for
the full set itself. A small distance is no certificate: a random subset has the smallest kappa of all and yet misses
what the question asks about.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcp_prune.errors import InvalidInputError
from dcp_prune.functional.similarity import cosine_similarity, gather_tokens

Direction = Literal["forward", "reverse", "symmetric"]


class Distance(Protocol):
    """The one signature of all distances."""

    def __call__(
        self,
        kept: Float[Tensor, "b k d"],
        full: Float[Tensor, "b n d"],
        *,
        kept_mask: Bool[Tensor, "b k"] | None = None,
        full_mask: Bool[Tensor, "b n"] | None = None,
        weights: Float[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b"]: ...


def kappa(
    kept: Float[Tensor, "b k d"],
    full: Float[Tensor, "b n d"],
    *,
    kept_mask: Bool[Tensor, "b k"] | None = None,
    full_mask: Bool[Tensor, "b n"] | None = None,
    weights: Float[Tensor, "b n"] | None = None,
    direction: Direction = "forward",
) -> Float[Tensor, "b"]:
    """Diagonal-Gaussian KL divergence between kept and full tokens, in nats, averaged over channels.

    kappa = 1/d * sum_j KL(N(mu_k_j, s2_k_j + eps) || N(mu_f_j, s2_f_j + eps)) with biased variances and
    eps = 1e-6 * mean_j s2_f_j. Blind to the order of tokens and to any affine map of a channel of both sets.
    (Our reading of the paper's distribution consistency metric, whose equation is not public.)

    Args:
        kept: `b k d`.
        full: `b n d`.
        kept_mask: False marks padding among the kept. `b k`.
        full_mask: False marks padding among the full set. `b n`.
        weights: of the full set's tokens in its moments; default: equal. `b n`.
        direction: `forward` is KL(kept || full), `reverse` KL(full || kept), `symmetric` the mean of both.

    Raises:
        InvalidInputError: an unknown direction.
    """
    if direction not in ("forward", "reverse", "symmetric"):
        raise InvalidInputError(f"direction must be forward, reverse or symmetric, got {direction!r}")
    origin = _origin(full, full_mask)
    mean_k, var_k = _moments(kept, kept_mask, None, origin)
    mean_f, var_f = _moments(full, full_mask, weights, origin)
    eps = 1e-6 * _scale(var_f).unsqueeze(1)
    var_k, var_f = var_k + eps, var_f + eps
    if direction == "forward":
        return _gaussian_kl(mean_k, var_k, mean_f, var_f)
    if direction == "reverse":
        return _gaussian_kl(mean_f, var_f, mean_k, var_k)
    return (_gaussian_kl(mean_k, var_k, mean_f, var_f) + _gaussian_kl(mean_f, var_f, mean_k, var_k)) / 2.0


def frechet(
    kept: Float[Tensor, "b k d"],
    full: Float[Tensor, "b n d"],
    *,
    kept_mask: Bool[Tensor, "b k"] | None = None,
    full_mask: Bool[Tensor, "b n"] | None = None,
    weights: Float[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b"]:
    """Squared Frechet (Bures, 2-Wasserstein) distance of the diagonal Gaussians, averaged over channels.

    mean_j [(mu_k_j - mu_f_j)^2 + (s_k_j - s_f_j)^2], in units of the full set's mean channel variance, so that a
    threshold carries over between models. Arguments as in `kappa`.
    """
    origin = _origin(full, full_mask)
    mean_k, var_k = _moments(kept, kept_mask, None, origin)
    mean_f, var_f = _moments(full, full_mask, weights, origin)
    squared = (mean_k - mean_f).square() + (var_k.sqrt() - var_f.sqrt()).square()
    return squared.mean(dim=1) / _scale(var_f)


def sliced_wasserstein(
    kept: Float[Tensor, "b k d"],
    full: Float[Tensor, "b n d"],
    *,
    kept_mask: Bool[Tensor, "b k"] | None = None,
    full_mask: Bool[Tensor, "b n"] | None = None,
    weights: Float[Tensor, "b n"] | None = None,
    num_projections: int = 64,
    seed: int = 0,
) -> Float[Tensor, "b"]:
    """Sliced 2-Wasserstein distance: the root of the mean squared transport cost over fixed random directions.

    On each direction the two sets are matched quantile by quantile, exactly, also when their sizes differ. In units of
    the full set's root mean channel variance. (Bonneel et al., 2015.) Arguments as in `kappa`; `num_projections`
    directions are drawn from `seed`, the same ones on every device.
    """
    directions = random_directions(full.shape[-1], num_projections, seed, device=full.device)
    origin = _origin(full, full_mask)
    values_k, mass_k = _sorted_projection(kept.float() - origin, _mass(kept, kept_mask, None), directions)
    values_f, mass_f = _sorted_projection(full.float() - origin, _mass(full, full_mask, weights), directions)
    levels = torch.cat((mass_k, mass_f), dim=-1).sort(dim=-1).values  # between two levels both quantiles are constant
    width = levels.diff(dim=-1, prepend=torch.zeros_like(levels[..., :1]))
    middle = levels - width / 2.0
    cost = (_quantile(values_k, mass_k, middle) - _quantile(values_f, mass_f, middle)).square()
    _, var_f = _moments(full, full_mask, weights, origin)
    return ((cost * width).sum(dim=-1).mean(dim=-1) / _scale(var_f)).sqrt()


def random_directions(
    width: int, num_projections: int = 64, seed: int = 0, *, device: torch.device | str = "cpu"
) -> Float[Tensor, "p d"]:
    """Unit vectors to project on, the same ones on every device; `width` is d."""
    directions = torch.randn(num_projections, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(directions, dim=1).to(device)


def mmd(
    kept: Float[Tensor, "b k d"],
    full: Float[Tensor, "b n d"],
    *,
    kept_mask: Bool[Tensor, "b k"] | None = None,
    full_mask: Bool[Tensor, "b n"] | None = None,
    weights: Float[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b"]:
    """Squared maximum mean discrepancy with the kernel exp(-|x - y|^2 / (2 h^2)), biased (V-statistic), in [0, 2].

    The bandwidth h^2 is the full set's total variance, half the mean squared distance between two of its tokens.
    (Gretton et al., 2012.) Arguments as in `kappa`.
    """
    mass_k, mass_f = _mass(kept, kept_mask, None), _mass(full, full_mask, weights)
    origin = _origin(full, full_mask)
    _, var_f = _moments(full, full_mask, weights, origin)
    bandwidth = _scale(var_f) * full.shape[-1]
    k, f = kept.float() - origin, full.float() - origin
    within_k = _mean_kernel(k, mass_k, k, mass_k, bandwidth)
    within_f = _mean_kernel(f, mass_f, f, mass_f, bandwidth)
    return (within_k + within_f - 2.0 * _mean_kernel(k, mass_k, f, mass_f, bandwidth)).clamp(min=0.0)


def coverage(
    kept: Float[Tensor, "b k d"],
    full: Float[Tensor, "b n d"],
    *,
    kept_mask: Bool[Tensor, "b k"] | None = None,
    full_mask: Bool[Tensor, "b n"] | None = None,
    weights: Float[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b"]:
    """How much of the full set the kept tokens miss: sum_i w_i (1 - max_j cos(x_i, kept_j)) / sum_i w_i, in [0, 2].

    With weights from saliency and the question's relevance it asks whether what matters is covered, which kappa does
    not. (Ours.) Arguments as in `kappa`.
    """
    cosines = cosine_similarity(full, kept)
    if kept_mask is not None:
        cosines = cosines.masked_fill(~kept_mask.unsqueeze(1), -1.0)
    missing = (1.0 - cosines.amax(dim=2)).clamp(min=0.0)
    return (_mass(full, full_mask, weights) * missing).sum(dim=1)


@torch.no_grad()
def coverage_of_prefixes(
    full: Float[Tensor, "b n d"],
    picks: Int[Tensor, "b k"],
    *,
    full_mask: Bool[Tensor, "b n"] | None = None,
    weights: Float[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b k"]:
    """`coverage` of the first pick, the first two, ..., all k of them at once; it never rises from one to the next.

    Args:
        full: `b n d`.
        picks: positions among the n tokens, in the order of picking. `b k`.
        full_mask: False marks padding among the full set. `b n`.
        weights: of the full set's tokens; default: equal. `b n`.
    """
    closest = cosine_similarity(full, gather_tokens(full, picks)).cummax(dim=2).values
    missing = (1.0 - closest).clamp(min=0.0)
    return (_mass(full, full_mask, weights).unsqueeze(1) @ missing).squeeze(1)


DISTANCES: Mapping[str, Distance] = MappingProxyType(
    {
        "kappa": kappa,
        "kappa_reverse": partial(kappa, direction="reverse"),
        "kappa_symmetric": partial(kappa, direction="symmetric"),
        "frechet": frechet,
        "sliced_wasserstein": sliced_wasserstein,
        "mmd": mmd,
        "coverage": coverage,
    }
)
"""Every distance by name, for triggers and for tables that compare them."""


def _mass(
    tokens: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None, weights: Float[Tensor, "b n"] | None
) -> Float[Tensor, "b n"]:
    """Shares that sum to 1 over the real tokens; equal ones where no weight is positive, 0 where nothing is real."""
    b, n, _ = tokens.shape
    even = torch.ones(b, n, dtype=torch.float32, device=tokens.device)
    if mask is not None:
        even = even * mask
    even = even / even.sum(dim=1, keepdim=True).clamp(min=1.0)
    if weights is None:
        return even
    share = weights.float() if mask is None else weights.float() * mask
    total = share.sum(dim=1, keepdim=True)
    return torch.where(total > 0, share / total.clamp(min=torch.finfo(torch.float32).tiny), even)


def _moments(
    tokens: Float[Tensor, "b n d"],
    mask: Bool[Tensor, "b n"] | None,
    weights: Float[Tensor, "b n"] | None,
    origin: Float[Tensor, "b 1 d"],
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
    """Mean, seen from the origin, and biased variance per channel."""
    tokens = tokens.float() - origin
    mass = _mass(tokens, mask, weights).unsqueeze(1)  # b 1 n
    mean = mass @ tokens
    variance = mass @ (tokens - mean).square()
    return mean.squeeze(1), variance.squeeze(1)


def _origin(full: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b 1 d"]:
    """The first real token. Seen from there equal tokens are exactly 0, where float32 rounding of their mean would be
    mistaken for a shift."""
    if mask is None:
        return full[:, :1].float()
    return gather_tokens(full, mask.to(torch.uint8).argmax(dim=1, keepdim=True)).float()


def _gaussian_kl(
    mean_p: Float[Tensor, "b d"], var_p: Float[Tensor, "b d"], mean_q: Float[Tensor, "b d"], var_q: Float[Tensor, "b d"]
) -> Float[Tensor, "b"]:
    ratio = var_p / var_q
    kl = 0.5 * (ratio + (mean_p - mean_q).square() / var_q - 1.0 - ratio.log())
    return kl.mean(dim=1).clamp(min=0.0)  # rounding may leave -1e-8


def _scale(var_f: Float[Tensor, "b d"]) -> Float[Tensor, "b"]:
    """The full set's mean channel variance, kept above 0."""
    return var_f.mean(dim=1).clamp(min=1e-30)


def _sorted_projection(
    tokens: Float[Tensor, "b n d"], mass: Float[Tensor, "b n"], directions: Float[Tensor, "p d"]
) -> tuple[Float[Tensor, "b p n"], Float[Tensor, "b p n"]]:
    """Projections in ascending order and the cumulative mass up to each."""
    values, order = (directions @ tokens.mT).sort(dim=-1)
    cumulative = mass.unsqueeze(1).expand_as(values).gather(2, order).cumsum(dim=-1)
    return values, cumulative.contiguous()


def _quantile(
    values: Float[Tensor, "b p n"], cumulative: Float[Tensor, "b p n"], levels: Float[Tensor, "b p q"]
) -> Float[Tensor, "b p q"]:
    index = torch.searchsorted(cumulative, levels.contiguous()).clamp(max=values.shape[-1] - 1)
    return values.gather(-1, index)


def _mean_kernel(
    x: Float[Tensor, "b n d"],
    mass_x: Float[Tensor, "b n"],
    y: Float[Tensor, "b m d"],
    mass_y: Float[Tensor, "b m"],
    bandwidth: Float[Tensor, "b"],
) -> Float[Tensor, "b"]:
    norms = x.square().sum(dim=-1).unsqueeze(2) + y.square().sum(dim=-1).unsqueeze(1)
    squared = (norms - 2.0 * x @ y.mT).clamp(min=0.0)
    kernel = (-squared / (2.0 * bandwidth[:, None, None])).exp()
    return (mass_x.unsqueeze(1) @ kernel @ mass_y.unsqueeze(2)).flatten()
