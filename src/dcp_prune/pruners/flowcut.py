"""FlowCut (arXiv 2505.19536): what keeps flowing into [CLS], layer by layer; drops tokens inside the encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dcp_prune.errors import NonFiniteError
from dcp_prune.pruners.base import EncoderStage, ScorePruner, missing_signals
from dcp_prune.pruners.options import Rule, is_number
from dcp_prune.tokens import EncoderReduction, EncoderTokens, Signal, VisualTokens

SIGNALS = frozenset({Signal.CLS_ATTENTION, Signal.VALUES, Signal.CLS_VALUE_AFFINITY})
BatchDrop = Literal["image", "largest"]
Memory = Annotated[float, Rule("lie in [0, 1)", lambda x: is_number(x) and 0 <= x < 1)]


@dataclass(frozen=True, kw_only=True)
class FlowCutStage(EncoderStage):
    """One encoder layer of FlowCut: it renews the running score, and at every other layer drops the lowest.

    How many are dropped follows from the entropy of the [CLS] attention, so the number is read back to the host there;
    the last stage leaves exactly the budget.

    Attributes:
        layer: 0-based encoder layer whose output is scored.
        num_tokens: the budget at the last stage, None before.
        budget: tokens to keep in the end, K.
        remaining: encoder layers behind this one that are still to prune, 0 at the last stage.
        memory, batch_drop: as the fields of `FlowCutPruner`.
    """

    requires: ClassVar[frozenset[Signal]] = SIGNALS

    layer: int
    num_tokens: int | None
    budget: int
    remaining: int
    memory: float
    batch_drop: BatchDrop

    @torch.no_grad()
    def _running_score(self, tokens: EncoderTokens) -> Float[Tensor, "b n"]:
        attention, affinity, values = tokens.cls_attention, tokens.cls_value_affinity, tokens.values
        if attention is None or affinity is None or values is None:
            raise missing_signals(type(self).__name__, *sorted(self.requires))
        score = flow_score(attention, affinity, values)
        before = tokens.state.get("score")
        return score if before is None else self.memory * before + (1.0 - self.memory) * score

    def reduce(self, tokens: EncoderTokens) -> EncoderReduction:
        """Keeps the best of the running score, `b n v` -> `b m v`; the m tokens of the image that keeps most.

        Raises:
            NonFiniteError: the [CLS] attention holds NaN or inf.
            MissingSignalError: the tokens carry no [CLS] attention or values.
        """
        with torch.autocast(tokens.features.device.type, enabled=False):
            score = self._running_score(tokens)
            if self.remaining % 2:
                b, n = score.shape
                every = torch.arange(n, device=score.device).expand(b, n)
                return EncoderReduction(tokens.features, every, every, mask=tokens.mask, state={"score": score})
            counts = self._counts(tokens)
        width = max(counts)
        keep = torch.tensor(counts, device=score.device)
        ranked = score if tokens.mask is None else score.masked_fill(~tokens.mask, -torch.inf)
        kept, rank = ranked.argsort(dim=1, descending=True, stable=True)[:, :width].sort(dim=1)
        real = rank < keep.unsqueeze(1)
        slots = torch.arange(width, device=score.device).expand_as(kept).masked_fill(~real, -1)
        return EncoderReduction(
            features=tokens.features.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.features.shape[2])),
            kept=kept,
            assignment=torch.full_like(tokens.indices, -1).scatter(1, kept, slots),
            stats={"num_tokens": keep},
            mask=None if min(counts) == width else real,
            state={"score": score.gather(1, kept)},
        )

    def _counts(self, tokens: EncoderTokens) -> list[int]:
        """Tokens to keep of each image; all of them are at least the budget."""
        attention = tokens.cls_attention
        assert attention is not None
        b, n = attention.shape
        if self.remaining == 0:
            return [self.budget] * b
        real = torch.full((b,), n, device=attention.device) if tokens.mask is None else tokens.mask.sum(dim=1)
        rows = torch.stack((attention_entropy(attention), real.to(torch.float32)), dim=1).tolist()
        drops = [self._drop(entropy, int(count)) for entropy, count in rows]
        if self.batch_drop == "largest":
            drops = [max(drops)] * b
        return [max(int(count) - drop, self.budget) for (_, count), drop in zip(rows, drops, strict=True)]

    def _drop(self, entropy: float, n: int) -> int:
        """Tokens to drop of n: few while [CLS] attends evenly, many once its attention has concentrated."""
        if not math.isfinite(entropy):
            raise NonFiniteError(
                f"the [CLS] attention at encoder layer {self.layer} holds NaN or inf, so no selection is meaningful; "
                "check the image and the model's dtype"
            )
        if n <= self.budget:
            return 0
        evenness = entropy / math.log(n)
        return max(0, round((n - self.budget) / math.sqrt(self.remaining) * (1.0 - evenness**2)))


@dataclass(frozen=True, kw_only=True)
class FlowCutPruner(ScorePruner):
    """Scores tokens at every encoder layer before the feature layer, and drops the lowest ones at every other.

    A token's score at a layer is (its share of the [CLS] attention + its share of the affinity of its value to that of
    [CLS]) times the L1 norm of its value; the running score averages over layers. The last of these layers leaves
    exactly the budget. A batch keeps different numbers of different images on the way, as single images would.

    Called on tokens of an encoder pass without these stages, it makes one cut by the scores of the feature layer.

    Attributes:
        memory: share of the running score that a new layer leaves in place. Published: 0.5.
        batch_drop: whose attention decides how many tokens of an `image` are dropped at a layer: its own, or as
            released that of the image in the batch that drops the `largest` number.

    Raises:
        InvalidInputError: memory is outside [0, 1), or batch_drop unknown.
    """

    requires: ClassVar[frozenset[Signal]] = SIGNALS

    memory: Memory = 0.5
    batch_drop: BatchDrop = "image"

    def encoder_stages(self, num_original: int, num_layers: int) -> tuple[EncoderStage, ...]:
        k = self.budget.resolve(num_original)
        if k >= num_original:
            return ()
        last = num_layers - 2
        return tuple(
            FlowCutStage(
                layer=layer,
                num_tokens=k if layer == last else None,
                budget=k,
                remaining=last - layer,
                memory=self.memory,
                batch_drop=self.batch_drop,
            )
            for layer in range(last + 1)
        )

    def score(self, tokens: VisualTokens) -> Float[Tensor, "b n"]:
        return flow_score(
            self.read(tokens, Signal.CLS_ATTENTION),
            self.read(tokens, Signal.CLS_VALUE_AFFINITY),
            self.read(tokens, Signal.VALUES),
        )


def flow_score(
    attention: Float[Tensor, "b n"], affinity: Float[Tensor, "b n"], values: Float[Tensor, "b n c"]
) -> Float[Tensor, "b n"]:
    """(attention_i / sum of attention + affinity_i / sum of affinity) * |values_i|_1, in float32 or wider.

    Args:
        attention: that [CLS] pays to each token, 0 for padding. `b n`.
        affinity: `EncoderTokens.cls_value_affinity`, 0 for padding. `b n`.
        values: averaged over heads. `b n c`.
    """
    return (_share(attention) + _share(affinity)) * torch.linalg.vector_norm(values, ord=1, dim=2)


def attention_entropy(attention: Float[Tensor, "b n"]) -> Float[Tensor, "b"]:
    """Entropy in nats of the attention as a distribution over tokens; a token without any attention adds 0."""
    share = _share(attention)
    return -torch.xlogy(share, share).sum(dim=1)


def _share(row: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    return row / row.sum(dim=1, keepdim=True).clamp(min=torch.finfo(row.dtype).tiny)
