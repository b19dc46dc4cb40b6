"""What is special about each published rival, and the building blocks that only they use, worked out by hand."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

from dcp_prune import InvalidInputError, MissingSignalError, VisualTokens, make_pruner
from dcp_prune.functional import clustering
from dcp_prune.functional.clustering import max_coverage, principal_groups
from dcp_prune.functional.selection import greedy_determinant, ordered_quota, suppress
from dcp_prune.pruners.holov import HoloVPruner
from dcp_prune.pruners.mmtok import MMTokPruner
from dcp_prune.pruners.visionzip import VisionZipPruner, even_sample

RIVALS = ("visionzip holov flowcut prunesid scope mmtok divprune cdpruner vispruner otprune").split()
PAGES = Path(__file__).parents[2] / "docs" / "methods"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def greedy_picks(features: torch.Tensor, k: int) -> list[int]:
    """Of the kernel of inner products, `n d`."""
    kernel = features @ features.mT
    return greedy_determinant(kernel.diagonal().unsqueeze(0), lambda pick: kernel[pick[:, 0]], k)[0].tolist()


def test_each_pick_of_the_greedy_determinant_is_the_best_next_one():
    features = draw(9, 6)
    kernel = features @ features.mT
    picks = greedy_picks(features, 5)
    for step in range(5):
        others = sorted(set(range(9)) - set(picks[:step]))
        gains = [torch.det(kernel[[*picks[:step], other]][:, [*picks[:step], other]]).item() for other in others]
        assert picks[step] == others[gains.index(max(gains))]


def test_the_greedy_determinant_goes_on_in_raster_order_where_nothing_is_left_to_gain():
    features = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [1.0, 0.0]])
    assert greedy_picks(features, 5) == [2, 1, 0, 3, 4]


def test_suppression_equals_its_definition():
    scores = torch.rand(3, 20, generator=torch.Generator().manual_seed(1))
    conflicts = draw(3, 20, 20) > 1.2
    conflicts = conflicts | conflicts.mT
    mask = torch.arange(20).expand(3, 20) < 17
    alive = suppress(scores, conflicts, mask)
    for row in range(3):
        survivors: list[int] = []
        for token in scores[row].argsort(descending=True).tolist():
            if mask[row, token] and not any(conflicts[row, token, other] for other in survivors):
                survivors.append(token)
        assert alive[row].nonzero().flatten().tolist() == sorted(survivors)
    assert 3 < alive.sum() < mask.sum()


def test_a_quota_keeps_the_best_of_each_group():
    place, kept = ordered_quota(
        torch.tensor([[1.0, 5.0, 2.0, 9.0, 4.0]]),
        torch.tensor([[0, 1, 0, 1, 1]]),
        torch.tensor([[1, 2]]),
        torch.tensor([[True, True, True, False, True]]),
    )
    assert place.tolist() == [[1, 2, 0, 4, 3]]
    assert kept.tolist() == [[False, True, True, False, True]]


def test_coverage_of_two_sets_equals_coverage_of_their_union():
    words, tokens = torch.rand(1, 3, 8, generator=torch.Generator().manual_seed(2)), draw(1, 8, 8)
    together = max_coverage([torch.cat((words, tokens), dim=1)], [torch.ones(1, 11)], 4)
    assert torch.equal(max_coverage([words, tokens], [torch.ones(1, 3), torch.ones(1, 8)], 4), together)


@pytest.mark.parametrize("channels", [5, 40])
def test_principal_groups_are_those_of_the_singular_vectors(channels):
    features = draw(2, 12, channels)
    centred = (features - features.mean(dim=2, keepdim=True)).mT
    expected = torch.linalg.svd(centred).Vh[:, :3].abs().argmax(dim=1)
    assert torch.equal(principal_groups(features, 3), expected)


@pytest.mark.parametrize(("signal", "settles"), [(1.0, True), (10.0, True), (0.0, False)])
def test_principal_groups_of_many_tokens_are_exact_whether_a_few_lanczos_steps_settle_or_not(
    signal, settles, monkeypatch
):
    strengths = torch.tensor([8.0, 7.0, 6.0, 5.0]) * signal
    features = draw(2, 160, 200) + draw(2, 160, 4, seed=1) * strengths @ draw(2, 4, 200, seed=2)
    errors: list[float] = []

    def spy(matrix, count, krylov=clustering._krylov_axes):
        found = krylov(matrix, count)
        errors.append(float(found[2]))
        return found

    monkeypatch.setattr(clustering, "_krylov_axes", spy)
    groups = principal_groups(features, 4)
    assert [error < clustering._KRYLOV_ERROR for error in errors] == [settles]
    centred = (features - features.mean(dim=2, keepdim=True)).double().mT
    assert torch.equal(groups, torch.linalg.svd(centred).Vh[:, :4].abs().argmax(dim=1))


@pytest.mark.parametrize(
    ("k", "contextual"), [(1, 0), (4, 1), (8, 2), (16, 4), (32, 6), (64, 10), (128, 20), (192, 30)]
)
def test_visionzip_splits_the_budget_as_published(k, contextual):
    assert VisionZipPruner(num_tokens=k).num_contextual(k) == contextual
    if k > 1:
        assert VisionZipPruner(num_tokens=k - 1, cls_in_budget=True).num_contextual(k - 1) == contextual


@pytest.mark.parametrize(
    ("merge", "features"), [("add", [6.5, 3.0, 6.0]), ("mean", [4.0, 3.0, 3.0]), ("none", [1.0, 3.0, 4.0])]
)
def test_visionzip_folds_each_token_into_the_contextual_one_with_the_most_similar_key(merge, features):
    tokens = VisualTokens.from_features(
        torch.arange(1.0, 7.0).view(1, 6, 1),
        cls_attention=torch.tensor([[0.1, 0.2, 0.9, 0.1, 0.1, 0.1]]),
        keys=torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.1], [0.9, 0.2]]]),
    )
    # Token 2 is dominant; of the others 0 1 3 4 5 every second one is contextual: 0, which 4 and 5 join, and 3, with 1.
    pruned = VisionZipPruner(num_tokens=3, contextual=2, merge=merge)(tokens)
    assert pruned.indices.tolist() == [[0, 2, 3]]
    assert pruned.features.flatten().tolist() == features
    assert pruned.assignment.tolist() == [[0, 2, 1, 2, 0, 0]]


def test_an_even_sample_starts_at_the_first_candidate():
    candidates = torch.tensor([[False, True, True, True, True, True, True, True]])
    assert even_sample(candidates, 3).tolist() == [[1, 3, 5]]


def test_holov_gives_what_a_short_strip_cannot_use_to_the_most_attended_tokens_elsewhere():
    attention = torch.tensor([[0.9, 0.8, 0.0, 0.01, 0.02, 0.03]])
    tokens = VisualTokens.from_features(draw(1, 6, 4), cls_attention=attention)
    assert HoloVPruner(num_tokens=4, strips=3).select(tokens, 4).tolist() == [[0, 1, 5, 4]]


def test_mmtok_follows_the_question_and_without_words_the_image():
    features = torch.eye(4)[[0, 1, 1, 1, 2, 3]].unsqueeze(0)
    tokens = VisualTokens.from_features(features, encoder_features=features, text=torch.eye(4)[None, 2:3])
    pruner = MMTokPruner(num_tokens=1)
    assert pruner(tokens).indices.tolist() == [[4]]
    wordless = VisualTokens(**{**vars(tokens), "text_mask": torch.zeros(1, 1, dtype=torch.bool)})
    assert pruner(wordless).features.flatten().tolist() == [0.0, 1.0, 0.0, 0.0], "one of the three that look alike"


def test_mmtok_never_picks_what_is_no_candidate():
    features = draw(1, 12, 5)
    tokens = VisualTokens.from_features(features, encoder_features=features, text=draw(1, 3, 5))
    candidates = torch.arange(12).expand(1, 12) % 2 == 0
    assert (MMTokPruner(num_tokens=6).select_among(tokens, 6, candidates) % 2 == 0).all()


def test_cdpruner_says_which_signal_it_lacks():
    tokens = VisualTokens.from_features(draw(1, 9, 4), text=draw(1, 2, 4))
    with pytest.raises(MissingSignalError, match="CDPruner needs clip_similarity, which these tokens do not carry"):
        make_pruner("cdpruner", num_tokens=4)(tokens)


def test_cdpruner_favours_the_tokens_that_clip_finds_least_similar():
    similarity = torch.tensor([[0.3, 0.1, 0.2, 0.3]])
    tokens = VisualTokens.from_features(torch.eye(4)[None], clip_similarity=similarity)
    assert make_pruner("cdpruner", num_tokens=2)(tokens).indices.tolist() == [[1, 2]]


@pytest.mark.parametrize(("k", "share"), [*itertools.product([1, 2, 3, 8, 11, 30], [0.0, 0.5, 0.75, 1.0])])
def test_vispruner_works_at_every_budget_and_share(k, share):
    tokens = VisualTokens.from_features(
        draw(2, 31, 8), encoder_features=draw(2, 31, 8), cls_attention=draw(2, 31, seed=1).softmax(dim=1)
    )
    kept = make_pruner("vispruner", num_tokens=k, important_share=share)(tokens).indices
    assert kept.shape == (2, k)
    assert (kept.diff(dim=1) > 0).all()


def test_vispruner_drops_duplicates_first():
    features = torch.eye(5)[[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]].unsqueeze(0)
    attention = torch.arange(10, 0, -1).unsqueeze(0) / 100.0
    tokens = VisualTokens.from_features(features, encoder_features=features, cls_attention=attention)
    pruned = make_pruner("vispruner", num_tokens=5, important_share=0.0)(tokens)
    assert pruned.features[0].argmax(dim=1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("scope", {"alpha": -1.0}),
        ("scope", {"alpha": float("nan")}),
        ("mmtok", {"alpha": -0.1}),
        ("mmtok", {"text_temperature": 0.0}),
        ("visionzip", {"contextual": -1}),
        ("visionzip", {"merge": "sum"}),
        ("holov", {"strips": 0}),
        ("vispruner", {"important_share": 1.5}),
        ("vispruner", {"per_round": 0}),
        ("otprune", {"gamma": 0.0}),
        ("cdpruner", {"relevance_extent": "crop"}),
    ],
)
def test_a_senseless_option_is_refused_by_name(name, option):
    with pytest.raises(InvalidInputError, match=next(iter(option)).removeprefix("text_")):
        make_pruner(name, num_tokens=4, **option)


@pytest.mark.parametrize("name", RIVALS)
def test_the_page_of_a_rival_says_all_that_a_reader_needs(name):
    page = (PAGES / f"{name}.md").read_text()
    said = re.findall(r"\*\*(Idea|Formula|Defaults|Cost|Strong|Weak|Released code)\b", page)
    assert said == ["Idea", "Formula", "Defaults", "Cost", "Strong", "Weak", "Released code"]
    assert re.search(r"Paper: \[arXiv \d{4}\.\d{5}\]\(https://arxiv\.org/abs/", page)
    assert re.search(r"Code:\s\[[\w/-]+\]\(https://github\.com/", page)
    defaults = page.partition("**Defaults.**")[2].partition("**Cost.**")[0]
    assert {"64", "32", "16"} <= set(re.findall(r"\d+", defaults))


def test_the_table_of_releases_names_every_rival_and_every_option_that_reproduces_one():
    table = (PAGES / "README.md").read_text()
    for name in RIVALS:
        title = (PAGES / f"{name}.md").read_text().split()[1]
        assert f"\n| {title} |" in table
    for name, option in [
        ("visionzip", "cls_in_budget"),
        ("prunesid", "cls_in_budget"),
        ("flowcut", "batch_drop"),
        ("cdpruner", "relevance_extent"),
    ]:
        assert option in table
        assert hasattr(make_pruner(name, num_tokens=4), option)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", ["prunesid", "vispruner"])
def test_budgets_at_which_the_released_code_crashes_are_met_exactly(name, k):
    tokens = VisualTokens.from_features(
        draw(2, 31, 8), encoder_features=draw(2, 31, 8), cls_attention=draw(2, 31, seed=1).softmax(dim=1)
    )
    kept = make_pruner(name, num_tokens=k)(tokens).indices
    assert kept.shape == (2, k)
    assert (kept.diff(dim=1) > 0).all()
