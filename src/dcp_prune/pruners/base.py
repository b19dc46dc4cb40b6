"""What every pruner is: a frozen dataclass whose `__call__` is responsible for guards, budget and invariants."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcp_prune.budget import Budget, Scope, is_range
from dcp_prune.errors import InvalidInputError, MissingSignalError, NonFiniteError
from dcp_prune.functional.selection import masked_topk
from dcp_prune.functional.similarity import gather_tokens, widened
from dcp_prune.memory import free_memory, in_words
from dcp_prune.pruners.batching import join_tiles, regroup, split_tiles, take_rows
from dcp_prune.pruners.options import Checked
from dcp_prune.tokens import (
    EncoderReduction,
    EncoderTokens,
    PrunedTokens,
    Signal,
    TextSpace,
    VisualTokens,
    compose_assignments,
)

_LARGEST = 1e15
"""Beyond it sums of squares overflow float32: cosines and distances turn to NaN."""
_WORTH_ASKING = 2**30
"""Bytes from which on it is worth knowing what is free."""
_FEATURES = "visual features"
_IN_WORDS = {
    Signal.ENCODER_FEATURES: "encoder's features",
    Signal.CLS_ATTENTION: "[CLS] attention",
    Signal.KEYS: "attention keys",
    Signal.VALUES: "attention values",
    Signal.CLS_VALUE_AFFINITY: "affinity of values to that of [CLS]",
    Signal.TEXT: "question's embeddings",
    Signal.CLIP_SIMILARITY: "CLIP similarities",
}


@dataclass(frozen=True, kw_only=True)
class EncoderStage(Checked, ABC):
    """A reduction inside the vision encoder: it keeps `num_tokens` of the tokens that leave layer `layer`.

    The signals in `requires` are those of the same layer. Implementations are frozen dataclasses and pure: what a stage
    needs from the stage before goes as `state` from its `EncoderReduction` to the next `EncoderTokens`.

    Attributes:
        layer: 0-based index of the encoder layer whose output is reduced.
        num_tokens: tokens of each image that go on to the next layer, without [CLS]; None if the data decide.
    """

    layer: int
    num_tokens: int | None
    requires: ClassVar[frozenset[Signal]] = frozenset()

    @abstractmethod
    def reduce(self, tokens: EncoderTokens) -> EncoderReduction:
        """Keeps `num_tokens` of the tokens (`b n v` -> `b m v`); never sees [CLS].

        Where the data decide, images may keep different numbers: m is then the largest, `mask` marks the padding of the
        others, and a later stage has to respect it.
        """


@dataclass(frozen=True)
class Selection:
    """What the `prune` of a method decides about the n tokens that it was given.

    Attributes:
        kept: positions of the k kept tokens among the n, ascending and unique. `b k`.
        features: their new features if the method changed any, else None. `b k d`.
        assignment: for each of the n tokens, the slot in 0..k-1 that stands for it, or -1 if it was dropped; None means
            that all other tokens were dropped. `b n`.
        stats: numbers for the record.
        mask: False marks slots that an image leaves empty, if a range lets it keep fewer than k. They come last, and
            `kept` has any position there. `b k`, or None if every image keeps k.
    """

    kept: Int[Tensor, "b k"]
    features: Float[Tensor, "b k d"] | None = None
    assignment: Int[Tensor, "b n"] | None = None
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Bool[Tensor, "b k"] | None = None


@dataclass(frozen=True, kw_only=True)
class Pruner(Checked, ABC):
    """Turns `VisualTokens` into `PrunedTokens`. An instance is its configuration, its repr and a cache key. The types
    of the fields say which values they take.

    Attributes:
        num_tokens: visual tokens to keep per image; give this or `keep_ratio`. A range (fewest, most) is for pruners
            that can pick from it (`DCPPruner.max_distance`); others refuse it.
        keep_ratio: share of the visual tokens to keep per image, in (0, 1]; or a range of shares.
        scope: whether the budget is for an `image` with all its tiles, or for each `tile`.
    """

    num_tokens: int | tuple[int, int] | None = None
    keep_ratio: float | tuple[float, float] | None = None
    scope: Scope = "image"

    requires: ClassVar[frozenset[Signal]] = frozenset()
    """Signals that the tokens must carry. A missing one raises an error."""
    optional: ClassVar[frozenset[Signal]] = frozenset()
    """Signals that the method uses if they exist."""
    text_space: ClassVar[TextSpace] = "embeddings"
    """In which terms the method reads the question, unless `prune` is told otherwise."""
    matrices: ClassVar[int] = 0
    """How many n x n matrices the method holds at once, from which its memory is estimated."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "keep_ratio"):
            if is_range(given := getattr(self, name)):
                object.__setattr__(self, name, tuple(given))  # a list, as from a file, has no hash
        _ = self.budget  # refuses what makes no sense
        super().__post_init__()

    @property
    def budget(self) -> Budget:
        """What the fields say.

        Raises:
            InvalidInputError: the budget makes no sense, or it is a range and this pruner cannot pick from one.
        """
        for name in ("num_tokens", "keep_ratio"):
            if is_range(given := getattr(self, name)):
                raise InvalidInputError(
                    f"{type(self).__name__} keeps a fixed number of tokens, so {name} must be one number, got the "
                    f"range {given!r}; DCPPruner(max_distance=...) picks from a range"
                )
        return Budget(self.num_tokens, self.keep_ratio, self.scope)

    @property
    def joint(self) -> bool:
        """Whether the images of a batch depend on each other; only to reproduce a release that works like this."""
        return False

    def encoder_stages(self, num_original: int, num_layers: int) -> tuple[EncoderStage, ...]:
        """In-encoder reductions for an image of `num_original` tokens and an encoder whose features leave layer
        `num_layers - 1`; empty for methods that work after the encoder, and always if the budget prunes nothing."""
        return ()

    @abstractmethod
    def prune(self, tokens: VisualTokens, k: int) -> Selection:
        """A method implements this: keep exactly k of the n > k tokens. Every row has at least k tokens to choose from.

        It runs without autocast. Padding is zero and masked. In a row with fewer than k real tokens, the first padded
        ones are marked as real, and `__call__` masks them again in its result.

        If the budget is a range, k is its larger end, at most n. `Selection.mask` then says how many tokens each row
        keeps; none of them may be padding, and no padding is marked as real.
        """

    def read(self, tokens: VisualTokens, signal: Signal) -> Tensor:
        """The values of a required signal, in at least float32. Inside `prune`, padding is zero.

        Raises:
            MissingSignalError: the tokens do not carry it.
        """
        values = read_signal(tokens, signal)
        if values is None:
            raise missing_signals(type(self).__name__, signal)
        return widened(values)

    @final
    def __call__(self, tokens: VisualTokens) -> PrunedTokens:
        """Prunes a batch of images.

        Every row keeps k of its real tokens, or all of them if it has fewer. Slots that it cannot fill come last,
        masked, with index -1 and zero features. Images with different budgets are pruned budget by budget, so no image
        depends on its neighbours. With the scope `tile`, every tile is pruned by itself, and `stats` has a row for each
        tile with tokens.

        Padding may contain anything. Signals of different dtypes are read in the widest of them. The result has the
        dtype of the features.

        Raises:
            NonFiniteError: features, or a signal that this pruner reads, contain NaN, inf or numbers beyond 1e15.
            MissingSignalError: the tokens lack a signal that this pruner needs.
            InvalidInputError: a tensor of the wrong shape or type, or more tokens than the memory can compare.
        """
        padded = self._guard(tokens)
        if self.scope == "tile" and tokens.tiles is not None:
            pruned = join_tiles(self._prune_rows(split_tiles(tokens), padded=True), tokens)
        else:
            pruned = self._prune_rows(tokens, padded)
        return _cut_to_longest(pruned) if self.budget.is_range else pruned

    def _prune_rows(self, tokens: VisualTokens, padded: bool) -> PrunedTokens:
        budget = self.budget
        budgets = [(budget.resolve(length), budget.fewest(length)) for length in tokens.lengths]
        if not budgets:  # a batch without images
            kept = slice(budget.resolve(tokens.num_original))
            return PrunedTokens(
                tokens.features[:, kept], tokens.indices[:, kept], tokens.mask[:, kept], tokens.assignment
            )
        if len(set(budgets)) == 1:
            return self._prune_to(tokens, *budgets[0], padded)
        groups = [[row for row, own in enumerate(budgets) if own == each] for each in sorted(set(budgets))]
        return regroup([self._prune_to(take_rows(tokens, rows), *budgets[rows[0]], padded) for rows in groups], groups)

    def _prune_to(self, tokens: VisualTokens, k: int, fewest: int, padded: bool) -> PrunedTokens:
        n = tokens.features.shape[1]
        if fewest >= n and not padded:
            return PrunedTokens(tokens.features, tokens.indices, tokens.mask, tokens.assignment)
        offered = tokens
        if padded:
            least = 0 if self.budget.is_range else k
            offered = replace(_blank_padding(tokens), mask=_offer_at_least(tokens.mask, least))
        if fewest >= n:
            chosen = Selection(kept=torch.arange(n, device=tokens.mask.device).expand_as(tokens.indices))
        else:
            self._check_memory(tokens)
            with torch.autocast(tokens.features.device.type, enabled=False):
                chosen = self._prune_rows_at_hand(_in_one_dtype(offered), min(k, n))
        if chosen.mask is None:
            chosen = _padding_last(chosen, tokens.mask)
        real = tokens.mask.gather(1, chosen.kept) if chosen.mask is None else chosen.mask
        features = gather_tokens(offered.features, chosen.kept) if chosen.features is None else chosen.features
        features = features.to(tokens.features.dtype)
        return PrunedTokens(
            features=features.masked_fill(~real.unsqueeze(-1), 0.0),
            indices=tokens.indices.gather(1, chosen.kept).masked_fill(~real, -1),
            mask=real,
            assignment=compose_assignments(tokens.assignment, _assignment(chosen, n).masked_fill(~tokens.mask, -1)),
            stats=chosen.stats,
        )

    def _check_memory(self, tokens: VisualTokens) -> None:
        b, n, _ = tokens.features.shape
        together = 1 if self._goes_row_by_row(tokens) else b
        needed = self.matrices * together * n**2 * _wide(tokens.features).itemsize
        if needed < _WORTH_ASKING or needed <= (free := free_memory(str(tokens.features.device))):
            return
        fewer = "" if together == 1 else "prune fewer images at once, "
        raise InvalidInputError(
            f"{type(self).__name__} compares all {n:,} visual tokens of an image with each other, which takes about "
            f"{in_words(needed)} of memory, and {in_words(free)} are free; {fewer}make the picture smaller, give each "
            "tile or frame a budget of its own with scope='tile', or use a pruner that compares none, such as resize"
        )

    def _goes_row_by_row(self, tokens: VisualTokens) -> bool:
        return tokens.features.device.type == "cpu" and not self.joint

    def _prune_rows_at_hand(self, tokens: VisualTokens, k: int) -> Selection:
        """`prune`; on a CPU image by image (ours): their matrices stay in its cache, which is faster, and products of a
        batch, which are rounded otherwise than those of one image, do not tip the scales where two tokens are alike."""
        b = len(tokens.features)
        if b == 1 or not self._goes_row_by_row(tokens):
            return self.prune(tokens, k)
        return _join([self.prune(take_rows(tokens, slice(row, row + 1)), k) for row in range(b)])

    def _guard(self, tokens: VisualTokens) -> bool:
        """Refuses tokens that no selection can be made of; says whether any of them is padding.

        The host waits for the device once, for all answers together.
        """
        tokens.check()
        missing = sorted(signal.value for signal in self.requires if not has_signal(tokens, signal))
        if missing:
            raise missing_signals(type(self).__name__, *missing)
        read = {_FEATURES: tokens.features}
        for signal in sorted(self.requires | self.optional):
            values = read_signal(tokens, signal)
            if values is not None and values.numel() > 0:
                read[_IN_WORDS[signal]] = values
        # A length within the bound has only terms within it, and needs no copy of them; padding may have spoilt it.
        lengths = [torch.linalg.vector_norm(values, dtype=_wide(values)).float() for values in read.values()]
        *found, unpadded = torch.stack([*lengths, tokens.mask.all().float()]).tolist()
        for (name, values), length in zip(read.items(), found, strict=True):
            if not length <= _LARGEST:
                _refuse_wild_numbers(name, values, tokens.text_mask if values is tokens.text else tokens.mask)
        return not unpadded


