"""The same blocks as tasks of a local Ray cluster give the same records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from counting import METHODS, CountingQuestions

from dcp_prune.errors import DcpPruneError, InvalidInputError
from dcp_prune.eval.records import read_records
from dcp_prune.eval.sweep import sweep

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = pytest.mark.slow  # a cluster takes seconds to start


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    tests = str(Path(__file__).parent)
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": tests}})
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_tasks_of_a_cluster_leave_the_records_of_a_sweep_here(tmp_path: Path) -> None:
    sweep(CountingQuestions(), METHODS, tmp_path / "here")
    sweep(CountingQuestions(), METHODS, tmp_path / "ray", backend="ray", processes=0)
    order = ["method", "num_tokens", "question"]
    here, there = (read_records(tmp_path / name).frame.sort(order) for name in ("here", "ray"))
    assert here.equals(there)
    assert sweep(CountingQuestions(), METHODS, tmp_path / "ray", backend="ray", processes=2).new == 0


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("fails", "kind", "complaint"),
    [("error", DcpPruneError, "something odd"), ("refusal", InvalidInputError, "not like this")],
)
def test_an_error_in_a_task_is_told_and_finished_parts_stay(
    tmp_path: Path, fails: str, kind: type[Exception], complaint: str
) -> None:
    with pytest.raises(kind, match=complaint):
        sweep(CountingQuestions(fails=fails), METHODS, tmp_path, backend="ray", processes=1)
    sweep(CountingQuestions(), METHODS, tmp_path)
    assert len(read_records(tmp_path).frame) == 90
