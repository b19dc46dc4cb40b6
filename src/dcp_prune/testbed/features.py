"""What the frozen vision encoder makes of the training pictures, kept on disk: `python -m dcp_prune.testbed.features`.

The encoder takes nine tenths of the arithmetic and never changes, so each picture goes through it once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from dcp_prune.errors import InvalidInputError
from dcp_prune.testbed.natural import GRID, LEVELS, NaturalScene, make_scene

SHARD = 50
"""Pictures per file, 22 MB in float16."""
COUNT = 6000
"""Pictures that the recipe looks at."""
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
"""Of ImageNet, as DINOv2 was trained."""
FEATURE_SCALE = 0.37
"""Mean magnitude of what leaves the encoder."""


def training_scene(number: int) -> NaturalScene:
    """Training picture `number`, whose seed it is; the difficulties take turns."""
    difficulties: Any = list(LEVELS)
    return make_scene(number, difficulties[number % len(LEVELS)])


def pixels_of(images: NDArray[np.uint8]) -> Float[Tensor, "b c y x"]:
    """Pictures as the vision encoder wants them. `b y x c` -> `b c y x`."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_STD)[:, None, None]


@torch.inference_mode()
def encode(tower: Any, images: NDArray[np.uint8]) -> Float[Tensor, "b n v"]:
    """Features of the patches that leave the last layer, before the final norm, as a LLaVA reads them. `b n v`."""
    return tower(pixels_of(images), output_hidden_states=True).hidden_states[-1][:, 1:]


def shard_file(directory: Path, shard: int) -> Path:
    return directory / f"{shard:04d}.npy"


def encode_all(tower_folder: Path, directory: Path, count: int = COUNT, bfloat16: bool = False) -> None:
    """Writes the features of training pictures 0 to count, a file each `SHARD`; what is there already is kept.

    With `bfloat16`, matrices are multiplied in it: twice as fast on processors with such instructions, .6 % off.

    Raises:
        InvalidInputError: there is no tower in that folder.
    """
    from transformers import Dinov2Model

    if not (tower_folder / "config.json").exists():
        raise InvalidInputError(
            f"there is no vision encoder in {tower_folder}; make it by: python -m dcp_prune.testbed.pretrained"
        )
    tower = Dinov2Model.from_pretrained(tower_folder, dtype=torch.float32).eval()
    directory.mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in range(-(-count // SHARD)) if not shard_file(directory, shard).exists()]
    began = time.monotonic()
    for done, shard in enumerate(missing, start=1):
        rows = []
        for start in range(shard * SHARD, (shard + 1) * SHARD, 5):
            images = np.stack([training_scene(number).image for number in range(start, start + 5)])
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                rows.append(encode(tower, images).half().numpy())
        file = shard_file(directory, shard)
        with file.with_suffix(".tmp").open("wb") as out:
            np.save(out, np.concatenate(rows))
        file.with_suffix(".tmp").replace(file)
        left = (time.monotonic() - began) / done * (len(missing) - done)
        print(f"features {SHARD * (shard + 1)}/{count}  {left / 60:.1f} min left", flush=True)


class Features:
    """Encoded training pictures, by number.

    Raises:
        InvalidInputError: a picture that is not encoded yet.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[int, NDArray[np.float16]] = {}

    def __call__(self, numbers: list[int]) -> Float[Tensor, "b n v"]:
        """Their features, divided by the mean magnitude. `b n v`."""
        rows = []
        for number in numbers:
            shard, row = divmod(number, SHARD)
            if shard not in self._open:
                file = shard_file(self.directory, shard)
                if not file.exists():
                    raise InvalidInputError(
                        f"picture {number} is not encoded in {self.directory}; run python -m dcp_prune.testbed.features"
                    )
                self._open[shard] = np.load(file, mmap_mode="r")
            rows.append(self._open[shard][row])
        features = torch.from_numpy(np.stack(rows)).float() / FEATURE_SCALE
        assert features.shape[1] == GRID * GRID
        return features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", type=Path, default=Path("runs/tower"), help="folder of the vision encoder")
    parser.add_argument("--directory", type=Path, default=Path("runs/natural/features"))
    parser.add_argument("--count", type=int, default=COUNT, help="pictures")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--bfloat16", action="store_true", help="multiply matrices in bfloat16 (avx512_bf16, AMX)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    encode_all(args.tower, args.directory, args.count, args.bfloat16)


if __name__ == "__main__":
    main()
