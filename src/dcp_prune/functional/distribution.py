"""How far the kept tokens are from the full set: kappa and other distances, all under one signature.

Every distance takes the kept tokens `b k d` and the full set `b n d`, optional masks, and optional weights that say how
much each token of the full set counts. It works in float32 and returns one number per image, `b`, which is never
negative, and 0 for the full set itself. A small distance proves nothing: a random subset has a very small kappa, and
yet it misses what the question asks about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast

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
        **options: Any,
    ) -> Float[Tensor, "b"]:
        """How far the kept tokens are from the full set, one number per image.

        Args:
            kept: `b k d`.
            full: `b n d`.
            kept_mask: False marks padding among the kept tokens. `b k`.
            full_mask: False marks padding among the full set. `b n`.
            weights: how much each token of the full set counts; default: equal. `b n`.
            options: further options of a distance, described there.
        """
        ...


@dataclass(frozen=True, eq=False)
class Pair:
    """What distances are made of: two sets of tokens with the share of each token in its set, which sum to 1."""

    kept: Float[Tensor, "b k d"]
    full: Float[Tensor, "b n d"]
    kept_mask: Bool[Tensor, "b k"] | None
    full_mask: Bool[Tensor, "b n"] | None
    weights: Float[Tensor, "b n"] | None

    @cached_property
    def kept_mass(self) -> Float[Tensor, "b k"]:
        return _mass(self.kept, self.kept_mask, None)

    @cached_property
    def full_mass(self) -> Float[Tensor, "b n"]:
        return _mass(self.full, self.full_mask, self.weights)

    @cached_property
    def origin(self) -> Float[Tensor, "b 1 d"]:
        """The first real token of the full set. Seen from there equal tokens are exactly 0, where float32 rounding of
        their mean would be mistaken for a shift."""
        if self.full_mask is None:
            return self.full[:, :1].float()
        return gather_tokens(self.full, self.full_mask.to(torch.uint8).argmax(dim=1, keepdim=True)).float()

    @property
    def kept_seen(self) -> Float[Tensor, "b k d"]:
        """The kept tokens in float32, seen from the origin."""
        return self.kept.float() - self.origin

    @property
    def full_seen(self) -> Float[Tensor, "b n d"]:
        """The full set in float32, seen from the origin."""
        return self.full.float() - self.origin

    @cached_property
    def kept_moments(self) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Mean, seen from the origin, and biased variance per channel."""
        return _moments(self.kept_seen, self.kept_mass)

    @cached_property
    def full_moments(self) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """The same of the full set."""
        return _moments(self.full_seen, self.full_mass)

    @cached_property
    def scale(self) -> Float[Tensor, "b"]:
        """The full set's mean channel variance, kept above 0."""
        return self.full_moments[1].mean(dim=1).clamp(min=1e-30)


def _distance(measure: Callable[..., Float[Tensor, "b"]]) -> Distance:
    """Makes a `Distance` of a function of a `Pair`; its further arguments are the options."""

    @wraps(measure)
    def distance(
        kept: Float[Tensor, "b k d"],
        full: Float[Tensor, "b n d"],
        *,
        kept_mask: Bool[Tensor, "b k"] | None = None,
        full_mask: Bool[Tensor, "b n"] | None = None,
        weights: Float[Tensor, "b n"] | None = None,
        **options: Any,
    ) -> Float[Tensor, "b"]:
        return measure(Pair(kept, full, kept_mask, full_mask, weights), **options)

    del distance.__wrapped__  # its signature is that of all distances
    return cast("Distance", distance)


@_distance
def kappa(pair: Pair, *, direction: Direction = "forward") -> Float[Tensor, "b"]:
    """Diagonal-Gaussian KL divergence between kept and full tokens, in nats, averaged over channels.

    kappa = 1/d * sum_j KL(N(mu_k_j, s2_k_j + eps) || N(mu_f_j, s2_f_j + eps)) with biased variances and
    eps = 1e-6 * mean_j s2_f_j. It does not depend on the order of tokens, nor on an affine map of a channel of both.
    (Our reading of the paper's distribution consistency metric, whose equation is not public.)

    Arguments as in `Distance`; weights enter the full set's moments. `direction`: `forward` is KL(kept || full),
    `reverse` KL(full || kept), `symmetric` the mean of both.

    Raises:
        InvalidInputError: an unknown direction.
    """
    if direction not in ("forward", "reverse", "symmetric"):
        raise InvalidInputError(f"direction must be forward, reverse or symmetric, got {direction!r}")
    (mean_k, var_k), (mean_f, var_f) = pair.kept_moments, pair.full_moments
    eps = 1e-6 * pair.scale.unsqueeze(1)
    var_k, var_f = var_k + eps, var_f + eps
    if direction == "forward":
        return _gaussian_kl(mean_k, var_k, mean_f, var_f)
    if direction == "reverse":
        return _gaussian_kl(mean_f, var_f, mean_k, var_k)
    return (_gaussian_kl(mean_k, var_k, mean_f, var_f) + _gaussian_kl(mean_f, var_f, mean_k, var_k)) / 2.0


