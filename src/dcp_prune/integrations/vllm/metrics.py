"""What pruning did, in vLLM's own Prometheus endpoint (`/metrics`)."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor

from dcp_prune.integrations.stopwatch import Stopwatch

KAPPA_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
MILLISECOND_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)


@dataclass(frozen=True)
class _Batch:
    """What one batch of images did, perhaps not computed yet."""

    stats: Mapping[str, Tensor]
    watch: Stopwatch
    done: torch.cuda.Event | None


@dataclass
class Metrics:
    """Counters and histograms of one process, each under `dcp_prune:NAME`.

    The process that reads prompts counts tokens, so that answers from a cache count too; the one that runs the model
    observes the rest, and its numbers reach the endpoint where PROMETHEUS_MULTIPROC_DIR is set (see prometheus_client).
    A GPU is never waited for: what it has not computed yet is observed with a later batch.
    """

    counters: Mapping[str, Any]
    histograms: Mapping[str, Any]
    waiting: deque[_Batch] = field(default_factory=deque)

    @classmethod
    @lru_cache(maxsize=1)
    def of_process(cls) -> Self:
        """The metrics of this process; Prometheus knows each name only once."""
        from prometheus_client import Counter, Histogram

        counters = {
            "visual_tokens_before": "Visual tokens of the images in all prompts, before pruning.",
            "visual_tokens_after": "Visual tokens of the images in all prompts, after pruning.",
            "pruned_images": "Images for which tokens were chosen, those left out that vLLM had in its caches.",
            "reselected_images": "Those whose first choice lost too much, so that tokens were chosen again.",
            "nonfinite_images": "Images whose features hold NaN or inf, so that no tokens could be chosen.",
            "stage1_lookups": "Images that were looked for among the encoded ones.",
            "stage1_hits": "Those found, so that the vision encoder was spared.",
        }
        histograms = {
            "kappa": ("Distribution shift of the kept tokens of an image.", KAPPA_BUCKETS),
            "encode_milliseconds": ("Time of the vision encoder and the projector for a batch.", MILLISECOND_BUCKETS),
            "select_milliseconds": ("Time of choosing the tokens of a batch.", MILLISECOND_BUCKETS),
        }
        return cls(
            {name: Counter(f"dcp_prune:{name}", text) for name, text in counters.items()},
            {
                name: Histogram(f"dcp_prune:{name}", text, buckets=buckets)
                for name, (text, buckets) in histograms.items()
            },
        )

    def count(self, **amounts: int) -> None:
        """Adds to counters by name."""
        for name, amount in amounts.items():
            self.counters[name].inc(amount)

    def observe(self, stats: Mapping[str, Tensor], watch: Stopwatch) -> None:
        """Takes the statistics of a pruner for a batch of images, and its running times."""
        kept = {name: stats[name] for name in ("kappa", "reselected") if name in stats}
        done = None
        if any(value.is_cuda for value in kept.values()):
            done = torch.cuda.Event()
            done.record()
        self.waiting.append(_Batch(kept, watch, done))
        self.flush()

    def flush(self) -> None:
        """Observes what has been computed by now."""
        while self.waiting and (self.waiting[0].done is None or self.waiting[0].done.query()):
            batch = self.waiting.popleft()
            for value in batch.stats.get("kappa", torch.empty(0)).tolist():
                self.histograms["kappa"].observe(value)
            if "reselected" in batch.stats:
                self.count(reselected_images=int(batch.stats["reselected"].sum()))
            for name, spent in batch.watch.milliseconds().items():
                if f"{name}_milliseconds" in self.histograms:
                    self.histograms[f"{name}_milliseconds"].observe(spent)