class SelectionPruner(Pruner):
    """A method that only chooses tokens and leaves their features as they are: implement `select`."""

    @abstractmethod
    def select(self, tokens: VisualTokens, k: int) -> Int[Tensor, "b k"]:
        """Positions of the k kept tokens, in any order, unique, never padding."""

    @final
    def prune(self, tokens: VisualTokens, k: int) -> Selection:
        return Selection(kept=self.select(tokens, k).sort(dim=1).values)


class ScorePruner(Pruner):
    """A method that scores each token by itself and keeps the best: implement `score`."""

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Float[Tensor, "b n"]:
        """The score of each token. The highest are kept; of equal ones, the earlier."""

    @final
    def prune(self, tokens: VisualTokens, k: int) -> Selection:
        scores = self.score(tokens)
        return Selection(kept=masked_topk(scores, tokens.mask, k), stats={"scores": scores})


def read_signal(tokens: VisualTokens, signal: Signal) -> Tensor | None:
    """What `tokens` carry of `signal`, or None."""
    match signal:
        case Signal.ENCODER_FEATURES:
            return None if tokens.encoder is None else tokens.encoder.features
        case Signal.CLS_ATTENTION:
            return None if tokens.encoder is None else tokens.encoder.cls_attention
        case Signal.KEYS:
            return None if tokens.encoder is None else tokens.encoder.keys
        case Signal.VALUES:
            return None if tokens.encoder is None else tokens.encoder.values
        case Signal.CLS_VALUE_AFFINITY:
            return None if tokens.encoder is None else tokens.encoder.cls_value_affinity
        case Signal.TEXT:
            return tokens.text
        case Signal.CLIP_SIMILARITY:
            return tokens.clip_similarity


