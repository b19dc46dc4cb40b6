"""DCP-Prune (arXiv 2606.16633): representatives of clusters that cover the image and what the question speaks of.

It recovers anchors inside the encoder, and re-selects by text where too much would be lost.

An independent implementation: the paper's overview figure gives the parts, their order and their names; every formula
is this project's own reading, and every choice in it a field of `ACGR`, `TATCS` or `Trigger`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from dcp_prune.budget import Budget
from dcp_prune.errors import InvalidInputError
from dcp_prune.functional.clustering import Blend, assign, facility_location, reselect, unmet_demand
from dcp_prune.functional.distribution import DISTANCES, coverage_of_prefixes, kappa
from dcp_prune.functional.graph import context_to_anchor_graph, propagate
from dcp_prune.functional.relevance import token_relevance, word_confidence, word_similarity
from dcp_prune.functional.selection import farthest_point, ranked_topk, sorted_prefix
from dcp_prune.functional.similarity import (
    cosine_similarity,
    gather_tokens,
    in_patches,
    scale_to_peak,
)
from dcp_prune.pruners.base import EncoderStage, Pruner, Selection, missing_signals
from dcp_prune.pruners.options import Bound, Checked, Count, Number, Positive, Rule, Share, Weight, is_whole
from dcp_prune.tokens import EncoderReduction, EncoderTokens, Signal, VisualTokens

Partition = Literal["farthest", "coverage", "saliency"]
DistanceName = Annotated[
    str, Rule(f"be one of {', '.join(DISTANCES)}", lambda name: isinstance(name, str) and name in DISTANCES)
]
Schedule = tuple[tuple[int | float, int | float], ...]


@dataclass(frozen=True, kw_only=True)
class ACGR(Checked):
    """Anchor-Context Graph Recovery: between layers of the encoder, context is poured into anchors and leaves.

    Attributes:
        schedule: the stages as pairs (after, keep), strictly decreasing in what they keep. `after` is a 0-based layer,
            or as a float the share of the encoder's depth that has passed; `keep` is a count of anchors, or as a float
            a share of the image's tokens, raised to the budget where it lies below. Shares fit every encoder: a stage
            that has nothing left to drop, or no layer of its own, is left out.
        anchors: how a stage chooses its anchors: `farthest` (farthest-point sampling), `coverage` (saliency times
            marginal coverage; slow for many anchors) or `saliency` (top-m by [CLS] attention).
        recovery: lambda, how strongly contexts are poured into their anchors; 0 only drops them. One number for all
            stages, or one for each pair of the schedule: (5.0, 0.0) recovers at the first alone.
        neighbours: anchors that share one context, r.
        graph_temperature: of the cosines in the context-to-anchor graph.
        graph_sigma: reach of the graph's spatial term in patches; None leaves it out.
        rescale: recovered anchors keep their old norm.

    Raises:
        InvalidInputError: a field outside its range, in one sentence.
    """

    schedule: Schedule = ((0.5, 0.5), (0.75, 0.25))
    anchors: Partition = "farthest"
    recovery: Weight | tuple[Weight, ...] = 0.0
    neighbours: Count = 4
    graph_temperature: Positive = 0.1
    graph_sigma: Positive | None = 4.0
    rescale: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", _checked_schedule(self.schedule))
        if isinstance(self.recovery, list):
            object.__setattr__(self, "recovery", tuple(self.recovery))
        super().__post_init__()
        if isinstance(self.recovery, tuple) and len(self.recovery) != len(self.schedule):
            raise InvalidInputError(
                f"ACGR: recovery must be one number or one for each of the {len(self.schedule)} stages, got "
                f"{self.recovery!r}"
            )

    def stages(self, num_original: int, num_layers: int, k: int, time_weight: float) -> tuple[EncoderStage, ...]:
        """The stages for an image of `num_original` tokens, a budget of k and an encoder of `num_layers` layers in use.

        Raises:
            InvalidInputError: a layer given as a number has no layer after it, a count lies below the budget, or a mix
                of numbers and shares is out of order.
        """
        stages: list[AnchorContextStage] = []
        recovery = self.recovery if isinstance(self.recovery, tuple) else (self.recovery,) * len(self.schedule)
        for (after, keep), strength in zip(self.schedule, recovery, strict=True):
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
                    layer=layer, num_tokens=num_tokens, acgr=self, recovery=strength, time_weight=time_weight
                )
            )
        return tuple(stages)


@dataclass(frozen=True, kw_only=True)
class AnchorContextStage(EncoderStage):
    """ACGR after one encoder layer: keep the anchors, hand them the context, go on.

    Attributes:
        layer: 0-based encoder layer whose output is reduced.
        num_tokens: anchors to keep, m.
        acgr: how.
        recovery: lambda at this layer.
        time_weight: as in `DCPPruner`.
    """

    requires: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION})

    layer: int
    num_tokens: int
    acgr: ACGR
    recovery: float
    time_weight: float

    def reduce(self, tokens: EncoderTokens) -> EncoderReduction:
        """Keeps m of n tokens, `b n v` -> `b m v`; the strongest anchor of each context is its `assignment`.

        Raises:
            MissingSignalError: the tokens carry no [CLS] attention.
        """
        if tokens.cls_attention is None:
            raise missing_signals(type(self).__name__, Signal.CLS_ATTENTION)
        acgr = self.acgr
        with torch.autocast(tokens.features.device.type, enabled=False):
            with torch.no_grad():
                similarity = None if acgr.anchors == "saliency" else cosine_similarity(tokens.features)
                anchors = partition(acgr.anchors, self.num_tokens, similarity, tokens.cls_attention, None)
                anchors = anchors.sort(dim=1).values
                graph = context_to_anchor_graph(
                    tokens.features,
                    in_patches(tokens.positions, self.time_weight),
                    anchors,
                    neighbours=acgr.neighbours,
                    temperature=acgr.graph_temperature,
                    sigma=acgr.graph_sigma,
                )
            features = propagate(
                tokens.features,
                graph,
                strength=self.recovery,
                importance=tokens.cls_attention,
                rescale=acgr.rescale,
            )
            with torch.no_grad():
                shift = kappa(features, tokens.features)
        return EncoderReduction(features, anchors, graph.assignment(), {"kappa": shift})


@dataclass(frozen=True, kw_only=True)
class Trigger(Checked):
    """When TATCS selects anew: where a cheap first choice lies too far from all tokens.

    Attributes:
        first_choice: rule of the first choice after the encoder, one of those of `ACGR.anchors`.
        distance: between first choice and all tokens, a name in `functional.distribution.DISTANCES`. `coverage` is
            weighted by relevance ** `TATCS.relevance_power` (without a question by the weights of the selection), the
            others are not weighted.
        threshold: re-select where the distance is above it; 0 always re-selects, inf never.

    Raises:
        InvalidInputError: a field outside its range, in one sentence.
    """

    first_choice: Partition = "farthest"
    distance: DistanceName = "coverage"
    threshold: Bound = 0.0


@dataclass(frozen=True)
class Question:
    """What the question says: `cosines` of tokens to words `b n t`, `words`, how far to trust each `b t`, and
    `relevance` of the tokens `b n`."""

    cosines: Float[Tensor, "b n t"]
    words: Float[Tensor, "b t"]
    relevance: Float[Tensor, "b n"]


@dataclass(frozen=True, kw_only=True)
class TATCS(Checked):
    """Text-Aware Token Cluster Selection: representatives of what is salient and asked for, and from the cluster around
    each the member that stands for it best.

    Attributes:
        space: where visual tokens are compared with each other: `language`, as the language model reads them, or
            `encoder`, as they leave the encoder.
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
        confidence_margin: standard deviations beyond chance before a word counts, so that a word without a counterpart
            in the image says nothing; negative trusts words earlier.
        confidence_span: standard deviations from no confidence to full confidence.
        text_affinity: a, the share of "speaks to the same words" in the similarity that forms clusters, in [0, 1];
            scaled by the confidence of the surest word.
        reselect_members: choose each cluster's best member; False keeps the centres.
        member_relevance: b, bonus of a member's relevance.
        member_saliency: c, bonus of a member's saliency.

    Raises:
        InvalidInputError: a field outside its range, in one sentence.
    """

    space: Literal["language", "encoder"] = "language"
    centre_temperature: Positive | None = 0.2
    centre_sigma: Positive | None = 6.0
    coverage_weight: Positive = 0.2
    saliency_weight: Weight = 0.0
    text_weight: Weight = 1.0
    relevance_power: Positive = 1.5
    confidence_margin: Number = -1.5
    confidence_span: Positive = 4.0
    text_affinity: Share = 0.2
    reselect_members: bool = True
    member_relevance: Weight = 0.5
    member_saliency: Weight = 0.1

    def visual(self, tokens: VisualTokens) -> Float[Tensor, "b n d"]:
        """The features that tokens are compared by; without those of the encoder, the language model's."""
        if self.space == "language" or tokens.encoder is None:
            return tokens.features
        return tokens.encoder.features.masked_fill(~tokens.mask.unsqueeze(-1), 0.0)

    def read(self, tokens: VisualTokens) -> Question | None:
        """What the question says about the tokens; None without a question."""
        if tokens.text is None or tokens.text.shape[1] == 0:
            return None
        cosines = word_similarity(tokens.features, tokens.text, mask=tokens.mask, text_mask=tokens.text_mask)
        words = word_confidence(
            cosines,
            mask=tokens.mask,
            text_mask=tokens.text_mask,
            margin=self.confidence_margin,
            span=self.confidence_span,
        )
        return Question(cosines, words, token_relevance(cosines, words))

    def demand(
        self, tokens: VisualTokens, saliency: Float[Tensor, "b n"] | None, question: Question | None
    ) -> Float[Tensor, "b n"]:
        """The weights w: how much it matters that each token is represented; 0 in padding."""
        weights = torch.full_like(tokens.mask, self.coverage_weight, dtype=torch.float32)
        if saliency is not None:
            weights = weights + self.saliency_weight * saliency
        if question is not None:
            weights = weights + self.text_weight * question.relevance**self.relevance_power
        return weights.masked_fill(~tokens.mask, 0.0)

    def representation(
        self,
        tokens: VisualTokens,
        similarity: Float[Tensor, "b n n"],
        question: Question | None,
        places: Float[Tensor, "b n p"],
    ) -> Float[Tensor, "b n n"]:
        """How well token j would represent token i; with a temperature, each row sums to 1."""
        if self.centre_temperature is None:
            return similarity
        # All that is added to cosine / temperature is a product of a few columns, and takes no matrix of its own.
        out_of_reach = torch.zeros_like(tokens.mask, dtype=similarity.dtype).masked_fill(~tokens.mask, -1e30)
        rows, columns = [torch.ones_like(out_of_reach)], [out_of_reach]
        if question is not None and self.centre_sigma is not None:
            places = places.to(similarity.dtype).masked_fill(~tokens.mask.unsqueeze(2), 0.0)
            places = places - places.sum(dim=1, keepdim=True) / tokens.mask.sum(dim=1).clamp(min=1)[:, None, None]
            reach = question.relevance.to(similarity.dtype) ** self.relevance_power / (2.0 * self.centre_sigma**2)
            length = places.square().sum(dim=2)
            rows += [-reach * length, -reach, *(2.0 * reach.unsqueeze(2) * places).unbind(dim=2)]
            columns += [torch.ones_like(length), length, *places.unbind(dim=2)]
        left, right = torch.stack(rows, dim=2), torch.stack(columns, dim=1)
        return torch.baddbmm(similarity, left, right, beta=1.0 / self.centre_temperature).softmax(dim=2)

    def affinity(self, similarity: Float[Tensor, "b n n"], question: Question | None) -> Float[Tensor, "b n n"] | Blend:
        """(1 - a) cos(x_i, x_j) + a cos(q_i, q_j), where a falls with the confidence of the surest word."""
        if question is None or self.text_affinity == 0:
            return similarity
        a = self.text_affinity * question.words.amax(dim=1)[:, None, None].to(similarity.dtype)
        spoken = functional.normalize((question.cosines * question.words.unsqueeze(1)).to(similarity.dtype), dim=2)
        return Blend(similarity, 1.0 - a, a.sqrt() * spoken)

    def members(
        self,
        tokens: VisualTokens,
        affinity: Float[Tensor, "b n n"] | Blend,
        centres: Int[Tensor, "b k"],
        filled: Bool[Tensor, "b k"] | None,
        saliency: Float[Tensor, "b n"] | None,
        question: Question | None,
    ) -> Int[Tensor, "b k"]:
        """The best member of the cluster around each centre; ascending."""
        if not self.reselect_members:
            return sorted_prefix(centres, filled)
        bonus = torch.zeros_like(tokens.mask, dtype=affinity.dtype)
        if question is not None:
            bonus = bonus + self.member_relevance * question.relevance
        if saliency is not None:
            bonus = bonus + self.member_saliency * saliency
        clusters = assign(affinity, centres, tokens.mask, filled)
        return sorted_prefix(reselect(affinity, clusters, centres.shape[1], bonus=bonus), filled)


