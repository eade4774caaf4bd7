"""Controlled sentiment through the live policy, the buffer and the trainers: what beta and labels do to KL.

`python benchmarks/reproduce/sentiment.py [--seeds 0 1 2] [--out docs/evidence]` writes a table, numbers and a
plot. Film reviews are sampled once, four of each opening, and all six pairs labelled; DPO and IPO learn from
them, and after each epoch the policy answers held-out openings. Run folders stay in runs/reproduce: what was
trained is not trained again.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.reproduce.film_bed import PAIRS, Bed, evaluate, rewards_of
from benchmarks.reproduce.results import Results, results_of
from benchmarks.reproduce.sentiment_evidence import ARMS, Trained, claims, plot, table
from dpo_ray.config import TrainingConfig
from dpo_ray.desk import TrainRound
from dpo_ray.train import TrainWorker

EPOCHS = 5
TRAINING: dict[str, Any] = {
    "workers": 1,
    "cpus_per_worker": 0.25,
    "learning_rate": 1.5e-4,
    "batch_size": 16,
    "reference": {"keep_logps": False},
    # No bound: it has the evaluation add up the KL of every token.
    "early_stopping": {"eval_every_steps": 1_000_000, "max_kl": 1e9},
}


def measure(results: Results, seed: int) -> None:
    """The arms that are not there yet, on one cluster."""
    if not results.lacks(seed, ["start", *(arm.name for arm in ARMS)]):
        return
    bed = Bed(seed)
    num_turned = bed.fill_buffer()
    results.run(seed, "start", lambda: measure_start(bed, num_turned))
    for number, arm in enumerate(ARMS):
        results.run(seed, arm.name, lambda number=number, arm=arm: train_arm(bed, number, arm))


def measure_start(bed: Bed, num_turned: int) -> dict[str, Any]:
    """The start's rewards on held-out openings, and the share of labels that err."""
    scored = bed.sample(bed.run.held_out, per_prompt=16, seed="start")
    return {"rewards": rewards_of(scored), "turned": num_turned / PAIRS}


def train_arm(bed: Bed, number: int, arm: Trained) -> dict[str, Any]:
    """Train from the start; reward and KL after each epoch."""
    began = time.perf_counter()
    training = TrainingConfig.model_validate({**TRAINING, "loss": {"type": arm.loss, "beta": arm.beta}})
    worker = bed.worker(training)
    points = [train_epoch(bed, worker, arm, number, epoch) for epoch in range(EPOCHS)]
    columns = {name: [point[name] for point in points] for name in points[0]}
    return {**columns, "wall_s": time.perf_counter() - began}


def train_epoch(bed: Bed, worker: TrainWorker, arm: Trained, number: int, epoch: int) -> dict[str, float]:
    """One epoch makes one policy version, which goes live and answers."""
    version = number * EPOCHS + epoch + 1
    bed.declare(version - 1, arm.labels)
    assignment = TrainRound(
        round=version - 1,
        parent=version - 1 if epoch else 0,
        candidate=version,
        seed=bed.config.seed,
        canaries=bed.run.canary_sequences(),
    )
    worker.do(assignment)
    bed.push(version)
    return evaluate(bed, worker, version)


def main(arguments: Sequence[str] | None = None) -> None:
    results = results_of("sentiment", __doc__, arguments)
    for seed in results.seeds:
        measure(results, seed)
    results.write(claims(results), [table(results)], plot(results))


if __name__ == "__main__":
    main()
