"""Blocks of questions answered as tasks of a Ray cluster; whoever asked writes the records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dcp_prune.errors import DcpPruneError
from dcp_prune.eval.data.questions import Session
from dcp_prune.eval.workers import Job, Task

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ModuleNotFoundError as missing:
    raise DcpPruneError("--ray needs ray, which is not installed; run: pip install 'dcp-prune[ray]'") from missing

_sessions: dict[str, Session] = {}
"""Of a Ray worker process, which runs many tasks: what it was asked for last."""


def work_on_ray(job: Job, tasks: Sequence[Task], at_once: int) -> Iterator[tuple[Task, bytes]]:
    """Each task with its part, in the order in which they get ready.

    Connects to the cluster that `RAY_ADDRESS` names, or starts one on this machine, unless this process is connected
    already. Every machine needs this package, and the files of the questions at the same paths.

    Args:
        job: questions and model; every task reserves as many cores as it has threads.
        tasks: what is missing.
        at_once: tasks that run at a time; 0: as many as the cluster has cores for.

    Raises:
        DcpPruneError: a task failed, or its machine was lost again and again.
    """
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, configure_logging=False)
    try:
        at_once = at_once or max(1, int(ray.cluster_resources().get("CPU", 1)) // job.threads)
        run = ray.remote(num_cpus=job.threads, max_retries=3)(_run)
        shared = ray.put(job)
        waiting = iter(tasks)
        running: dict[ray.ObjectRef, Task] = {}
        while True:
            for task in waiting:
                running[run.remote(shared, task)] = task
                if len(running) >= 2 * at_once:
                    break
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1)
            yield running.pop(ready[0]), _part(ready[0])
    finally:
        if started:
            ray.shutdown()


def _part(reference: ray.ObjectRef) -> bytes:
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


def _run(job: Job, task: Task) -> bytes:
    key = repr(job)
    if key not in _sessions:
        _sessions.clear()
        _sessions[key] = job.open()
    return task.run(_sessions[key])
