"""What every registered pruner promises, whatever its method."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dcp_prune import (
    EncoderTokens,
    InvalidInputError,
    MissingSignalError,
    Pruner,
    Signal,
    VisualTokens,
    get_pruner,
    list_pruners,
    make_pruner,
)
from dcp_prune.errors import NonFiniteError
from dcp_prune.pruners import base
from dcp_prune.pruners.base import read_signal

B, SIDE, D, WORDS = 3, 8, 24, 5
N = SIDE * SIDE
PRUNERS = list_pruners()
BUDGETS = [1, 7, 16, N - 1]

pytestmark = pytest.mark.parametrize("name", PRUNERS)


def make_tokens(seed: int = 0, b: int = B, *, mask: torch.Tensor | None = None) -> VisualTokens:
    """Tokens with every signal, all of it in numbers that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-64, 64, shape, generator=generator) / 16.0

    attention = torch.stack([torch.randperm(N, generator=generator) for _ in range(b)]) / 4096.0
    return VisualTokens.from_features(
        draw(b, N, D),
        mask=mask,
        cls_attention=attention,
        encoder_features=draw(b, N, D),
        keys=draw(b, N, 8),
        values=draw(b, N, 8),
        cls_value_affinity=torch.stack([torch.randperm(N, generator=generator) for _ in range(b)]) / 4096.0,
        text=draw(b, WORDS, D),
        text_mask=torch.arange(WORDS).expand(b, WORDS) < WORDS - 1,
        clip_similarity=torch.stack([torch.randperm(N, generator=generator) for _ in range(b)]) / 64.0 - 0.5,
    )


def rows(tokens: VisualTokens, index: torch.Tensor) -> VisualTokens:
    """The images at `index`, in that order."""
    taken = {
        field.name: value[index] if isinstance(value := getattr(tokens, field.name), torch.Tensor) else value
        for field in dataclasses.fields(tokens)
    }
    assert tokens.encoder is not None
    return VisualTokens(**{**taken, "encoder": each(tokens.encoder, lambda value: value[index])})


def each(tokens: EncoderTokens, change: Callable[[torch.Tensor], torch.Tensor]) -> EncoderTokens:
    """The same with every tensor changed."""
    changed = {key: change(value) for key, value in vars(tokens).items() if isinstance(value, torch.Tensor)}
    return replace(tokens, **changed, state={key: change(value) for key, value in tokens.state.items()})


def cast(tokens: VisualTokens, dtype: torch.dtype) -> VisualTokens:
    assert tokens.encoder is not None
    assert tokens.text is not None
    encoder = each(tokens.encoder, lambda value: value.to(dtype) if value.is_floating_point() else value)
    return replace(tokens, features=tokens.features.to(dtype), text=tokens.text.to(dtype), encoder=encoder)


def garbled(tokens: VisualTokens) -> VisualTokens:
    """The same tokens with large values wherever there is padding."""
    assert tokens.encoder is not None
    padding = ~tokens.mask.unsqueeze(-1)
    encoder = replace(
        tokens.encoder,
        features=tokens.encoder.features.masked_fill(padding, 300.0),
        cls_attention=None
        if tokens.encoder.cls_attention is None
        else tokens.encoder.cls_attention.masked_fill(~tokens.mask, 3.0),
        keys=None if tokens.encoder.keys is None else tokens.encoder.keys.masked_fill(padding, 300.0),
        values=None if tokens.encoder.values is None else tokens.encoder.values.masked_fill(padding, 300.0),
        cls_value_affinity=None
        if tokens.encoder.cls_value_affinity is None
        else tokens.encoder.cls_value_affinity.masked_fill(~tokens.mask, 3.0),
    )
    assert tokens.clip_similarity is not None
    return replace(
        tokens,
        features=tokens.features.masked_fill(padding, 300.0),
        encoder=encoder,
        clip_similarity=tokens.clip_similarity.masked_fill(~tokens.mask, -3.0),
    )


@pytest.fixture
def tokens() -> VisualTokens:
    return make_tokens()


@pytest.mark.parametrize("k", BUDGETS)
def test_exactly_the_budget_is_kept_in_raster_order_without_repeats(name, k, tokens):
    pruned = make_pruner(name, num_tokens=k)(tokens)
    assert pruned.features.shape == (B, k, D)
    assert pruned.indices.shape == pruned.mask.shape == (B, k)
    assert pruned.mask.all()
    assert (pruned.indices.diff(dim=1) > 0).all()
    assert pruned.indices.min() >= 0
    assert pruned.indices.max() < N