def has_signal(tokens: VisualTokens, signal: Signal) -> bool:
    """Whether `tokens` carry `signal`."""
    return read_signal(tokens, signal) is not None


def _refuse_wild_numbers(name: str, values: Tensor, mask: Bool[Tensor, "b n"] | None) -> None:
    """Looks closely, since a sum of many numbers or padding may look wild where no token is."""
    real = values if mask is None else values[mask]
    if not torch.isfinite(real).all():
        raise NonFiniteError(
            f"the {name} hold NaN or inf, so no selection is meaningful; check the image and the model's dtype"
        )
    if real.numel() and real.abs().amax() > _LARGEST:
        raise NonFiniteError(
            f"the {name} hold numbers beyond {_LARGEST:.0e}, whose squares cannot be added up in float32; "
            "check the image and the model's dtype"
        )


def missing_signals(pruner: str, *signals: str) -> MissingSignalError:
    """The error for a pruner that needs signals which the tokens do not carry."""
    return MissingSignalError(
        f"{pruner} needs {', '.join(signals)}, which these tokens do not carry; "
        "use a model whose adapter provides it, or another pruner"
    )


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _in_one_dtype(tokens: VisualTokens) -> VisualTokens:
    """The same tokens, with everything in float64 where a part of it is; methods raise half precision themselves."""
    encoder = {} if tokens.encoder is None else vars(tokens.encoder)
    parts = [value for value in (*vars(tokens).values(), *encoder.values()) if isinstance(value, Tensor)]
    floats = {value.dtype for value in parts if value.is_floating_point()}
    if torch.float64 not in floats or floats == {torch.float64}:
        return tokens

    def widen(holder: Any) -> dict[str, Tensor]:
        return {
            name: value.double()
            for name, value in vars(holder).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }

    inner = tokens.encoder and replace(tokens.encoder, **widen(tokens.encoder))
    return replace(tokens, **widen(tokens), encoder=inner)


