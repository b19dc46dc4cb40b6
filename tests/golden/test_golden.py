"""Every pruner keeps what its authors' own code keeps: one test per golden file, see README.md here.

Budgets of the authors that count [CLS] are one more than ours, which count patches. Their order is that of `select`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pytest
import torch
from golden_inputs import SHAPES, Inputs, MiniEncoder, make_inputs, make_mini_encoder, make_words, sha256
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dcp_prune import VisualTokens
from dcp_prune.functional.similarity import cosine_similarity
from dcp_prune.integrations.transformers.images import encode
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

DEFAULT = Path(__file__).parent / "dev"
Golden = Mapping[str, Any]


class Arrays(dict[str, Any]):
    """The arrays of a file, or those of one of its settings."""

    def __missing__(self, name: str) -> Any:
        pytest.fail(f"the file lacks the array {name!r}; it holds {', '.join(sorted(self)) or 'none'}", pytrace=False)


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
    for tag in tags_of(golden):
        match = re.fullmatch(r"K(\d+)_?(.*)", tag)
        if match is None:
            pytest.fail(f"the tag {tag!r} does not begin with a budget such as K16", pytrace=False)
        prefix = f"{tag}__"
        arrays = {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}
        yield int(match[1]), match[2], Arrays(arrays)


def tags_of(golden: Golden) -> list[str]:
    """The settings of a file; none of them fails."""
    tags = sorted({name.split("__")[0] for name in golden if "__" in name})
    if not tags:
        pytest.fail("the file holds no setting, which is an array named like K16__selected_sorted", pytrace=False)
    return tags


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
        picks = OTPrunePruner(num_tokens=k).select(tokens_of(inputs, flat=True), k)[0].tolist()
        assert list(set(picks)) == expected["emitted_order"][0].tolist(), tag


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
        contextual = int(expected["contextual"])
        pruner = VisionZipPruner(num_tokens=k - 1, cls_in_budget=True, contextual=contextual)
        assert VisionZipPruner(num_tokens=k - 1, cls_in_budget=True).num_contextual(k - 1) == contextual, tag
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


def check_flowcut(golden: Golden) -> None:
    arguments = {name: int(golden[f"arg_{name}"]) for name in ("layers", "d", "heads", "mlp", "n")}
    encoder = make_mini_encoder(
        int(golden["seed"]), arguments["layers"], arguments["d"], arguments["mlp"], arguments["n"]
    )
    assert sha256(encoder.tokens) == str(golden["sha256_x"]), "the tokens differ from those behind the file"
    adapter, pixels = llava_around(encoder, arguments["heads"])
    for k, tag, expected in settings(golden):
        pruner = FlowCutPruner(num_tokens=k)
        with torch.no_grad():
            encoded = encode(adapter, {"pixel_values": pixels}, (pruner,))
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
    "cdpruner": check_cdpruner,
    "divprune": check_divprune,
    "holov": check_holov,
    "mmtok": check_mmtok,
    "otprune": check_otprune,
    "prunesid": check_prunesid,
    "scope": check_scope,
    "visionzip": check_visionzip,
    "vispruner": check_vispruner,
}


def read(golden_file: Path) -> Arrays:
    try:
        with np.load(golden_file) as archive:
            return Arrays(archive)
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        pytest.fail(f"the file cannot be read as an npz archive: {error}", pytrace=False)


def compare(method: str, golden: Golden) -> None:
    """Fails where ours differ; skips what is out of scope."""
    if method in NOT_COVERED:
        pytest.skip(NOT_COVERED[method])
    if method == "flowcut":
        check_flowcut(golden)
        return
    if method not in CHECKS:
        pytest.fail(f"nothing is known of the method {method!r}; there are {', '.join(sorted(CHECKS))}", pytrace=False)
    shape = str(golden["shape_name"])
    if shape not in SHAPES:
        pytest.fail(f"nothing is known of the shape {shape!r}; there are {', '.join(SHAPES)}", pytrace=False)
    inputs = make_inputs(shape, int(golden["seed"]))
    for name, value in golden.items():
        if name.startswith("sha256_") and name != "sha256_text":
            assert sha256(getattr(inputs, name.removeprefix("sha256_"))) == str(value), f"{name}: other inputs"
    CHECKS[method](golden, inputs)


def compare_inputs(shape: str, seed: int, golden: Golden) -> None:
    made = make_inputs(shape, seed)
    for field in fields(made):
        np.testing.assert_allclose(getattr(made, field.name), golden[field.name], rtol=1e-6)


def test_the_authors_code_and_ours_keep_the_same_tokens(
    golden_file: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("golden", golden_file.stem)
    golden = read(golden_file)
    method, *rest = golden_file.stem.split("_")
    if method == "inputs":
        shape, seed = rest
        compare_inputs(shape, int(seed.removeprefix("s")), golden)
        record_property("compared", "the same inputs")
        return
    compare(method, golden)
    crashed = [tag for tag in tags_of(golden) if f"{tag}__official_error" in golden]
    compared = [tag for tag in tags_of(golden) if tag not in crashed]
    record_property(
        "compared",
        f"the same tokens at {', '.join(compared)}"
        + (f"; the released code crashes at {', '.join(crashed)}, ours keeps the budget" if crashed else ""),
    )


def small_scope() -> Arrays:
    return read(DEFAULT / "scope_small_s21.npz")


def test_a_file_of_other_tokens_fails() -> None:
    golden = small_scope()
    golden["K8__selected_sorted"] = golden["K8__selected_sorted"] + 1
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        compare("scope", golden)


@pytest.mark.parametrize(
    ("method", "changed", "cause"),
    [
        ("scope", {"seed": None}, "lacks the array 'seed'"),
        ("scope", {"K8__selected_sorted": None}, "lacks the array 'selected_sorted'"),
        ("scope", {"shape_name": np.str_("huge")}, "nothing is known of the shape 'huge'"),
        ("scope", {"X8__selected_sorted": np.zeros((1, 8))}, "'X8' does not begin with a budget"),
        ("fastv", {}, "nothing is known of the method 'fastv'"),
    ],
)
def test_a_file_that_is_not_of_the_layout_fails_with_its_cause(
    method: str, changed: dict[str, Any], cause: str
) -> None:
    golden = Arrays({name: value for name, value in (small_scope() | changed).items() if value is not None})
    with pytest.raises(pytest.fail.Exception, match=cause):
        compare(method, golden)


def test_a_file_without_settings_and_a_broken_file_fail_with_their_cause(tmp_path: Path) -> None:
    golden = Arrays({name: value for name, value in small_scope().items() if "__" not in name})
    with pytest.raises(pytest.fail.Exception, match="no setting"):
        compare("scope", golden)
    whole = (DEFAULT / "scope_small_s21.npz").read_bytes()
    for name, content in {"cut.npz": whole[: len(whole) // 2], "text.npz": b"no archive", "empty.npz": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(pytest.fail.Exception, match="cannot be read as an npz archive"):
            read(tmp_path / name)


def run_pytest(folder: Path) -> subprocess.CompletedProcess[str]:
    here = str(DEFAULT.parent)
    command = [
        sys.executable,
        "-m",
        "pytest",
        here,
        f"--confcutdir={here}",
        "--golden-dir",
        str(folder),
        "-k",
        "authors",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_folder_without_golden_files_is_refused(tmp_path: Path) -> None:
    done = run_pytest(tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"there is no golden file (*.npz) in or below {tmp_path}" in done.stderr


@pytest.mark.slow
def test_each_file_gets_a_line(tmp_path: Path) -> None:
    for name in ("vispruner_small_s21.npz", "dart_small_s21.npz"):
        (tmp_path / name).write_bytes((DEFAULT / name).read_bytes())
    (tmp_path / "mmtok_small_s22.npz").write_bytes(b"no archive")
    _, _, report = run_pytest(tmp_path).stdout.partition(f"golden files of {tmp_path}")
    dart, mmtok, vispruner = [line.split(maxsplit=2) for line in report.splitlines()[1:4]]
    assert dart[:2] == ["dart_small_s21", "skipped"]
    assert "out of scope" in dart[2]
    assert mmtok[:2] == ["mmtok_small_s22", "failed"]
    assert "cannot be read as an npz archive" in mmtok[2]
    assert vispruner[:2] == ["vispruner_small_s21", "passed"]
    assert vispruner[2].startswith(
        "the same tokens at K16_r50, K32_r50, K32_r75; the released code crashes at K16_r75,"
    )
