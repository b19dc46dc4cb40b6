"""Which of the two worlds a model of the testbed was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcp_prune.errors import InvalidInputError
from dcp_prune.testbed import natural, world
from dcp_prune.testbed.load import CHECKPOINTS, DEFAULT_CHECKPOINT, checkpoint_path


@dataclass(frozen=True)
class World:
    """A kind of picture with its questions.

    Attributes:
        name: for messages.
        make_scene: draws the scene of a seed, a difficulty and a grid.
        tasks: what is asked.
        difficulties: of its scenes.
        grid: patches per side that its models know.
        knows: what is in its pictures, for a sentence that begins with "it knows".
    """

    name: str
    make_scene: Callable[..., Any]
    tasks: tuple[str, ...]
    difficulties: tuple[str, ...]
    grid: int
    knows: str

    def check(self, difficulty: str) -> None:
        """Refuses a difficulty that this world does not have.

        Raises:
            InvalidInputError: it has no such difficulty.
        """
        if difficulty not in self.difficulties:
            raise InvalidInputError(
                f"the {self.name} world has no difficulty {difficulty!r}; it has {', '.join(self.difficulties)}"
            )


_FLAT = f"flat drawings of {len(world.CLASSES)} things ({', '.join(world.CLASSES[:4])}, ...) and a sign"
_SHADED = f"{len(natural.CLASSES)} painted things ({', '.join(natural.CLASSES[:4])}, ...) and a sign on a photograph"
FIRST = World("first", world.make_scene, world.TASKS, tuple(world.OBJECT_COUNTS), world.GRID, _FLAT)
NATURAL = World("natural", natural.make_scene, natural.TASKS, tuple(natural.LEVELS), natural.GRID, _SHADED)


def world_of(checkpoint: str = DEFAULT_CHECKPOINT) -> World:
    """The world that a shipped checkpoint, or a folder of a model trained on the testbed, knows.

    The natural world's models have a DINOv2 tower; all others are of the first world.
    """
    folder = checkpoint_path(checkpoint) if checkpoint in CHECKPOINTS else Path(checkpoint).expanduser()
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tower = config["vision_config"]["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return FIRST  # whoever loads the model says what is wrong with the folder
    return NATURAL if tower == "dinov2" else FIRST