def _blank_padding(tokens: VisualTokens) -> VisualTokens:
    """The same tokens with zeros in padding, whatever they carry there."""

    def blank(values: Tensor) -> Tensor:
        return values.masked_fill(~tokens.mask if values.ndim == 2 else ~tokens.mask.unsqueeze(-1), 0)

    encoder = tokens.encoder
    if encoder is not None:
        names = ("features", "cls_attention", "keys", "values", "cls_value_affinity")
        found = {name: values for name in names if (values := getattr(encoder, name)) is not None}
        encoder = replace(encoder, **{name: blank(values) for name, values in found.items()})
    clip = None if tokens.clip_similarity is None else blank(tokens.clip_similarity)
    return replace(tokens, features=blank(tokens.features), encoder=encoder, clip_similarity=clip)


def _join(parts: Sequence[Selection]) -> Selection:
    """One selection for a batch from those of its parts."""
    features = [part.features for part in parts if part.features is not None]
    assignments = [part.assignment for part in parts if part.assignment is not None]
    return Selection(
        kept=torch.cat([part.kept for part in parts]),
        features=torch.cat(features) if features else None,
        assignment=torch.cat(assignments) if assignments else None,
        stats={name: torch.cat([part.stats[name] for part in parts]) for name in parts[0].stats},
        mask=None if parts[0].mask is None else torch.cat([part.mask for part in parts if part.mask is not None]),
    )