def test_a_share_keeps_as_many_as_the_count_it_stands_for(name, tokens):
    share, count = make_pruner(name, keep_ratio=0.25)(tokens), make_pruner(name, num_tokens=N // 4)(tokens)
    assert torch.equal(share.indices, count.indices)


@pytest.mark.parametrize("k", [N, N + 1, 10 * N])
def test_a_budget_that_prunes_nothing_changes_nothing(name, k, tokens):
    pruner = make_pruner(name, num_tokens=k)
    pruned = pruner(tokens)
    assert torch.equal(pruned.features, tokens.features)
    assert torch.equal(pruned.indices, tokens.indices)
    assert torch.equal(pruned.assignment, tokens.assignment)
    assert pruner.encoder_stages(N, 12) == ()


@pytest.mark.parametrize("k", [1, 16])
def test_kept_tokens_own_their_slots_and_every_assignment_is_a_slot_or_none(name, k, tokens):
    pruned = make_pruner(name, num_tokens=k)(tokens)
    assert pruned.assignment.shape == (B, N)
    assert pruned.assignment.gather(1, pruned.indices).tolist() == [[*range(k)]] * B
    assert pruned.assignment.min() >= -1
    assert pruned.assignment.max() == k - 1


def test_permuting_the_images_permutes_the_result(name, tokens):
    order = torch.tensor([2, 0, 1])
    pruner = make_pruner(name, num_tokens=9)
    straight, permuted = pruner(tokens), pruner(rows(tokens, order))
    assert torch.equal(permuted.indices, straight.indices[order])
    assert torch.equal(permuted.assignment, straight.assignment[order])
    torch.testing.assert_close(permuted.features, straight.features[order])


def test_a_batch_equals_single_images(name, tokens):
    pruner = make_pruner(name, num_tokens=9)
    together = pruner(tokens)
    for i in range(B):
        alone = pruner(rows(tokens, torch.tensor([i])))
        assert torch.equal(alone.indices[0], together.indices[i])
        assert torch.equal(alone.assignment[0], together.assignment[i])
        assert torch.equal(alone.features[0], together.features[i])
        assert alone.stats.keys() == together.stats.keys()
        for key, value in alone.stats.items():
            torch.testing.assert_close(value[0], together.stats[key][i], rtol=1e-3, atol=1e-5)


def test_the_same_call_twice_gives_the_same_result_and_touches_neither_inputs_nor_global_randomness(name, tokens):
    pruner = make_pruner(name, num_tokens=9)
    state = torch.random.get_rng_state()
    first = pruner(tokens)
    torch.manual_seed(99)
    second = pruner(tokens)
    torch.random.set_rng_state(state)
    third = pruner(tokens)
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.indices, third.indices)
    assert torch.equal(torch.random.get_rng_state(), state)
    fresh = make_tokens()
    assert fresh.encoder is not None
    assert tokens.encoder is not None
    for after, before in ((tokens, fresh), (tokens.encoder, fresh.encoder)):
        for field in dataclasses.fields(after):
            value = getattr(after, field.name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(before, field.name)), f"{field.name} was changed in place"


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padding_is_never_kept_and_what_it_holds_does_not_matter(name, side):
    real = {
        "left": torch.arange(N) >= 20,
        "right": torch.arange(N) < 44,
        "scattered": torch.rand(N, generator=torch.Generator().manual_seed(1)) > 0.4,
    }[side]
    tokens = make_tokens(mask=real.expand(B, N))
    pruner = make_pruner(name, num_tokens=9)
    pruned = pruner(tokens)
    assert pruned.mask.all()
    assert real[pruned.indices].all()
    assert torch.equal(pruner(garbled(tokens)).indices, pruned.indices)
    assert (pruned.assignment[:, ~real] == -1).all()


