"""Supervised fine-tuning, offline DPO and the sweep over beta, as a user runs them."""

import json
import math
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.integration.conftest import Head, metric_rows, run_job, start_job, wait_for

PAIRS = ("--pairs=film_reviews", "--max_length=64", "--held_out_pairs=64", "--training.cpus_per_worker=0.25")


def weights(run_dir: Path, version: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "policies" / f"v{version:05d}" / "model.safetensors")


def test_sft_then_dpo_of_an_adapter_on_sharded_weights(head: Head, starter: Path, tmp_path: Path) -> None:
    sft, dpo, log = tmp_path / "sft", tmp_path / "dpo", tmp_path / "log"
    texts = ["--texts=film_reviews", "--max_length=64", "--max_pairs=256", "--held_out_pairs=64"]
    rate = ["--training.cpus_per_worker=0.25", "--training.learning_rate=1e-3"]
    run_job("jobs/sft.py", [f"--run_dir={sft}", f"--model={starter}", *texts, *rate], log, head.environment)
    steps, epoch = metric_rows(sft, "step"), metric_rows(sft, "round")[0]
    assert epoch["eval/loss"] < steps[0]["loss"] - 0.02
    assert "rewards/accuracies" not in steps[0]

    model = f"--model={sft}/policies/v00001"
    adapter = ["--training.lora.rank=4", "--training.parallelism=fsdp", "--training.learning_rate=1e-2"]
    options = [*adapter, "--max_pairs=128", "--training.loss.beta=1"]
    run_job("jobs/offline_dpo.py", [f"--run_dir={dpo}", model, *PAIRS, *options], log, head.environment)
    first, epoch = metric_rows(dpo, "step")[0], metric_rows(dpo, "round")[0]
    assert first["loss"] == math.log(2) or abs(first["loss"] - math.log(2)) < 1e-6
    assert first["rewards/accuracies"] == 0.0
    assert epoch["eval/loss"] < math.log(2)
    assert (dpo / "policies/v00001/adapter/adapter_model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(dpo / "policies/v00001")  # A plain model, for any server.
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_driver_killed_within_an_epoch_ends_bitwise_where_it_would_have(
    head: Head, starter: Path, tmp_path: Path
) -> None:
    steps = ["--training.batch_size=4", "--training.checkpoint_every_steps=3", "--max_pairs=256"]
    more = ["--training.learning_rate=1e-4", "--training.schedule=cosine", "--rounds=2"]
    job = ["jobs/offline_dpo.py", f"--model={starter}", *PAIRS, *steps, *more]
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


def test_sweep_over_beta(head: Head, starter: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "sweep", tmp_path / "log"
    size = ["--max_pairs=256", "--max_new_tokens=32", "--evaluation.prompts=16", "--training.epochs=2"]
    options = ["--betas=[0.1,5]", "--training.learning_rate=3e-4", "--training.batch_size=8"]
    arguments = [f"--run_dir={run_dir}", f"--model={starter}", *PAIRS, *size, *options]
    run_job("jobs/beta_sweep.py", arguments, log, head.environment)
    weak, strong = json.loads((run_dir / "beta_sweep.json").read_text())
    assert (weak["beta"], strong["beta"]) == (0.1, 5)
    assert weak["kl/start"] > strong["kl/start"] > -0.1
    assert min(weak["eval/rewards/accuracies"], strong["eval/rewards/accuracies"]) > 0.5
    assert "<svg" in (run_dir / "beta_sweep.svg").read_text()
    assert "beta 5: reward" in log.read_text()
