"""What a replica is started with."""

import pytest

from dpo_ray.config import SamplingConfig
from serve.deployment import engine_environment


@pytest.mark.parametrize(
    ("cpus", "workers", "threads"), [(1, 1, "1"), (0.5, 1, "1"), (2.9, 1, "2"), (8, 1, "8"), (8, 2, "4")]
)
def test_an_engine_computes_with_the_cpus_of_its_replica(cpus: float, workers: int, threads: str) -> None:
    sampling = SamplingConfig(cpus_per_replica=cpus, tensor_parallel_size=workers)
    assert engine_environment(sampling)["OMP_NUM_THREADS"] == threads


def test_the_threads_of_a_gpu_engine_are_left_to_vllm() -> None:
    sampling = SamplingConfig(cpus_per_replica=8, gpus_per_replica=1)
    assert "OMP_NUM_THREADS" not in engine_environment(sampling)