@_distance
def frechet(pair: Pair) -> Float[Tensor, "b"]:
    """Squared Frechet (Bures, 2-Wasserstein) distance of the diagonal Gaussians, averaged over channels.

    mean_j [(mu_k_j - mu_f_j)^2 + (s_k_j - s_f_j)^2], in units of the full set's mean channel variance, so that a
    threshold carries over between models. Arguments as in `Distance`.
    """
    (mean_k, var_k), (mean_f, var_f) = pair.kept_moments, pair.full_moments
    squared = (mean_k - mean_f).square() + (var_k.sqrt() - var_f.sqrt()).square()
    return squared.mean(dim=1) / pair.scale


@_distance
def sliced_wasserstein(pair: Pair, *, num_projections: int = 64, seed: int = 0) -> Float[Tensor, "b"]:
    """Sliced 2-Wasserstein distance: the root of the mean squared transport cost over fixed random directions.

    On each direction the two sets are matched quantile by quantile, exactly, also when their sizes differ. In units of
    the full set's root mean channel variance. (Bonneel et al., 2015.) Arguments as in `Distance`; `num_projections`
    directions are drawn from `seed`, the same ones on every device.
    """
    directions = random_directions(pair.full.shape[-1], num_projections, seed, device=pair.full.device)
    values_k, mass_k = _sorted_projection(pair.kept_seen, pair.kept_mass, directions)
    values_f, mass_f = _sorted_projection(pair.full_seen, pair.full_mass, directions)
    levels = torch.cat((mass_k, mass_f), dim=-1).sort(dim=-1).values  # between two levels both quantiles are constant
    width = levels.diff(dim=-1, prepend=torch.zeros_like(levels[..., :1]))
    middle = levels - width / 2.0
    cost = (_quantile(values_k, mass_k, middle) - _quantile(values_f, mass_f, middle)).square()
    return ((cost * width).sum(dim=-1).mean(dim=-1) / pair.scale).sqrt()


@_distance
def mmd(pair: Pair) -> Float[Tensor, "b"]:
    """Squared maximum mean discrepancy with the kernel exp(-|x - y|^2 / (2 h^2)), biased (V-statistic), in [0, 2].

    The bandwidth h^2 is the full set's total variance, half the mean squared distance between two of its tokens.
    (Gretton et al., 2012.) Arguments as in `Distance`.
    """
    bandwidth = pair.scale * pair.full.shape[-1]
    k, f = (pair.kept_seen, pair.kept_mass), (pair.full_seen, pair.full_mass)
    within = _mean_kernel(*k, *k, bandwidth) + _mean_kernel(*f, *f, bandwidth)
    return (within - 2.0 * _mean_kernel(*k, *f, bandwidth)).clamp(min=0.0)


@_distance
def coverage(pair: Pair) -> Float[Tensor, "b"]:
    """How much of the full set the kept tokens miss: sum_i w_i (1 - max_j cos(x_i, kept_j)) / sum_i w_i, in [0, 2].

    With weights from saliency and the question's relevance, it measures whether what matters is covered; kappa does
    not. (Ours.) Arguments as in `Distance`.
    """
    cosines = cosine_similarity(pair.full, pair.kept)
    if pair.kept_mask is not None:
        cosines = cosines.masked_fill(~pair.kept_mask.unsqueeze(1), -1.0)
    missing = (1.0 - cosines.amax(dim=2)).clamp(min=0.0)
    return (pair.full_mass * missing).sum(dim=1)


@torch.no_grad()
def coverage_of_prefixes(
    full: Float[Tensor, "b n d"],
    picks: Int[Tensor, "b k"],
    *,
    full_mask: Bool[Tensor, "b n"] | None = None,
    weights: Float[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b k"]:
    """`coverage` of the first pick, the first two picks, ..., and all k picks at once. It never rises.

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


def random_directions(
    width: int, num_projections: int = 64, seed: int = 0, *, device: torch.device | str = "cpu"
) -> Float[Tensor, "p d"]:
    """Unit vectors to project on, the same ones on every device; `width` is d."""
    directions = torch.randn(num_projections, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(directions, dim=1).to(device)


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
    seen: Float[Tensor, "b n d"], mass: Float[Tensor, "b n"]
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
    mean = mass.unsqueeze(1) @ seen
    variance = mass.unsqueeze(1) @ (seen - mean).square()
    return mean.squeeze(1), variance.squeeze(1)


def _gaussian_kl(
    mean_p: Float[Tensor, "b d"], var_p: Float[Tensor, "b d"], mean_q: Float[Tensor, "b d"], var_q: Float[Tensor, "b d"]
) -> Float[Tensor, "b"]:
    ratio = var_p / var_q
    kl = 0.5 * (ratio + (mean_p - mean_q).square() / var_q - 1.0 - ratio.log())
    return kl.mean(dim=1).clamp(min=0.0)  # rounding may leave -1e-8


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
