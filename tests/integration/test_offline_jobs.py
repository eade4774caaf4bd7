"""An offline run of sharded workers, killed within its epochs."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import Head, metric_rows, run_job, start_job, wait_for

PAIRS = ("--pairs=film_reviews", "--max_length=64", "--held_out_pairs=64", "--training.cpus_per_worker=0.25")


def weights(run_dir: Path, version: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "policies" / f"v{version:05d}" / "model.safetensors")


@pytest.mark.slow
def test_driver_killed_within_an_epoch_ends_bitwise_where_it_would_have(
    head: Head, starter: Path, tmp_path: Path
) -> None:
    steps = ["--training.batch_size=8", "--training.checkpoint_every_steps=3", "--max_pairs=192"]
    more = ["--training.learning_rate=1e-4", "--training.schedule=cosine", "--training.parallelism=fsdp"]
    job = ["jobs/offline_dpo.py", f"--model={starter}", *PAIRS, *steps, *more, "--rounds=2"]
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    run_job(job[0], [f"--run_dir={whole}", *job[1:]], log, head.environment)
    first = start_job(job[0], [f"--run_dir={killed}", *job[1:]], log, head.environment)
    checkpoint = killed / "trainer/v00001.unfinished.pt"
    wait_for(lambda: checkpoint.exists() or first.poll() is not None, what="a checkpoint within the epoch")
    assert first.poll() is None, log.read_text()[-6000:]
    head.kill("ray::RayTrainWorker")  # A rank dies, and its successor begins at the checkpoint;
    wait_for(lambda: (killed / "policies/v00001").exists(), what="the first epoch's version")
    wait_for((killed / "trainer/v00002.unfinished.pt").exists, what="a checkpoint in the second epoch")
    first.send_signal(signal.SIGKILL)  # then the driver, with all workers.
    first.wait()
    assert not (killed / "policies/v00002").exists()
    run_job(job[0], [f"--run_dir={killed}", *job[1:]], log, head.environment)
    ours, theirs = weights(killed, 2), weights(whole, 2)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert metric_rows(killed, "step") == metric_rows(whole, "step")