def test_a_row_with_too_few_real_tokens_keeps_all_of_them_and_masks_the_rest(name):
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0] = torch.arange(N) >= N - 5  # 5 real tokens behind padding
    mask[2] = False
    k = 9
    tokens = garbled(make_tokens(mask=mask))
    pruned = make_pruner(name, num_tokens=k)(tokens)
    assert pruned.indices[0].tolist() == [*range(N - 5, N), -1, -1, -1, -1]
    assert pruned.mask[0].tolist() == [True] * 5 + [False] * 4
    assert torch.equal(pruned.features[0, :5], tokens.features[0, N - 5 :])
    assert not pruned.features[0, 5:].any()
    assert pruned.assignment[0, N - 5 :].tolist() == [*range(5)]
    assert (pruned.assignment[0, : N - 5] == -1).all()
    assert not pruned.mask[2].any()
    alone = make_pruner(name, num_tokens=k)(rows(tokens, torch.tensor([1])))
    assert torch.equal(alone.indices[0], pruned.indices[1])
    assert all(torch.isfinite(value.float()).all() for value in pruned.stats.values())


def test_padding_survives_a_budget_that_prunes_nothing(name):
    mask = torch.arange(N).expand(B, N) < 50
    pruned = make_pruner(name, num_tokens=N)(garbled(make_tokens(mask=mask)))
    assert torch.equal(pruned.mask, mask)
    assert (pruned.indices[~mask] == -1).all()
    assert not pruned.features[~mask].any()


def test_bfloat16_and_float32_keep_the_same_tokens(name, tokens):
    pruner = make_pruner(name, num_tokens=9)
    half = pruner(cast(tokens, torch.bfloat16))
    assert torch.equal(half.indices, pruner(tokens).indices)
    assert half.features.dtype == torch.bfloat16


def test_autocast_and_inference_mode_change_no_choice(name, tokens):
    pruner = make_pruner(name, num_tokens=9)
    expected = pruner(tokens).indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pruner(tokens).indices, expected)
    with torch.inference_mode():
        assert torch.equal(pruner(make_tokens()).indices, expected)