@dataclass(frozen=True, kw_only=True)
class DCPPruner(Pruner):
    """DCP-Prune: text-aware token cluster selection (TATCS), behind ACGR stages in the encoder if `acgr` says so.

    After the encoder a cheap first choice is made. If its distance to the full set exceeds the trigger's threshold, the
    tokens are selected anew: k representatives that cover what is salient and what the question speaks of, the clusters
    around them, and from each cluster the member that stands for it best. Without a question it covers the image alone.

    Tokens are alike in the encoder's features; where the tokens carry none, in those of the language model.

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

        acgr: what happens between the layers of the encoder; None prunes after the encoder only, which kept more
            accuracy on the testbed. `dcp_progressive` is the preset with stages.
        trigger: when to select anew.
        tatcs: how.
        time_weight: of videos: how many patches away, in `ACGR.graph_sigma` and `TATCS.centre_sigma`, the same place in
            the next frame is (where the model knows when frames were taken, in its next unit of time); 0 leaves time
            out.

        max_distance: bound on the distance of the greedy centres to the tokens at hand, at least 0: 0 keeps the most of
            the range, inf the fewest. It is a bound on the centres; the members that stand for them in the end may lie
            a little nearer or farther.
        bounded: which distance that is. `demand`: the share of the demand that the centres leave unmet,
            1 - sum_i w_i max_j R_ij (j a centre) / sum_i w_i max_j R_ij (j any token), in [0, 1], with w and R as in
            `TATCS.coverage_weight` and `TATCS.centre_temperature`. `coverage`:
            sum_i r_i (1 - max_j cos(x_i, x_j)) / sum_i r_i, in [0, 2], with r = relevance ** `TATCS.relevance_power`
            (without a question w), the trigger's default: better where words surely find their patches, worse elsewhere
            (docs/results.md).

    Raises:
        InvalidInputError: a field outside its range, in one sentence.
    """

    optional: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION, Signal.ENCODER_FEATURES, Signal.TEXT})
    matrices: ClassVar[int] = 4

    acgr: ACGR | None = None
    trigger: Trigger = Trigger()
    tatcs: TATCS = TATCS()
    time_weight: Weight = 1.0

    max_distance: float | None = None
    bounded: Literal["demand", "coverage"] = "demand"

    @property
    def budget(self) -> Budget:
        return Budget(self.num_tokens, self.keep_ratio, self.scope, self.max_distance)

    def encoder_stages(self, num_original: int, num_layers: int) -> tuple[EncoderStage, ...]:
        """The stages of `acgr`; raises as `ACGR.stages` does."""
        if self.acgr is None:
            return ()
        return self.acgr.stages(num_original, num_layers, self.budget.resolve(num_original), self.time_weight)

    @torch.no_grad()
    def prune(self, tokens: VisualTokens, k: int) -> Selection:
        tatcs = self.tatcs
        visual = tatcs.visual(tokens)
        similarity = cosine_similarity(visual)
        attention = None if tokens.encoder is None else tokens.encoder.cls_attention
        saliency = None if attention is None else scale_to_peak(attention, tokens.mask)
        question = tatcs.read(tokens)
        demand = tatcs.demand(tokens, saliency, question)
        asked = demand if question is None else question.relevance**tatcs.relevance_power

        places = in_patches(tokens.positions, self.time_weight)
        shares = tatcs.representation(tokens, similarity, question, places)
        # In the order of picking, so that the first of them are those of a smaller budget.
        centres = facility_location(shares, k, demand=demand, mask=tokens.mask)
        filled = reached = None
        if self.max_distance is not None:
            if self.bounded == "coverage":
                reached = coverage_of_prefixes(visual, centres, full_mask=tokens.mask, weights=asked)
            else:
                reached = unmet_demand(shares, centres, demand=demand, mask=tokens.mask)
            filled = self._below(self.max_distance, reached, tokens)

        # Both choices are always made and one is taken: shapes stay static and the host never waits for the device.
        first = sorted_prefix(partition(self.trigger.first_choice, k, similarity, saliency, tokens.mask), filled)
        distance = DISTANCES[self.trigger.distance](
            gather_tokens(visual, first),
            visual,
            kept_mask=filled,
            full_mask=tokens.mask,
            # Coverage of what the question speaks of predicts the loss best.
            weights=asked if self.trigger.distance == "coverage" else None,
        )
        severe = distance > self.trigger.threshold
        affinity = tatcs.affinity(similarity, question)
        again = tatcs.members(tokens, affinity, centres, filled, saliency, question)
        kept = torch.where(severe.unsqueeze(1), again, first)

        stats = {
            "kappa": kappa(gather_tokens(visual, kept), visual, kept_mask=filled, full_mask=tokens.mask),
            "distance": distance,
            "reselected": severe,
            "scores": demand,
        }
        if question is not None:
            stats |= {"relevance": question.relevance, "confidence": question.words.amax(dim=1)}
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


