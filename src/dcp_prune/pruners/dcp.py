"""DCP-Prune (arXiv 2606.16633): recover anchors inside the encoder, re-select by text where too much would be lost.

An independent implementation: the paper's overview figure gives the parts, their order and their names; every formula
is this project's own reading, and every choice in it a field of `DCPPruner`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcp_prune.budget import Budget
from dcp_prune.errors import InvalidInputError
from dcp_prune.functional.clustering import assign, facility_location, reselect, unmet_demand
from dcp_prune.functional.distribution import DISTANCES, coverage_of_prefixes, kappa
from dcp_prune.functional.graph import context_to_anchor_graph, propagate
from dcp_prune.functional.relevance import (
    smooth_over_lookalikes,
    token_relevance,
    word_confidence,
    word_similarity,
    word_strength,
)
from dcp_prune.functional.selection import farthest_point, ranked_topk, sorted_prefix
from dcp_prune.functional.similarity import (
    cosine_similarity,
    gather_tokens,
    in_patches,
    scale_to_peak,
    squared_distance,
)
from dcp_prune.pruners.base import EncoderStage, Pruner, Selection, missing_signals
from dcp_prune.tokens import EncoderReduction, EncoderTokens, Signal, VisualTokens

Partition = Literal["farthest", "coverage", "saliency"]
Centres = Literal["facility_location", "k_center"]
Gate = Literal["confidence", "none"]
Space = Literal["language", "encoder"]
Bounded = Literal["demand", "coverage"]


@dataclass(frozen=True, kw_only=True)
class AnchorContextStage(EncoderStage):
    """Anchor-Context Graph Recovery (ACGR) after one encoder layer: keep the anchors, hand them the context, go on.

    Attributes:
        layer: 0-based encoder layer whose output is reduced.
        num_tokens: anchors to keep, m.
        anchors, recovery, neighbours, temperature, sigma, rescale, time_weight: as the fields of `DCPPruner` of these
            names (`temperature` and `sigma` there begin with `graph_`).
    """

    requires: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION})

    layer: int
    num_tokens: int
    anchors: Partition
    recovery: float
    neighbours: int
    temperature: float
    sigma: float | None
    rescale: bool
    time_weight: float

    def reduce(self, tokens: EncoderTokens) -> EncoderReduction:
        """Keeps m of n tokens, `b n v` -> `b m v`; the strongest anchor of each context is its `assignment`.

        Raises:
            MissingSignalError: the tokens carry no [CLS] attention.
        """
        if tokens.cls_attention is None:
            raise missing_signals(type(self).__name__, Signal.CLS_ATTENTION)
        with torch.autocast(tokens.features.device.type, enabled=False):
            with torch.no_grad():
                similarity = None if self.anchors == "saliency" else cosine_similarity(tokens.features)
                anchors = partition(self.anchors, self.num_tokens, similarity, tokens.cls_attention, None)
                anchors = anchors.sort(dim=1).values
                graph = context_to_anchor_graph(
                    tokens.features,
                    in_patches(tokens.positions, self.time_weight),
                    anchors,
                    neighbours=self.neighbours,
                    temperature=self.temperature,
                    sigma=self.sigma,
                )
            features = propagate(
                tokens.features,
                graph,
                strength=self.recovery,
                importance=tokens.cls_attention,
                rescale=self.rescale,
            )
            with torch.no_grad():
                shift = kappa(features, tokens.features)
        return EncoderReduction(features, anchors, graph.assignment(), {"kappa": shift})


@dataclass(frozen=True, kw_only=True)
class DCPPruner(Pruner):
    """DCP-Prune: text-aware token cluster selection (TATCS), behind ACGR stages in the encoder if `schedule` has any.

    After the encoder a cheap first choice is made. If the full set's distance to it exceeds `threshold`, the tokens are
    selected anew: k representatives that cover what is salient and what the question speaks of, the clusters around
    them, and from each cluster the member that stands for it best. Without a question it covers the image alone.

    With `max_distance` each image, under its own question, gets a budget of its own from a range: the fewest cluster
    centres whose distance to all tokens lies below the bound. In all else it is as with that number as fixed budget.
    The centres are greedy, so those of every budget are known at once. (Ours.)

    `stats` of the result: `kappa` (of the kept tokens against all n, `b`), `distance` (the trigger's, of the first
    choice, `b`), `reselected` (`b`), `scores` (how much each token asks to be covered, `b n`), with a question
    `relevance` (`b n`) and `confidence` (of its surest word, `b`), and with `max_distance` what was `reached` (`b`).

    Attributes:
        num_tokens: visual tokens to keep per image; give this or `keep_ratio`. With `max_distance` a range
            (fewest, most), whose ends hold whatever the distance is.
        keep_ratio: share of the visual tokens to keep per image, in (0, 1]; with `max_distance` a range of shares.

        max_distance: bound on the distance of the greedy centres to the tokens at hand, at least 0: 0 keeps the most of
            the range, inf the fewest. It is a bound on the centres; the members that stand for them in the end may lie
            a little nearer or farther.
        bounded: which distance that is. `demand`: the share of the demand that the centres leave unmet,
            1 - sum_i w_i max_j R_ij (j a centre) / sum_i w_i max_j R_ij (j any token), in [0, 1], with w and R as in
            `coverage_weight` and `centre_temperature`. `coverage`: sum_i r_i (1 - max_j cos(x_i, x_j)) / sum_i r_i, in
            [0, 2], with r = relevance ** `relevance_power` (without a question w), the trigger's default: better where
            words surely find their patches, worse elsewhere (docs/results.md).

        schedule: ACGR stages as pairs (after, keep), strictly decreasing in what they keep. `after` is a 0-based layer,
            or as a float the share of the encoder's depth that has passed; `keep` is a count, or as a float a share of
            the image's tokens, raised to the budget where it lies below. Shares fit every encoder: a stage that has
            nothing left to drop, or no layer of its own, is left out. () prunes after the encoder only, which kept more
            accuracy on the testbed; `ProgressiveDCPPruner` is the preset with stages.
        anchors: how a stage chooses its anchors: `farthest` (farthest-point sampling), `coverage` (saliency times
            marginal coverage; slow for many anchors) or `saliency` (top-m by [CLS] attention).
        recovery: lambda, how strongly contexts are poured into their anchors; 0 only drops them.
        neighbours: anchors that share one context, r.
        graph_temperature: of the cosines in the context-to-anchor graph.
        graph_sigma: reach of the graph's spatial term in patches; None leaves it out.
        rescale: recovered anchors keep their old norm.
        time_weight: of videos: how many patches away, in `graph_sigma` and `centre_sigma`, the same place in the next
            frame is (where the model knows when frames were taken, in its next unit of time); 0 leaves time out.

        first_choice: rule of the first choice after the encoder, one of those of `anchors`.
        trigger: distance between first choice and all tokens that decides on re-selection, a name in
            `functional.distribution.DISTANCES`. `coverage` is weighted by relevance ** `relevance_power` (without a
            question by the weights of the selection), the others are not weighted.
        threshold: re-select where the distance is above it; 0 always re-selects, inf never.

        space: features in which tokens are alike: the `encoder`'s (where the tokens carry none, those of the language
            model) or the `language` model's, after the projector.
        centres: how cluster centres are found: `facility_location` or `k_center` (farthest point).
        centre_temperature: of the softmax by which each token shares out its demand among those that could represent
            it, in facility location; so a thing asks for one representative, not for one per patch. None covers plain
            cosines, where what fills the image wins. (The softmax is MMTok's.)
        centre_sigma: reach in patches within which a token that the question speaks of accepts a representative, so
            that two things of one kind are counted as two; it fades with relevance. None accepts any distance.
        coverage_weight: every token's share in the weights w = coverage_weight + saliency_weight * saliency
            + text_weight * relevance ** relevance_power; above 0, so that no question can hide the image.
        saliency_weight: of the [CLS] attention, scaled to a peak of 1; without such attention the term is 0.
        text_weight: of the question's relevance, in [0, 1].
        relevance_power: sharpens relevance; at least 1 favours the few tokens that match best.
        relevance_smoothing: temperature at which tokens that look alike share their cosines to words; 0 is off.
        gate: `confidence` weighs each word by how far its best token stands out from the rest, so that a word without
            a counterpart in the image says nothing; `none` weighs words by their best cosine, so that the strongest
            word always counts in full.
        confidence_margin: standard deviations beyond chance before a word counts; negative trusts words earlier.
        confidence_span: standard deviations from no confidence to full confidence.
        confidence_robust: measure by median and median absolute deviation, for things that fill much of the image.
        text_affinity: a, the share of "speaks to the same words" in the similarity that forms clusters, in [0, 1];
            scaled by the confidence of the surest word.
        reselect_members: choose each cluster's best member; False keeps the centres.
        member_relevance: b, bonus of a member's relevance.
        member_saliency: c, bonus of a member's saliency.

    Raises:
        InvalidInputError: a field outside its range, in one sentence.
    """

    optional: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION, Signal.ENCODER_FEATURES, Signal.TEXT})

    max_distance: float | None = None
    bounded: Bounded = "demand"

    schedule: tuple[tuple[int | float, int | float], ...] = ()
    anchors: Partition = "farthest"
    recovery: float = 0.0
    neighbours: int = 4
    graph_temperature: float = 0.1
    graph_sigma: float | None = 4.0
    rescale: bool = True
    time_weight: float = 1.0

    first_choice: Partition = "farthest"
    trigger: str = "coverage"
    threshold: float = 0.0

    space: Space = "encoder"
    centres: Centres = "facility_location"
    centre_temperature: float | None = 0.2
    centre_sigma: float | None = 6.0
    coverage_weight: float = 0.2
    saliency_weight: float = 0.0
    text_weight: float = 1.0
    relevance_power: float = 3.0
    relevance_smoothing: float = 0.0
    gate: Gate = "confidence"
    confidence_margin: float = -1.5
    confidence_span: float = 4.0
    confidence_robust: bool = False
    text_affinity: float = 0.2
    reselect_members: bool = True
    member_relevance: float = 0.5
    member_saliency: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("anchors", get_args(Partition)),
            ("first_choice", get_args(Partition)),
            ("trigger", tuple(DISTANCES)),
            ("space", get_args(Space)),
            ("centres", get_args(Centres)),
            ("gate", get_args(Gate)),
            ("bounded", get_args(Bounded)),
        ):
            value = getattr(self, name)
            _require(value in choices, name, f"be one of {', '.join(choices)}", value)
        for name in (
            "recovery",
            "time_weight",
            "saliency_weight",
            "text_weight",
            "relevance_smoothing",
            "member_relevance",
            "member_saliency",
        ):
            value = getattr(self, name)
            _require(_number(value) and value >= 0, name, "be a number of at least 0", value)
        for name in ("graph_temperature", "coverage_weight", "relevance_power", "confidence_span"):
            value = getattr(self, name)
            _require(_number(value) and value > 0, name, "be a number above 0", value)
        for name in ("rescale", "confidence_robust", "reselect_members"):
            _require(isinstance(getattr(self, name), bool), name, "be True or False", getattr(self, name))
        for name in ("graph_sigma", "centre_temperature", "centre_sigma"):
            value = getattr(self, name)
            _require(value is None or (_number(value) and value > 0), name, "be above 0 or None", value)
        a, r = self.text_affinity, self.neighbours
        _require(_number(a) and 0 <= a <= 1, "text_affinity", "lie in [0, 1]", a)
        _require(_whole(r) and r >= 1, "neighbours", "be a whole number of at least 1", r)
        _require(_number(self.confidence_margin), "confidence_margin", "be a finite number", self.confidence_margin)
        endless = self.threshold == math.inf
        _require(
            endless or (_number(self.threshold) and self.threshold >= 0), "threshold", "be at least 0", self.threshold
        )
        object.__setattr__(self, "schedule", _checked_schedule(self.schedule))

    @property
    def budget(self) -> Budget:
        return Budget(self.num_tokens, self.keep_ratio, self.scope, self.max_distance)

    def encoder_stages(self, num_original: int, num_layers: int) -> tuple[EncoderStage, ...]:
        """The ACGR stages for an image of `num_original` tokens and an encoder of `num_layers` layers in use.

        Raises:
            InvalidInputError: a layer given as a number has no layer after it, a count lies below the budget, or a mix
                of numbers and shares is out of order.
        """
        k = self.budget.resolve(num_original)
        stages: list[AnchorContextStage] = []
        for after, keep in self.schedule:
            layer = after if isinstance(after, int) else min(max(_half_up(after * num_layers), 1), num_layers - 1) - 1
            num_tokens = keep if isinstance(keep, int) else max(_half_up(keep * num_original), k)
            if k >= num_original or num_tokens >= (stages[-1].num_tokens if stages else num_original) or layer < 0:
                continue
            if layer > num_layers - 2:
                raise InvalidInputError(
                    f"schedule prunes after encoder layer {layer}, but the features leave layer {num_layers - 1} and a "
                    f"stage needs a layer behind it; choose a layer of at most {num_layers - 2}"
                )
            if num_tokens < k:
                raise InvalidInputError(
                    f"schedule keeps {num_tokens} tokens after encoder layer {layer}, below the budget of {k}; "
                    "keep more there, or give a share, which is raised to the budget"
                )
            if stages and layer == stages[-1].layer:
                stages.pop()  # a shallow encoder has one layer for two shares: the later stage does the work of both
            if stages and layer < stages[-1].layer:
                raise InvalidInputError(
                    f"schedule prunes after layer {stages[-1].layer} and then after layer {layer}; sort it by depth"
                )
            stages.append(
                AnchorContextStage(
                    layer=layer,
                    num_tokens=num_tokens,
                    anchors=self.anchors,
                    recovery=self.recovery,
                    neighbours=self.neighbours,
                    temperature=self.graph_temperature,
                    sigma=self.graph_sigma,
                    rescale=self.rescale,
                    time_weight=self.time_weight,
                )
            )
        return tuple(stages)

    @torch.no_grad()
    def prune(self, tokens: VisualTokens, k: int) -> Selection:
        visual = self._visual_features(tokens)
        similarity = cosine_similarity(visual)
        attention = None if tokens.encoder is None else tokens.encoder.cls_attention
        saliency = None if attention is None else scale_to_peak(attention, tokens.mask)
        cosines, words = self._read_question(tokens, similarity)
        relevance = None if cosines is None or words is None else token_relevance(cosines, words)
        weights = self._weights(tokens, saliency, relevance)
        asked = weights if relevance is None else relevance**self.relevance_power

        shares = None
        if self.centres == "facility_location" or (self.max_distance is not None and self.bounded == "demand"):
            shares = self._representation(tokens, similarity, relevance)
        centres = self._centres(tokens, similarity, shares, weights, k)
        filled = reached = None
        if self.max_distance is not None:
            if self.bounded == "coverage":
                reached = coverage_of_prefixes(visual, centres, full_mask=tokens.mask, weights=asked)
            else:
                assert shares is not None
                reached = unmet_demand(shares, centres, demand=weights, mask=tokens.mask)
            filled = self._below(self.max_distance, reached, tokens)

        # Both choices are always made and one is taken: shapes stay static and the host never waits for the device.
        first = sorted_prefix(partition(self.first_choice, k, similarity, saliency, tokens.mask), filled)
        distance = DISTANCES[self.trigger](
            gather_tokens(visual, first),
            visual,
            kept_mask=filled,
            full_mask=tokens.mask,
            # Coverage of what the question speaks of predicts the loss best.
            weights=asked if self.trigger == "coverage" else None,
        )
        severe = distance > self.threshold
        affinity = similarity if cosines is None or words is None else self._affinity(similarity, cosines, words)
        again = self._members(tokens, affinity, centres, filled, saliency, relevance)
        kept = torch.where(severe.unsqueeze(1), again, first)

        stats = {
            "kappa": kappa(gather_tokens(visual, kept), visual, kept_mask=filled, full_mask=tokens.mask),
            "distance": distance,
            "reselected": severe,
            "scores": weights,
        }
        if words is not None and relevance is not None:
            stats |= {"relevance": relevance, "confidence": words.amax(dim=1)}
        if filled is not None and reached is not None:
            last = (filled.sum(dim=1, keepdim=True) - 1).clamp(min=0)
            stats["reached"] = reached.gather(1, last).squeeze(1)
        return Selection(kept=kept, assignment=assign(affinity, kept, tokens.mask, filled), stats=stats, mask=filled)

    def _below(self, bound: float, reached: Float[Tensor, "b k"], tokens: VisualTokens) -> Bool[Tensor, "b k"]:
        """The first centres of each image, as many as bring the distance below the bound, within the range."""
        fewest = self.budget.fewest(tokens.lengths[0])  # the same for all images that are pruned together
        count = 1 + (reached >= bound).sum(dim=1)
        count = count.clamp(min=fewest).minimum(tokens.mask.sum(dim=1))
        return torch.arange(reached.shape[1], device=count.device) < count.unsqueeze(1)

    def _visual_features(self, tokens: VisualTokens) -> Float[Tensor, "b n d"]:
        if self.space == "language" or tokens.encoder is None:
            return tokens.features
        return tokens.encoder.features.masked_fill(~tokens.mask.unsqueeze(-1), 0.0)

    def _read_question(
        self, tokens: VisualTokens, similarity: Float[Tensor, "b n n"]
    ) -> tuple[Float[Tensor, "b n t"] | None, Float[Tensor, "b t"] | None]:
        """Cosines of tokens to words, and how much each word is to be trusted; None without a question."""
        if tokens.text is None or tokens.text.shape[1] == 0:
            return None, None
        cosines = word_similarity(tokens.features, tokens.text, mask=tokens.mask, text_mask=tokens.text_mask)
        if self.relevance_smoothing > 0:
            cosines = smooth_over_lookalikes(cosines, similarity, self.relevance_smoothing, tokens.mask)
        if self.gate == "none":
            return cosines, word_strength(cosines)
        confidence = word_confidence(
            cosines,
            mask=tokens.mask,
            text_mask=tokens.text_mask,
            margin=self.confidence_margin,
            span=self.confidence_span,
            robust=self.confidence_robust,
        )
        return cosines, confidence

    def _weights(
        self, tokens: VisualTokens, saliency: Float[Tensor, "b n"] | None, relevance: Float[Tensor, "b n"] | None
    ) -> Float[Tensor, "b n"]:
        weights = torch.full_like(tokens.mask, self.coverage_weight, dtype=torch.float32)
        if saliency is not None:
            weights = weights + self.saliency_weight * saliency
        if relevance is not None:
            weights = weights + self.text_weight * relevance**self.relevance_power
        return weights.masked_fill(~tokens.mask, 0.0)

    def _affinity(
        self, similarity: Float[Tensor, "b n n"], cosines: Float[Tensor, "b n t"], words: Float[Tensor, "b t"]
    ) -> Float[Tensor, "b n n"]:
        """(1 - a) cos(z_i, z_j) + a cos(q_i, q_j), where a falls with the confidence of the surest word."""
        if self.text_affinity == 0:
            return similarity
        a = self.text_affinity * words.amax(dim=1)[:, None, None]
        return (1.0 - a) * similarity + a * cosine_similarity(cosines * words.unsqueeze(1))

    def _centres(
        self,
        tokens: VisualTokens,
        similarity: Float[Tensor, "b n n"],
        shares: Float[Tensor, "b n n"] | None,
        weights: Float[Tensor, "b n"],
        k: int,
    ) -> Int[Tensor, "b k"]:
        """TATCS: cluster centres, in the order of picking, so the first of them are those of a smaller budget."""
        if self.centres == "facility_location":
            assert shares is not None
            return facility_location(shares, k, demand=weights, mask=tokens.mask)
        return farthest_point(similarity, k, weights=weights, mask=tokens.mask)

    def _members(
        self,
        tokens: VisualTokens,
        affinity: Float[Tensor, "b n n"],
        centres: Int[Tensor, "b k"],
        filled: Bool[Tensor, "b k"] | None,
        saliency: Float[Tensor, "b n"] | None,
        relevance: Float[Tensor, "b n"] | None,
    ) -> Int[Tensor, "b k"]:
        """TATCS: clusters around the centres, the best member of each cluster; ascending."""
        if not self.reselect_members:
            return sorted_prefix(centres, filled)
        bonus = torch.zeros_like(tokens.mask, dtype=affinity.dtype)
        if relevance is not None:
            bonus = bonus + self.member_relevance * relevance
        if saliency is not None:
            bonus = bonus + self.member_saliency * saliency
        clusters = assign(affinity, centres, tokens.mask, filled)
        return sorted_prefix(reselect(affinity, clusters, centres.shape[1], bonus=bonus), filled)

    def _representation(
        self, tokens: VisualTokens, similarity: Float[Tensor, "b n n"], relevance: Float[Tensor, "b n"] | None
    ) -> Float[Tensor, "b n n"]:
        """How well token j would represent token i; with a temperature, each row sums to 1."""
        if self.centre_temperature is None:
            return similarity
        logits = similarity / self.centre_temperature
        if relevance is not None and self.centre_sigma is not None:
            places = in_patches(tokens.positions, self.time_weight)
            distance = squared_distance(places) / (2.0 * self.centre_sigma**2)
            logits = logits.addcmul_(relevance.unsqueeze(2) ** self.relevance_power, distance, value=-1.0)
        return logits.masked_fill_(~tokens.mask.unsqueeze(1), -torch.inf).softmax(dim=2)


@dataclass(frozen=True, kw_only=True)
class ProgressiveDCPPruner(DCPPruner):
    """DCP-Prune with stages inside the encoder: half of the tokens leave at half of its depth, half of the others at
    three quarters.

    The encoder gets faster, and what its later layers would have worked out from the dropped tokens is lost: on the
    testbed that is most of counting. All else is as in `DCPPruner`.
    """

    schedule: tuple[tuple[int | float, int | float], ...] = ((0.5, 0.5), (0.75, 0.25))


def partition(
    rule: Partition,
    m: int,
    similarity: Float[Tensor, "b n n"] | None,
    saliency: Float[Tensor, "b n"] | None,
    mask: Bool[Tensor, "b n"] | None,
) -> Int[Tensor, "b m"]:
    """Splits tokens into m anchors and the rest; positions of the anchors in the order of picking.

    Args:
        rule: `farthest`, `coverage` or `saliency`, as in `DCPPruner.anchors`.
        m: anchors to choose.
        similarity: cosines; not needed by `saliency`.
        saliency: non-negative; needed by `saliency`, used by `coverage` if there is any.
        mask: False marks padding.

    Raises:
        MissingSignalError: the rule `saliency` without saliency.
    """
    if rule == "saliency":
        if saliency is None:
            raise missing_signals("the partition rule 'saliency'", Signal.CLS_ATTENTION)
        return ranked_topk(saliency, mask, m)
    assert similarity is not None
    if rule == "coverage":
        return facility_location(similarity, m, merit=saliency, mask=mask)
    return farthest_point(similarity, m, mask=mask)


def _checked_schedule(
    schedule: Sequence[Sequence[int | float]],
) -> tuple[tuple[int | float, int | float], ...]:
    """The schedule as tuples, with all checked that can be without an image and an encoder."""
    advice = "be pairs (after, keep), each a whole number or a share in (0, 1), such as ((0.5, 0.5), (0.75, 0.25))"
    _require(isinstance(schedule, Sequence) and not isinstance(schedule, str), "schedule", advice, schedule)
    pairs: list[tuple[int | float, int | float]] = []
    for pair in schedule:
        good = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        _require(good, "schedule", advice, schedule)
        after, keep = pair
        _require((_whole(after) and after >= 0) or (_fraction(after)), "schedule", advice, schedule)
        _require((_whole(keep) and keep >= 1) or (_fraction(keep)), "schedule", advice, schedule)
        pairs.append((after, keep))
    for (after, keep), (later, fewer) in pairwise(pairs):
        sorted_ = (type(after) is not type(later) or after < later) and (type(keep) is not type(fewer) or keep > fewer)
        _require(sorted_, "schedule", "go strictly deeper and keep strictly fewer tokens from pair to pair", schedule)
    return tuple(pairs)


def _half_up(value: float) -> int:
    return math.floor(value + 0.5)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fraction(value: object) -> bool:
    return isinstance(value, float) and 0.0 < value < 1.0


def _require(holds: bool, field: str, rule: str, value: object) -> None:
    if not holds:
        raise InvalidInputError(f"DCPPruner: {field} must {rule}, got {value!r}")