def test_gradients_reach_the_kept_tokens(name, tokens):
    features = tokens.features.clone().requires_grad_()
    pruned = make_pruner(name, num_tokens=9)(replace(tokens, features=features))
    pruned.features.sum().backward()
    assert features.grad is not None
    touched = features.grad.abs().sum(dim=-1).gather(1, pruned.indices)
    assert (touched > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_no_numbers_are_refused(name, bad, tokens):
    features = tokens.features.clone()
    features[1, 5, 2] = bad
    with pytest.raises(InvalidInputError, match="visual features hold NaN or inf"):
        make_pruner(name, num_tokens=9)(replace(tokens, features=features))


def read_by(name: str) -> list[Signal]:
    cls = get_pruner(name)
    return sorted(cls.requires | cls.optional)


def spoilt(tokens: VisualTokens, signal: Signal, value: float) -> VisualTokens:
    """The same tokens with one number of a signal replaced, that of token 5 (word 2) of the second image."""
    values = read_signal(tokens, signal)
    assert values is not None
    values = values.clone()
    values[1, 2 if signal is Signal.TEXT else 5] = value
    head, _, tail = signal.value.partition(".")
    if not tail:
        return replace(tokens, **{head: values})
    assert tokens.encoder is not None
    return replace(tokens, encoder=replace(tokens.encoder, **{tail: values}))


@pytest.mark.parametrize(
    ("bad", "says"), [(float("nan"), "NaN or inf"), (float("inf"), "NaN or inf"), (1e30, "numbers beyond 1e.15")]
)
def test_a_signal_that_is_no_number_or_too_large_is_refused_by_whom_it_is_read(name, bad, says, tokens):
    pruner = make_pruner(name, num_tokens=9)
    for signal in Signal:
        if signal in read_by(name):
            with pytest.raises(NonFiniteError, match=says):
                pruner(spoilt(tokens, signal, bad))
        else:
            assert torch.equal(pruner(spoilt(tokens, signal, bad)).indices, pruner(tokens).indices)
    with pytest.raises(NonFiniteError, match=f"visual features .*{says}"):
        pruner(replace(tokens, features=tokens.features.masked_fill(tokens.features > 3.9, bad)))


def test_padding_may_hold_anything(name):
    mask = torch.arange(N).expand(B, N) != 5
    tokens = make_tokens(mask=mask)
    pruner = make_pruner(name, num_tokens=9)
    expected = pruner(tokens)
    for signal in read_by(name):
        wild = spoilt(tokens, signal, float("nan"))
        if signal is Signal.TEXT:
            assert tokens.text_mask is not None
            readable = tokens.text_mask.clone()
            readable[1, 2] = False
            wild, tokens_without_it = (replace(each, text_mask=readable) for each in (wild, tokens))
            expected_here = pruner(tokens_without_it)
        else:
            expected_here = expected
        assert torch.equal(pruner(wild).indices, expected_here.indices)


def test_dtypes_may_differ_from_signal_to_signal(name, tokens):
    pruner = make_pruner(name, num_tokens=9)
    for dtype in (torch.float64, torch.bfloat16):
        mixed = replace(tokens, features=tokens.features.to(dtype))
        pruned = pruner(mixed)
        assert pruned.features.dtype == dtype
        assert torch.equal(pruned.indices, pruner(tokens).indices)


def test_a_batch_without_images_gives_none_back(name, tokens):
    pruned = make_pruner(name, num_tokens=9)(rows(tokens, torch.tensor([], dtype=torch.long)))
    assert pruned.features.shape == (0, 9, D)
    assert pruned.indices.shape == pruned.mask.shape == (0, 9)
    assert pruned.assignment.shape == (0, N)


@pytest.mark.parametrize("k", [N, 2 * N])
def test_a_budget_that_prunes_nothing_still_puts_padding_last(name, k):
    mask = torch.arange(N).expand(B, N) % 3 != 1
    tokens = garbled(make_tokens(mask=mask))
    pruned = make_pruner(name, num_tokens=k)(tokens)
    real = int(mask[0].sum())
    assert pruned.mask.tolist() == [[True] * real + [False] * (N - real)] * B
    assert pruned.indices.tolist() == [[*mask[0].nonzero().flatten().tolist(), *[-1] * (N - real)]] * B
    assert torch.equal(pruned.features[:, :real], tokens.features[:, mask[0]])
    assert (pruned.assignment[~mask] == -1).all()
    assert pruned.assignment[mask].view(B, real).tolist() == [[*range(real)]] * B


@pytest.mark.parametrize("budget", [{}, {"num_tokens": 0}, {"num_tokens": -1}, {"num_tokens": 1.5}, {"keep_ratio": 2}])
def test_a_senseless_budget_is_refused_at_construction(name, budget):
    with pytest.raises(InvalidInputError):
        make_pruner(name, **budget)


def test_a_missing_signal_is_refused_and_an_optional_one_can_be_missing(name, tokens):
    pruner = make_pruner(name, num_tokens=9)
    bare = VisualTokens.from_features(tokens.features)
    if pruner.requires:
        with pytest.raises(MissingSignalError, match=sorted(pruner.requires)[0].value):
            pruner(bare)
    else:
        assert pruner(bare).indices.shape == (B, 9)
    if Signal.TEXT not in pruner.requires:
        without = pruner(replace(tokens, text=None, text_mask=None))
        empty = pruner(replace(tokens, text_mask=torch.zeros_like(tokens.text_mask)))
        assert torch.equal(empty.indices, without.indices), "a question of no words is no question"


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


class Matrices(TorchDispatchMode):
    """The most matrices of n x n numbers in four bytes that were alive at once, not counting views."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.alive.append(weakref.ref(value))
        self.alive = [each for each in self.alive if each() is not None]
        storages = {value.untyped_storage() for each in self.alive if (value := each()) is not None}
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.most = max(self.most, sum(size // (4 * N * N) for size in sizes.values()))
        return result


def test_a_pruner_holds_no_more_matrices_than_it_says(name, tokens):
    with Matrices() as found:
        make_pruner(name, num_tokens=9)(rows(tokens, torch.tensor([0])))
    assert found.most <= get_pruner(name).matrices


def test_more_tokens_than_memory_can_compare_are_refused_with_what_it_would_take(name, tokens, monkeypatch):
    monkeypatch.setattr(base, "free_memory", lambda device: 2**10)
    monkeypatch.setattr(base, "_WORTH_ASKING", 1)
    pruner = make_pruner(name, num_tokens=9)
    if pruner.matrices:
        with pytest.raises(
            InvalidInputError, match=r"all 64 visual tokens .* takes about \d+.* KiB .* 1.0 KiB are free"
        ):
            pruner(tokens)
    else:
        pruner(tokens)


def test_nothing_larger_than_one_similarity_matrix_is_built(name, tokens):
    with LargestTensor() as largest:
        make_pruner(name, num_tokens=9)(tokens)
    assert B * 9 <= largest.numel <= B * N * N


def test_the_choice_never_waits_for_the_device(name, tokens):
    # On the meta device a tensor has no values: whatever would read one back to the host raises.
    def to_meta(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    assert tokens.encoder is not None
    encoder = each(tokens.encoder, to_meta)
    on_meta = VisualTokens(**{**{key: to_meta(value) for key, value in vars(tokens).items()}, "encoder": encoder})
    assert make_pruner(name, num_tokens=9).prune(on_meta, 9).kept.shape == (B, 9)


def test_earlier_stages_are_followed_back_to_the_original_tokens(name, tokens):
    survivors = torch.arange(0, N, 2)  # an encoder stage kept every other token and folded the next one into it
    assert tokens.encoder is not None
    encoder = each(tokens.encoder, lambda value: value[:, survivors])
    reduced = replace(
        tokens,
        features=tokens.features[:, survivors],
        mask=tokens.mask[:, survivors],
        positions=tokens.positions[:, survivors],
        indices=survivors.expand(B, -1),
        assignment=(torch.arange(N) // 2).expand(B, N),
        encoder=encoder,
        clip_similarity=None if tokens.clip_similarity is None else tokens.clip_similarity[:, survivors],
    )
    pruned = make_pruner(name, keep_ratio=0.125)(reduced)
    assert pruned.indices.shape == (B, 8), "a share is of the original tokens"
    assert (pruned.indices % 2 == 0).all()
    expected = [[*range(8)]] * B
    assert pruned.assignment.gather(1, pruned.indices).tolist() == expected
    assert pruned.assignment.gather(1, pruned.indices + 1).tolist() == expected
    before = tokens.features.gather(1, pruned.indices.unsqueeze(-1).expand(-1, -1, D))
    absorbed = (pruned.assignment.unsqueeze(2) == torch.arange(8)).sum(dim=1) > 2  # more than the pair of its stage
    merges = make_pruner(name, keep_ratio=0.125).prune(reduced, 8).features is not None
    unchanged = ~absorbed if merges else torch.ones_like(absorbed)
    assert torch.equal(pruned.features[unchanged], before[unchanged])


def test_a_pruner_is_a_value(name):
    pruner = make_pruner(name, num_tokens=9)
    assert isinstance(pruner, Pruner)
    assert pruner == make_pruner(name, num_tokens=9) != make_pruner(name, num_tokens=8)
    assert hash(pruner) == hash(make_pruner(name, num_tokens=9))
    assert repr(pruner) == f"{type(pruner).__name__}(num_tokens=9)", "what is default is not printed"
    with pytest.raises(dataclasses.FrozenInstanceError):
        pruner.num_tokens = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_encoder_stages_keep_exactly_what_they_say(name, tokens):
    pruner = make_pruner(name, num_tokens=9)
    assert tokens.encoder is not None
    state = tokens.encoder
    last = -1
    for stage in pruner.encoder_stages(N, 12):
        assert last < stage.layer <= 10
        n = state.features.shape[1]
        with LargestTensor() as largest:
            done = stage.reduce(state)
        assert largest.numel <= B * n * max(n, D)
        m = done.features.shape[1]
        real = torch.ones(B, m, dtype=torch.bool) if done.mask is None else done.mask
        if stage.num_tokens is None:
            assert real.sum(dim=1).min() >= 9
            assert real.sum(dim=1).max() == m <= n
        else:
            assert 9 <= stage.num_tokens == m < n
            assert done.mask is None
        assert done.features.shape == (B, m, D)
        assert done.features.dtype == state.features.dtype
        assert (done.kept.diff(dim=1) > 0).all()
        slots = torch.arange(m).expand(B, m)
        assert torch.equal(done.assignment.gather(1, done.kept), slots.masked_fill(~real, -1))
        for i in range(B):
            alone = stage.reduce(each(state, lambda value, i=i: value[i : i + 1]))
            mine = torch.ones_like(alone.kept[0], dtype=torch.bool) if alone.mask is None else alone.mask[0]
            assert torch.equal(alone.kept[0][mine], done.kept[i][real[i]])
            torch.testing.assert_close(alone.features[0][mine], done.features[i][real[i]])
        half = stage.reduce(replace(state, features=state.features.bfloat16()))
        assert torch.equal(half.kept, done.kept)
        last = stage.layer
        survivors = done.kept
        state = each(state, lambda value, kept=survivors: torch.stack([value[i, kept[i]] for i in range(B)]))
        state = replace(state, features=done.features, mask=done.mask, state=done.state)
        if done.mask is not None:  # an adapter gives padding no attention
            assert state.cls_attention is not None
            assert state.cls_value_affinity is not None
            attention, affinity = (row * real for row in (state.cls_attention, state.cls_value_affinity))
            state = replace(state, cls_attention=attention, cls_value_affinity=affinity)
    if last >= 0:
        assert state.features.shape[1] <= N // 2


def test_what_a_stage_hands_on_is_all_that_it_remembers(name, tokens):
    assert tokens.encoder is not None
    for stage in make_pruner(name, num_tokens=9).encoder_stages(N, 12)[:1]:
        first, again = stage.reduce(tokens.encoder), stage.reduce(tokens.encoder)
        assert torch.equal(first.kept, again.kept)
        assert torch.equal(first.features, again.features)


def cut(tokens: VisualTokens, columns: slice) -> VisualTokens:
    """Some tokens of every image."""
    assert tokens.encoder is not None
    of_image = ("text", "text_mask")
    taken = {
        key: value[:, columns] if isinstance(value, torch.Tensor) and key not in of_image else value
        for key, value in vars(tokens).items()
    }
    slots = torch.arange(N) - columns.start
    slots = slots.masked_fill((slots < 0) | (slots >= columns.stop - columns.start), -1).expand(B, N)
    encoder = each(tokens.encoder, lambda value: value[:, columns])
    return replace(tokens, **taken | {"encoder": encoder, "assignment": slots})


def test_a_budget_per_tile_is_that_of_each_tile_by_itself(name: str, tokens: VisualTokens) -> None:
    lengths = (14, 30, 20)
    tiles = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(B, N)
    joined = replace(tokens, tiles=tiles, tile_lengths=(lengths,) * B)
    pruned = make_pruner(name, num_tokens=5, scope="tile")(joined)
    assert pruned.indices.shape == (B, 15)
    assert pruned.mask.all()
    starts = [0, 14, 44]
    alone = []
    for start, length in zip(starts, lengths, strict=True):
        part = replace(cut(tokens, slice(start, start + length)), tile_lengths=((length,),) * B)
        alone.append(make_pruner(name, num_tokens=5)(part).indices)
    assert torch.equal(pruned.indices, torch.cat(alone, dim=1))
    assert torch.equal(pruned.assignment.gather(1, pruned.indices), torch.arange(15).expand(B, 15))
    absorbed = pruned.assignment.clamp(min=0) // 5
    assert torch.equal(absorbed.masked_fill(pruned.assignment < 0, -1), tiles.masked_fill(pruned.assignment < 0, -1))


def test_tiles_that_show_nothing_but_padding_are_passed_over(name: str, tokens: VisualTokens) -> None:
    lengths = (14, 0, 50, 0)
    tiles = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(B, N)
    empty = replace(tokens, tiles=tiles, tile_lengths=(lengths,) * B)
    full = replace(tokens, tiles=(tiles > 0).long(), tile_lengths=((14, 50),) * B)
    for budget in ({"num_tokens": 5}, {"keep_ratio": 0.1}):
        pruner = make_pruner(name, **budget, scope="tile")
        some, all_ = pruner(empty), pruner(full)
        assert torch.equal(some.indices[some.mask], all_.indices[all_.mask])
        assert torch.equal(some.features[some.mask], all_.features[all_.mask])
        assert torch.equal(some.assignment, all_.assignment)


def test_images_with_budgets_of_their_own_are_what_they_are_alone(name: str) -> None:
    counts = (N, 40, 24)
    mask = torch.arange(N) < torch.tensor(counts).unsqueeze(1)
    tokens = replace(make_tokens(mask=mask), tile_lengths=tuple((count,) for count in counts))
    pruner = make_pruner(name, keep_ratio=0.25)
    together = pruner(tokens)
    assert together.mask.sum(dim=1).tolist() == [16, 10, 6]
    for row, count in enumerate(counts):
        single = replace(rows(tokens, torch.tensor([row])), tile_lengths=((count,),))
        alone = pruner(single)
        kept = together.mask[row]
        assert torch.equal(together.indices[row][kept], alone.indices[0])
        assert torch.equal(together.assignment[row], alone.assignment[0])
        torch.testing.assert_close(together.features[row][kept], alone.features[0])
