"""The Ray cluster that a job runs on: found or started, and large enough."""

import logging
import os
import socket
import time
from collections.abc import Sequence

import ray
from ray._private.services import find_bootstrap_address
from ray.autoscaler.sdk import request_resources

from dpo_ray.config import IterativeDPOConfig, TrainingConfig

NAMESPACE = "dpo_ray"
Bundle = dict[str, float]
"""CPUs and GPUs that one process reserves on one node, by Ray's names."""


def connect() -> None:
    """Attach to the running Ray cluster, or start one on this machine where there is none."""
    if ray.is_initialized():
        return
    # Ray Train looks at its workers this often, and each round would wait for the next look.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Nobody asks the process that would announce a node's end: what ends goes on at its last checkpoint.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(_address(), log_to_driver=False, logging_level=logging.ERROR, namespace=NAMESPACE)


def _address() -> str | None:
    """`local` where the cluster that Ray would look for ended with its machine: Ray waits for it in vain."""
    noted = find_bootstrap_address(None)
    if os.environ.get("RAY_ADDRESS") or noted is None or listens(noted):
        return None
    return "local"


def listens(address: str) -> bool:
    """Whether anybody does at a `host:port`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except OSError:
        return False
    return True


def wait_for_resources(bundles: Sequence[Bundle], *, timeout_s: float) -> None:
    """Return when the cluster has what the parts reserve; ValueError where it does not get it in time."""
    needed = {name: sum(bundle[name] for bundle in bundles) for name in ("CPU", "GPU")}
    deadline = time.monotonic() + timeout_s
    while True:
        present = ray.cluster_resources()
        missing = [name for name, amount in needed.items() if amount > present.get(name, 0.0)]
        if not missing:
            return
        if time.monotonic() > deadline:
            lacks = ", ".join(f"{name} {needed[name]:g} of {present.get(name, 0):g}" for name in missing)
            raise ValueError(
                f"the job reserves more than the Ray cluster has ({lacks}): add nodes, "
                "lower training.workers, sampling.replicas or the cpus_per_… and gpus_per_… settings, "
                "or raise cluster.wait_for_resources_s if the cluster is growing"
            )
        request_resources(bundles=[dict(bundle) for bundle in bundles])
        time.sleep(1.0)


def training_bundles(config: TrainingConfig) -> list[Bundle]:
    """What each training worker reserves."""
    return [{"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}] * config.workers


def all_bundles(config: IterativeDPOConfig) -> list[Bundle]:
    """What each sampler replica, training worker and judge reserves."""
    sampling, judge = config.sampling, config.judge
    replica: Bundle = {"CPU": sampling.cpus_per_replica, "GPU": sampling.gpus_per_replica}
    judges: list[Bundle] = [{"CPU": judge.cpus_per_actor, "GPU": judge.gpus_per_actor}] * judge.actors
    return [*training_bundles(config.training), *[replica] * sampling.replicas, *judges]
