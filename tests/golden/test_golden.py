"""Every pruner keeps what its authors' own code keeps: one test per golden file, see README.md here.

Budgets of the authors that count [CLS] are one more than ours, which count patches. Their order is that of `select`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_inputs import Inputs, MiniEncoder, make_inputs, make_mini_encoder, make_words, sha256
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dcp_prune import VisualTokens
from dcp_prune.functional.similarity import cosine_similarity
from dcp_prune.integrations.shortening import encode
from dcp_prune.models.llava import LlavaAdapter
from dcp_prune.pruners.cdpruner import CDPruner
from dcp_prune.pruners.divprune import DivPrunePruner
from dcp_prune.pruners.flowcut import FlowCutPruner
from dcp_prune.pruners.holov import HoloVPruner
from dcp_prune.pruners.mmtok import MMTokPruner
from dcp_prune.pruners.otprune import OTPrunePruner
from dcp_prune.pruners.prunesid import PruneSIDPruner
from dcp_prune.pruners.scope import SCOPEPruner
from dcp_prune.pruners.visionzip import VisionZipPruner
from dcp_prune.pruners.vispruner import VisPruner

Golden = Mapping[str, Any]
NOT_COVERED = {
    "dart": "DART prunes inside the language model's layers, which is out of scope (docs/architecture.md)",
}


def tokens_of(inputs: Inputs, *, dtype: torch.dtype = torch.float32, flat: bool = False) -> VisualTokens:
    """The inputs as a pruner sees them; `flat` joins all crops to one row."""

    def tensor(values: np.ndarray) -> torch.Tensor:
        found = torch.from_numpy(values).to(dtype)
        return found.flatten(0, 1).unsqueeze(0) if flat else found

    embedded, text = (torch.from_numpy(each) for each in (inputs.image_embed, inputs.text_embed))
    return VisualTokens.from_features(
        tensor(inputs.proj),
        grid=(inputs.proj.shape[0] * inputs.proj.shape[1], 1) if flat else None,
        encoder_features=tensor(inputs.hidden[:, 1:]),
        keys=tensor(inputs.keys[:, 1:]),
        cls_attention=tensor(inputs.cls_attn[:, :, 0, 1:].astype(np.float64).mean(1).astype(np.float32)),
        clip_similarity=tensor(cosine_similarity(embedded, text.expand(len(embedded), -1, -1)).mean(2).numpy()),
    )


def settings(golden: Golden) -> Iterator[tuple[int, str, Golden]]:
    """Each budget of the file with the rest of its tag and its arrays."""
    tags = sorted({name.split("__")[0] for name in golden if "__" in name})
    assert tags
    for tag in tags:
        match = re.fullmatch(r"K(\d+)_?(.*)", tag)
        assert match, tag
        yield (
            int(match[1]),
            match[2],
            {name.removeprefix(f"{tag}__"): value for name, value in golden.items() if name.startswith(f"{tag}__")},
        )


def assert_same(ours: torch.Tensor, golden: Golden, tag: str) -> None:
    """The same tokens, and the same order of picking where the file tells one."""
    if "selected_order" in golden:
        np.testing.assert_array_equal(ours.numpy(), golden["selected_order"], err_msg=tag)
    np.testing.assert_array_equal(ours.sort(dim=1).values.numpy(), golden["selected_sorted"], err_msg=tag)


def check_scope(golden: Golden, inputs: Inputs) -> None:
    for k, tag, expected in settings(golden):
        assert_same(SCOPEPruner(num_tokens=k).select(tokens_of(inputs), k), expected, tag)


def check_divprune(golden: Golden, inputs: Inputs) -> None:
    for k, tag, expected in settings(golden):
        assert_same(DivPrunePruner(num_tokens=k).select(tokens_of(inputs, flat=True), k), expected, tag)


def check_otprune(golden: Golden, inputs: Inputs) -> None:
    for k, tag, expected in settings(golden):
        assert_same(OTPrunePruner(num_tokens=k).select(tokens_of(inputs, flat=True), k), expected, tag)
        # The released code hands tokens on in the order of a Python set; ours are in raster order.
        assert sorted(expected["emitted_order"][0]) == expected["selected_sorted"][0].tolist()


def check_cdpruner(golden: Golden, inputs: Inputs) -> None:
    for k, tag, expected in settings(golden):
        pruner = CDPruner(num_tokens=k, relevance_extent="batch")
        assert_same(pruner.select(tokens_of(inputs), k), expected, tag)


def check_mmtok(golden: Golden, inputs: Inputs) -> None:
    seed, shape = int(golden["seed"]), str(golden["shape_name"])
    words = make_words(seed, inputs, 4 if shape == "small" else 7)
    assert sha256(words) == str(golden["sha256_text"]), "the words differ from those behind the file"
    tokens = tokens_of(inputs)
    b, n = tokens.mask.shape
    padding = torch.zeros(n, dtype=torch.bool)
    padding[torch.from_numpy(golden["padding_indices"]).long()] = True
    text = torch.from_numpy(words).expand(b, -1, -1)
    for k, tag, expected in settings(golden):
        given = VisualTokens(**{**vars(tokens), "text": text})
        candidates = ~(padding & (tag == "pad")).expand(b, n)
        assert_same(MMTokPruner(num_tokens=k).select_among(given, k, candidates), expected, f"{k} {tag}")


def check_visionzip(golden: Golden, inputs: Inputs) -> None:
    tokens = tokens_of(inputs)
    assert tokens.encoder is not None
    # The authors merge before the projector; the same features on both sides make the same merge.
    tokens = VisualTokens(**{**vars(tokens), "features": tokens.encoder.features})
    for k, tag, expected in settings(golden):
        pruner = VisionZipPruner(num_tokens=k - 1, cls_in_budget=True)
        contextual = int(expected["contextual"])
        assert pruner.num_contextual(k - 1) == contextual, tag
        pruned = pruner(tokens)
        for row, dominant in enumerate(expected["selected_sorted"]):
            is_dominant = torch.isin(pruned.indices[row], torch.from_numpy(dominant).long())
            assert is_dominant.sum() == k - 1 - contextual, tag
            merged = pruned.features[row, ~is_dominant].numpy()
            np.testing.assert_allclose(merged, expected["merged"][row], rtol=0, atol=1e-4, err_msg=tag)


def check_holov(golden: Golden, inputs: Inputs) -> None:
    for k, tag, expected in settings(golden):
        strips = int(expected["num_patches"])
        ours = HoloVPruner(num_tokens=k, strips=strips).select(tokens_of(inputs, flat=True), k)
        # Where a strip is shorter than its share the released code appends zero tokens (-1); ours are real ones.
        real = (expected["selected_order"][0] >= 0).sum()
        np.testing.assert_array_equal(ours[0, :real], expected["selected_order"][0, :real], err_msg=tag)
        np.testing.assert_array_equal(ours[0, :real].sort().values, expected["selected_sorted"][0, k - real :])


def check_prunesid(golden: Golden, inputs: Inputs) -> None:
    for k, tag, expected in settings(golden):
        pruner = PruneSIDPruner(num_tokens=k - 1, cls_in_budget=True)
        tokens, exact = tokens_of(inputs), tokens_of(inputs, dtype=torch.float64)
        # The authors' components are randomised, so theirs are given ...
        groups = torch.from_numpy(expected["component"]).long()
        assert_same(pruner.select_in_groups(tokens, k - 1, groups), expected, f"{k} {tag}")
        if tag == "exactpca":  # ... and with exact ones, ours take their place.
            assert_same(pruner.select(exact, k - 1), expected, f"{k} {tag}, our components")


def check_vispruner(golden: Golden, inputs: Inputs) -> None:
    compared = 0
    for k, tag, expected in settings(golden):
        if "official_error" in expected:  # the released code raises there; ours must keep k tokens
            share = int(tag.removeprefix("r")) / 100
            kept = VisPruner(num_tokens=k, important_share=share)(tokens_of(inputs)).indices
            assert kept.shape[1] == k, tag
            assert (kept.diff(dim=1) > 0).all(), tag
            continue
        pruner = VisPruner(num_tokens=k, important_share=float(expected["important_ratio"]))
        assert_same(pruner.select(tokens_of(inputs, dtype=torch.float64), k), expected, tag)
        compared += 1
    assert compared


def check_flowcut(golden: Golden, inputs: None) -> None:
    arguments = {name: int(golden[f"arg_{name}"]) for name in ("layers", "d", "heads", "mlp", "n")}
    encoder = make_mini_encoder(
        int(golden["seed"]), arguments["layers"], arguments["d"], arguments["mlp"], arguments["n"]
    )
    assert sha256(encoder.tokens) == str(golden["sha256_x"]), "the tokens differ from those behind the file"
    adapter, pixels = llava_around(encoder, arguments["heads"])
    for k, tag, expected in settings(golden):
        pruner = FlowCutPruner(num_tokens=k)
        with torch.no_grad():
            encoded = encode(adapter, pixels, (pruner,))
            assert encoded.tokens.encoder is not None
            pruned = pruner(encoded.tokens)
        # The file counts what enters each layer and what leaves the last one, which is behind the feature layer.
        counts = [arguments["n"]]
        for stage, stats in zip(encoded.stages, encoded.stage_stats, strict=True):
            counts.append(int(stats["num_tokens"]) if "num_tokens" in stats else counts[stage.layer])
        assert [*counts, k, k] == expected["counts_per_hidden_state"].tolist(), tag
        assert_same(pruned.indices, expected, tag)
        features = encoded.tokens.encoder.features
        np.testing.assert_allclose(features.numpy(), expected["output_hidden"], rtol=0, atol=2e-3, err_msg=tag)


def llava_around(encoder: MiniEncoder, heads: int) -> tuple[LlavaAdapter, torch.Tensor]:
    """The adapter of a LLaVA whose vision tower has these layers, and pixels for which they get these tokens."""
    _, tokens, width = encoder.tokens.shape
    mlp, side = len(encoder.layers[0]["fc1_w"]), round((tokens - 1) ** 0.5)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=len(encoder.layers),
        num_attention_heads=heads,
        image_size=side,
        patch_size=1,
    )
    language = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=language, image_token_index=7)
    ).eval()
    names = {
        "ln1": "layer_norm1",
        "ln2": "layer_norm2",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
        **{short: f"self_attn.{full}_proj" for short, full in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))},
    }
    tower: Any = model.model.vision_tower
    for layer, arrays in zip(tower.encoder.layers, encoder.layers, strict=True):
        layer.load_state_dict(
            {
                f"{name}.{kind}": torch.from_numpy(arrays[f"{short}_{kind[0]}"])
                for short, name in names.items()
                for kind in ("weight", "bias")
            }
        )
    tower.pre_layrnorm.register_forward_hook(lambda *_: torch.from_numpy(encoder.tokens))
    return LlavaAdapter(model), torch.zeros(1, 3, side, side)


CHECKS: dict[str, Callable[[Golden, Inputs], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


def test_the_authors_code_and_ours_keep_the_same_tokens(golden_file: Path) -> None:
    with np.load(golden_file) as archive:
        golden = dict(archive)
    method, *_ = golden_file.stem.split("_")
    if method in NOT_COVERED:
        pytest.skip(NOT_COVERED[method])
    if method == "inputs":
        _, shape, seed = golden_file.stem.split("_")
        made = make_inputs(shape, int(seed.removeprefix("s")))
        for field in fields(made):
            np.testing.assert_allclose(getattr(made, field.name), golden[field.name], rtol=1e-6)
        return
    if method == "flowcut":
        check_flowcut(golden, None)
        return
    inputs = make_inputs(str(golden["shape_name"]), int(golden["seed"]))
    for name, value in golden.items():
        if name.startswith("sha256_") and name != "sha256_text":
            assert sha256(getattr(inputs, name.removeprefix("sha256_"))) == str(value), f"{name}: other inputs"
    CHECKS[method](golden, inputs)
