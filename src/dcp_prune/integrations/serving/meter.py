"""What pruning did since the server started, for the log and for Prometheus."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field

from dcp_prune.integrations.transformers import PruneRecord

LOGGER = logging.getLogger("dcp_prune.integrations.serving")
"""One line for each call with images, at level INFO."""


@dataclass
class Meter:
    """Counts what pruning did to all calls with images since the server started.

    Attributes:
        calls: to `generate` that came with images; `images` of all of them.
        visual_tokens: before and after, of all images.
        prompt_tokens: before and after, of all prompts with images: what prefill processes.
    """

    calls: int = 0
    images: int = 0
    visual_tokens: tuple[int, int] = (0, 0)
    prompt_tokens: tuple[int, int] = (0, 0)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, record: PruneRecord) -> None:
        """Adds one call and logs it."""
        images = record.tokens_per_image
        visual = (sum(before for before, _ in images), sum(after for _, after in images))
        prompt = (record.prompt_before, record.prompt_after)
        with self._lock:
            self.calls += 1
            self.images += len(images)
            self.visual_tokens = (self.visual_tokens[0] + visual[0], self.visual_tokens[1] + visual[1])
            self.prompt_tokens = (self.prompt_tokens[0] + prompt[0], self.prompt_tokens[1] + prompt[1])
        LOGGER.info("%d image(s), %d -> %d visual tokens, prompt %d -> %d tokens", len(images), *visual, *prompt)

    def __deepcopy__(self, memo: object) -> Meter:
        """Calls of a copied model are counted with those of the original."""
        return self

    def exposition(self) -> str:
        """The counts in the text format of Prometheus."""
        with self._lock:
            counts = {
                "calls": ("Calls that came with images.", {"": self.calls}),
                "images": ("Images of these calls.", {"": self.images}),
                "visual_tokens": ("Visual tokens of these images, without and with pruning.", self.visual_tokens),
                "prompt_tokens": ("Prompt tokens of these calls, without and with pruning.", self.prompt_tokens),
            }
        lines: list[str] = []
        for name, (text, values) in counts.items():
            metric = f"dcp_prune_{name}_total"
            lines += [f"# HELP {metric} {text}", f"# TYPE {metric} counter"]
            if isinstance(values, tuple):
                values = dict(zip(('{pruning="before"}', '{pruning="after"}'), values, strict=True))
            lines += [f"{metric}{label} {value}" for label, value in values.items()]
        return "\n".join(lines) + "\n"
