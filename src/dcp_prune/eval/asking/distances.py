"""Distances between kept and full tokens by name, with and without weights, measured for many methods at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcp_prune.errors import InvalidInputError
from dcp_prune.functional.distribution import DISTANCES, random_directions
from dcp_prune.functional.relevance import question_relevance
from dcp_prune.functional.similarity import cosine_similarity, scale_to_peak
from dcp_prune.tokens import VisualTokens

WEIGHTS = ("saliency", "relevance", "both")
"""How much each token of the full set counts: its [CLS] attention scaled to the peak; how much the question speaks of
it; or both, with a floor so that nothing counts for nothing (the weights of DCP-Prune)."""
FLOOR = 0.1
DISTANCE_NAMES = (*DISTANCES, *(f"{name}_{weights}" for name in DISTANCES for weights in WEIGHTS))
"""Every distance of `functional.distribution`, unweighted and with each of `WEIGHTS` as a suffix."""


def check_distances(names: Sequence[str]) -> tuple[str, ...]:
    """The names without repetitions.

    Raises:
        InvalidInputError: an unknown one; suggests a near name.
    """
    for name in names:
        if name not in DISTANCE_NAMES:
            near = difflib.get_close_matches(name, DISTANCE_NAMES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(DISTANCE_NAMES)}"
            raise InvalidInputError(f"there is no distance {name!r}; {hint}")
    return tuple(dict.fromkeys(names))


class Reference:
    """Full sets of tokens that the kept tokens of many methods are measured against.

    What a distance needs of the full set alone, and of the pair alone, is computed once for all methods, weights and
    distances; the numbers are those of `functional.distribution`.

    Args:
        tokens: one row per image. `i n d`.
        index: image of each question. `q`.
        text, words: word embeddings of the questions and which of them are words; None for no text. `q t d`, `q t`.
    """

    def __init__(
        self,
        tokens: VisualTokens,
        index: Int[Tensor, "q"],
        text: Float[Tensor, "q t d"] | None,
        words: Bool[Tensor, "q t"] | None,
    ) -> None:
        self.tokens = tokens
        self.index = index
        attention = None if tokens.encoder is None else tokens.encoder.cls_attention
        self.saliency = None if attention is None else scale_to_peak(attention, tokens.mask)
        self.text, self.words = text, words
        self._places = [(index == image).nonzero().flatten() for image in range(len(tokens.features))]
        self._full: dict[int, _FullSet] = {}
        self._weighted: dict[tuple[int, str], _WeightedSet] = {}

    def distances(
        self, names: Sequence[str], kept: Float[Tensor, "r k d"], mask: Bool[Tensor, "r k"], *, by_question: bool
    ) -> dict[str, Float[Tensor, "q"]]:
        """One number per question for each name, but for those whose weights need a [CLS] attention that the encoder
        did not give.

        Args:
            names: in `DISTANCE_NAMES`.
            kept: the tokens that reached the language model; a row per question or, where those do not matter, per
                image.
            mask: False marks padding among them.
            by_question: whether there is a row per question.
        """
        parsed = {name: _parts(name) for name in names}
        if self.saliency is None:
            parsed = {name: parts for name, parts in parsed.items() if parts[1] not in ("saliency", "both")}
        measured = {name: torch.empty(len(self.index), device=kept.device) for name in parsed}
        for image, places in enumerate(self._places):
            if len(places) == 0:
                continue
            own = places if by_question else torch.tensor([image], device=kept.device)
            pair = _Pair(self._full_set(image), kept[own], mask[own])
            for name, (base, suffix) in parsed.items():
                values = pair.distance(base, self._weighted_set(image, suffix))
                measured[name][places] = values.to(measured[name].dtype)
        return measured

    def _full_set(self, image: int) -> _FullSet:
        if image not in self._full:
            self._full[image] = _FullSet(self.tokens.features[image][self.tokens.mask[image]])
        return self._full[image]

    def _weighted_set(self, image: int, suffix: str) -> _WeightedSet:
        key = (image, suffix)
        if key not in self._weighted:
            weights, real = self._weights(image, suffix), self.tokens.mask[image]
            self._weighted[key] = _WeightedSet(self._full_set(image), None if weights is None else weights[:, real])
        return self._weighted[key]

    def _weights(self, image: int, suffix: str) -> Float[Tensor, "w n"] | None:
        """One row per question about the image, or a single one where the question does not matter."""
        if suffix == "":
            return None
        if suffix == "saliency":
            assert self.saliency is not None
            return self.saliency[image : image + 1]
        places, features = self._places[image], self.tokens.features[image : image + 1]
        relevance = torch.zeros(len(places), features.shape[1], device=features.device)
        if self.text is not None:
            rows = features.expand(len(places), -1, -1)
            mask = self.tokens.mask[image].expand(len(places), -1)
            words = None if self.words is None else self.words[places]
            relevance = question_relevance(rows, self.text[places], mask=mask, text_mask=words)
        if suffix == "relevance":
            return relevance
        assert self.saliency is not None
        return relevance + self.saliency[image] + FLOOR


def _parts(name: str) -> tuple[str, str]:
    """The distance and its weights."""
    base, _, suffix = name.rpartition("_")
    return (base, suffix) if suffix in WEIGHTS else (name, "")


class _FullSet:
    """One image's tokens, seen from the first of them (see `functional.distribution`); no weights yet."""

    def __init__(self, tokens: Float[Tensor, "n d"]) -> None:
        self.raw = tokens
        self.origin = tokens[:1].float()
        self.tokens = tokens.float() - self.origin
        self.squares = self.tokens.square().sum(dim=1)

    @cached_property
    def directions(self) -> Float[Tensor, "p d"]:
        return random_directions(self.tokens.shape[1], device=self.tokens.device)

    @cached_property
    def projected(self) -> tuple[Float[Tensor, "p n"], Int[Tensor, "p n"]]:
        ordered = (self.directions @ self.tokens.mT).sort(dim=-1)
        return ordered.values, ordered.indices

    @cached_property
    def squared_distances(self) -> Float[Tensor, "n n"]:
        apart = self.squares.unsqueeze(1) + self.squares - 2.0 * self.tokens @ self.tokens.mT
        return apart.clamp(min=0.0)


