"""The loop with the engine and the learner on one CUDA device."""

import os
from pathlib import Path

import pytest
import torch

from dpo_ray.starter import Recipe, make_starter
from tests.integration.conftest import SMALL, check_run_folder, free_port, run_job

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_two_rounds_share_one_gpu(tmp_path: Path) -> None:
    starter = make_starter(0, lambda step, total, loss: None, recipe=Recipe(steps=150))
    run_dir = tmp_path / "run"
    run = [f"--run_dir={run_dir}", f"--model={starter}", f"--serving.port={free_port()}", "--rounds=2"]
    # NCCL does not put two ranks on one device.
    shares = ["--training.workers=1", "--training.gpus_per_worker=0.5", "--sampling.gpus_per_replica=0.5"]
    memory = ["--sampling.gpu_memory_utilization=0.3", "--sampling.dtype=float32"]
    arguments = [*run, *SMALL, *shares, *memory]
    run_job("jobs/iterative_dpo.py", arguments, tmp_path / "log", dict(os.environ))
    check_run_folder(run_dir, rounds=2)
