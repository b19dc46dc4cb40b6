"""The blocks of a sweep as tasks of a Ray cluster; the records are written here, by the process that asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dcp_prune.errors import DcpPruneError
from dcp_prune.eval.methods import Method
from dcp_prune.eval.sweep import Block, Part, Piece, Session, Source, answer_block

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ModuleNotFoundError as missing:
    raise DcpPruneError("--ray needs ray, which is not installed; run: pip install 'dcp-prune[ray]'") from missing

_sessions: dict[str, Session] = {}
"""Of a Ray worker process, which answers many blocks: what it was asked for last."""


def work_on_ray(
    source: Source, todo: Sequence[Piece], distances: tuple[str, ...], processes: int, threads: int
) -> Iterator[Part]:
    """The parts of all blocks, in the order in which they get ready.

    Connects to the cluster that `RAY_ADDRESS` names, or starts one on this machine, unless this process is connected
    already. Every machine needs this package, and a source's files at the same paths.

    Args:
        source: questions and model.
        todo: blocks with the methods that are missing.
        distances: to measure beside kappa.
        processes: tasks at once; 0: as many as the cluster has cores for.
        threads: of each task, which reserves as many cores.

    Raises:
        DcpPruneError: a task failed, or its machine was lost again and again.
    """
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, configure_logging=False)
    try:
        at_once = processes or max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        task = ray.remote(num_cpus=threads, max_retries=3)(_answer)
        shared = ray.put(source)
        waiting = iter(todo)
        running: dict[ray.ObjectRef, Piece] = {}
        while True:
            for block, methods in waiting:
                running[task.remote(shared, distances, threads, block, methods)] = (block, methods)
                if len(running) >= 2 * at_once:
                    break
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1)
            block, methods = running.pop(ready[0])
            yield block, methods, _result(ready[0])
    finally:
        if started:
            ray.shutdown()


def _result(reference: ray.ObjectRef) -> bytes:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, DcpPruneError):
            raise error.cause from None
        raise DcpPruneError(f"a Ray task failed: {error.cause}; finished parts are kept") from error
    except RayError as error:
        raise DcpPruneError(
            f"a Ray task was lost: {' '.join(str(error).split())[:200]}; finished parts are kept, so run the same "
            "command again"
        ) from None


def _answer(source: Source, distances: tuple[str, ...], threads: int, block: Block, methods: Sequence[Method]) -> bytes:
    torch.set_num_threads(threads)
    key = repr((source, distances))
    if key not in _sessions:
        _sessions.clear()
        _sessions[key] = source.open(distances)
    return answer_block(_sessions[key], block, methods)
