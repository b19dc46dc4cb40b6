"""vLLM's worker for CPUs, which forgets to look whether a model prunes; that for GPUs does look."""
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class PruningCPUWorker(CPUWorker):
    """Asks for the positions of kept tokens where the engine says so."""

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        config = self.model_config.multimodal_config
        self.model_runner.is_multimodal_pruning_enabled = config.is_multimodal_pruning_enabled()