class _WeightedSet:
    """A full set with w rows of weights, and what distances need of both. Sums in float64, where they nearly cancel."""

    def __init__(self, full: _FullSet, weights: Float[Tensor, "w n"] | None) -> None:
        self.full = full
        self.weights = weights
        n = len(full.tokens)
        even = torch.full((1, n), 1.0 / n, device=full.tokens.device)
        if weights is None:
            self.mass = even
        else:
            total = weights.float().sum(dim=1, keepdim=True)
            share = weights.float() / total.clamp(min=torch.finfo(torch.float32).tiny)
            self.mass = torch.where(total > 0, share, even)
        wide, mass = full.tokens.double(), self.mass.double()
        mean = mass @ wide
        self.mean = mean.float()
        self.variance = (mass @ wide.square() - mean.square()).clamp(min=0.0).float()
        self.scale = self.variance.mean(dim=1).clamp(min=1e-30)

    @cached_property
    def quantiles(self) -> tuple[Tensor, Tensor, Tensor]:
        """Per projection: mass up to each token `w p n`, integral of the quantile function up to there `w p n`, and of
        its square up to 1 `w p`."""
        values, order = self.full.projected
        mass = self.mass.double()[:, order]
        first = values.double() * mass
        return mass.cumsum(dim=-1), first.cumsum(dim=-1), (values.double() * first).sum(dim=-1)

    @cached_property
    def within(self) -> Float[Tensor, "w"]:
        """Mean kernel of the full set with itself."""
        apart, bandwidth = self.full.squared_distances, self.bandwidth
        rows = [mass @ (apart / (-2.0 * width)).exp_() @ mass for mass, width in zip(self.mass, bandwidth, strict=True)]
        return torch.stack(rows)

    @property
    def bandwidth(self) -> Float[Tensor, "w"]:
        return self.scale * self.full.tokens.shape[1]