def _cut_to_longest(pruned: PrunedTokens) -> PrunedTokens:
    """The same without slots that no image fills; the host waits for the device once."""
    longest = int(pruned.mask.sum(dim=1).max().item())
    return replace(
        pruned,
        features=pruned.features[:, :longest],
        indices=pruned.indices[:, :longest],
        mask=pruned.mask[:, :longest],
    )


def _offer_at_least(mask: Bool[Tensor, "b n"], k: int) -> Bool[Tensor, "b n"]:
    """The mask, with the first padded tokens of rows that have fewer than k real ones marked real."""
    missing = k - mask.sum(dim=1, keepdim=True)
    return mask | ((~mask).cumsum(dim=1) <= missing)


def _padding_last(chosen: Selection, mask: Bool[Tensor, "b n"]) -> Selection:
    """The same selection with padded slots moved to the end; nothing moves in rows without any."""
    padded = ~mask.gather(1, chosen.kept)
    order = padded.to(torch.uint8).argsort(dim=1, stable=True)  # old slot of each new slot
    assignment = chosen.assignment
    if assignment is not None:
        renamed = order.argsort(dim=1)  # new slot of each old slot
        assignment = compose_assignments(assignment, renamed)
    features = None if chosen.features is None else gather_tokens(chosen.features, order)
    return replace(chosen, kept=chosen.kept.gather(1, order), features=features, assignment=assignment)


def _assignment(chosen: Selection, n: int) -> Int[Tensor, "b n"]:
    if chosen.assignment is not None:
        return chosen.assignment
    b, k = chosen.kept.shape
    slots = torch.arange(k, device=chosen.kept.device).expand(b, k)
    # The column behind the last takes what empty slots hold.
    kept = chosen.kept if chosen.mask is None else chosen.kept.masked_fill(~chosen.mask, n)
    return torch.full((b, n + 1), -1, dtype=torch.long, device=kept.device).scatter(1, kept, slots)[:, :n]