def partition(
    rule: Partition,
    m: int,
    similarity: Float[Tensor, "b n n"] | None,
    saliency: Float[Tensor, "b n"] | None,
    mask: Bool[Tensor, "b n"] | None,
) -> Int[Tensor, "b m"]:
    """Splits tokens into m anchors and the rest; positions of the anchors in the order of picking.

    Args:
        rule: `farthest`, `coverage` or `saliency`, as in `ACGR.anchors`.
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


def _checked_schedule(schedule: Sequence[Sequence[int | float]]) -> Schedule:
    """The schedule as tuples, with all checked that can be without an image and an encoder."""

    def require(holds: bool, rule: str) -> None:
        if not holds:
            raise InvalidInputError(f"ACGR: schedule must {rule}, got {schedule!r}")

    advice = (
        "be pairs (after, keep), each a whole number or a share in (0, 1), such as ((0.5, 0.5), (0.75, 0.25)); without "
        "stages there is acgr=None"
    )
    require(isinstance(schedule, list | tuple) and len(schedule) > 0, advice)
    for pair in schedule:
        require(isinstance(pair, list | tuple) and len(pair) == 2, advice)
        for value, least in zip(pair, (0, 1), strict=True):
            whole, share = is_whole(value) and value >= least, isinstance(value, float) and 0.0 < value < 1.0
            require(whole or share, advice)
    pairs = tuple((after, keep) for after, keep in schedule)
    for (after, keep), (later, fewer) in pairwise(pairs):
        sorted_ = (type(after) is not type(later) or after < later) and (type(keep) is not type(fewer) or keep > fewer)
        require(sorted_, "go strictly deeper and keep strictly fewer tokens from pair to pair")
    return pairs


def _half_up(value: float) -> int:
    return math.floor(value + 0.5)