class _Pair:
    """r rows of kept tokens and one full set; a distance to it has max(r, w) numbers."""

    def __init__(self, full: _FullSet, kept: Float[Tensor, "r k d"], mask: Bool[Tensor, "r k"]) -> None:
        self.full = full
        self.raw, self.mask = kept, mask
        self.kept = kept.float() - full.origin
        self.whole = bool(mask.all())

    def distance(self, base: str, weighted: _WeightedSet) -> Float[Tensor, "m"]:
        shared = _SHARED.get(base)
        if shared is not None and self.whole:
            return shared(self, weighted)
        rows = max(len(self.raw), len(weighted.mass))
        full = self.full.raw.expand(rows, -1, -1)
        kept, mask = self.raw.expand(rows, -1, -1), self.mask.expand(rows, -1)
        weights = None if weighted.weights is None else weighted.weights.expand(rows, -1)
        return DISTANCES[base](kept, full, kept_mask=mask, weights=weights)

    @cached_property
    def moments(self) -> tuple[Float[Tensor, "r d"], Float[Tensor, "r d"]]:
        return self.kept.mean(dim=1), self.kept.var(dim=1, correction=0)

    @cached_property
    def projected(self) -> Float[Tensor, "r p k"]:
        return (self.full.directions @ self.kept.mT).sort(dim=-1).values

    @cached_property
    def squares(self) -> Float[Tensor, "r k"]:
        return self.kept.square().sum(dim=-1)

    @cached_property
    def squared_distances(self) -> Float[Tensor, "r k n"]:
        apart = self.squares.unsqueeze(2) + self.full.squares - 2.0 * self.kept @ self.full.tokens.mT
        return apart.clamp(min=0.0)

    @cached_property
    def missing(self) -> Float[Tensor, "r n"]:
        cosines = cosine_similarity(self.full.raw.unsqueeze(0), self.raw.flatten(0, 1).unsqueeze(0))[0]
        best = cosines.unflatten(1, self.raw.shape[:2]).amax(dim=2)
        return (1.0 - best.mT).clamp(min=0.0)

    def kappa(self, weighted: _WeightedSet, direction: str) -> Float[Tensor, "m"]:
        (mean_k, var_k), eps = self.moments, 1e-6 * weighted.scale.unsqueeze(1)
        kept, full = (mean_k, var_k + eps), (weighted.mean, weighted.variance + eps)
        forward = _gaussian_kl(*kept, *full) if direction != "reverse" else 0.0
        reverse = _gaussian_kl(*full, *kept) if direction != "forward" else 0.0
        return (forward + reverse) / (2.0 if direction == "symmetric" else 1.0)  # type: ignore[return-value]

    def frechet(self, weighted: _WeightedSet) -> Float[Tensor, "m"]:
        mean_k, var_k = self.moments
        squared = (mean_k - weighted.mean).square() + (var_k.sqrt() - weighted.variance.sqrt()).square()
        return squared.mean(dim=1) / weighted.scale

    def sliced_wasserstein(self, weighted: _WeightedSet) -> Float[Tensor, "m"]:
        """The kept tokens have equal mass, so their quantile function has k equal steps, and with the full set's
        integrals over each step the squared distance is a sum over k terms."""
        values, k = self.projected.double(), self.kept.shape[1]
        cumulative, first, second = weighted.quantiles
        levels = torch.arange(1, k, device=values.device, dtype=torch.float64) / k
        levels = levels.expand(*cumulative.shape[:2], -1).contiguous()
        at = torch.searchsorted(cumulative, levels).clamp(max=cumulative.shape[-1] - 1)
        ordered = self.full.projected[0].double().expand_as(cumulative)
        # Up to the token in which the level falls, and the part of it below the level.
        upto = first.gather(-1, at) - (cumulative.gather(-1, at) - levels) * ordered.gather(-1, at)
        edges = torch.cat((torch.zeros_like(upto[..., :1]), upto, first[..., -1:]), dim=-1)
        cost = (values.square().mean(dim=-1) - 2.0 * (values * edges.diff(dim=-1)).sum(dim=-1) + second).mean(dim=-1)
        return (cost.clamp(min=0.0) / weighted.scale).sqrt()

    def mmd(self, weighted: _WeightedSet) -> Float[Tensor, "m"]:
        width = -2.0 * weighted.bandwidth[:, None, None]
        between = self.squares.unsqueeze(2) + self.squares.unsqueeze(1) - 2.0 * self.kept @ self.kept.mT
        within_k = (between.clamp(min=0.0) / width).exp().mean(dim=(1, 2))
        across = (self.squared_distances / width).exp_().mean(dim=1)
        return (within_k + weighted.within - 2.0 * (across * weighted.mass).sum(dim=1)).clamp(min=0.0)

    def coverage(self, weighted: _WeightedSet) -> Float[Tensor, "m"]:
        return (weighted.mass * self.missing).sum(dim=1)


def _gaussian_kl(mean_p: Tensor, var_p: Tensor, mean_q: Tensor, var_q: Tensor) -> Float[Tensor, "m"]:
    share = var_p / var_q
    return (0.5 * (share + (mean_p - mean_q).square() / var_q - 1.0 - share.log())).mean(dim=1).clamp(min=0.0)


_SHARED: Mapping[str, Callable[[_Pair, _WeightedSet], Tensor]] = {
    "kappa": lambda pair, weighted: pair.kappa(weighted, "forward"),
    "kappa_reverse": lambda pair, weighted: pair.kappa(weighted, "reverse"),
    "kappa_symmetric": lambda pair, weighted: pair.kappa(weighted, "symmetric"),
    "frechet": _Pair.frechet,
    "sliced_wasserstein": _Pair.sliced_wasserstein,
    "mmd": _Pair.mmd,
    "coverage": _Pair.coverage,
}
"""Distances that share work; any other is computed by its own function, and so are sets with padding."""
