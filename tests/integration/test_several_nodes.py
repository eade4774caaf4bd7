"""Several raylets: sampler and trainer ranks on different ones, and files only through the run's folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from dpo_ray.registry import PolicyRegistry
from dpo_ray.storage import Storage
from tests.integration.conftest import SMALL, check_run_folder, free_port, metric_rows, start_job, wait_for


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head and two workers with one logical CPU each: no two parts of a job fit on one of them."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "dashboard_port": free_port()})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_parts_of_a_job_spread_over_nodes(nodes: Cluster, starter: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [
        f"--run_dir={run_dir}",
        f"--model={starter}",
        "--rounds=2",
        f"--serving.port={free_port()}",
        *SMALL,
    ]
    reserve = [
        "--sampling.cpus_per_replica=0.8",
        "--training.workers=2",
        "--training.cpus_per_worker=0.8",
        "--judge.cpus_per_actor=0.1",
        "--sampling.transport=stream",
    ]
    environment = {**os.environ, "RAY_ADDRESS": nodes.address, "RAY_AUTH_MODE": "disabled"}
    job = start_job("jobs/iterative_dpo.py", [*command, *reserve], tmp_path / "log", environment)
    wait_for(lambda: metric_rows(run_dir, "start") or job.poll() is not None, what="the first evaluation")
    ray.init(nodes.address, log_to_driver=False)
    actors: list[Any] = list(
        list_actors(address=nodes.address, limit=1000, filters=[("state", "=", "ALIVE")])
    )
    homes = {
        title: [actor.node_id for actor in actors if actor.class_name.startswith(title)]
        for title in ("ServeReplica:", "RayTrainWorker")
    }
    assert job.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-6000:]
    assert len(homes["RayTrainWorker"]) == 2
    assert len(set(homes["RayTrainWorker"] + homes["ServeReplica:"])) == 3
    check_run_folder(run_dir, rounds=2)
    assert "was not sent" not in (tmp_path / "log").read_text()
    registry = PolicyRegistry(Storage(str(run_dir)))
    assert all(run_dir not in registry.fetch(version).parents for version in (1, 2))  # Nodes here share /tmp.
