"""How often the sampler needs new weights: whole jobs with a push every 1, 2, 4, 8 rounds, or none.

`python benchmarks/reproduce/staleness.py [--seeds 0 1 2] [--out docs/evidence]` writes a table, numbers and a
plot. Each film-review arm is a run of jobs/iterative_dpo.py in runs/reproduce, which goes on where it was
stopped; the same schedule on the enumerable language, where rewards and KLs are exact, stands beside it.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.reproduce.claims import Claim, markdown
from benchmarks.reproduce.language import build
from benchmarks.reproduce.language_rounds import Rounds, improve
from benchmarks.reproduce.results import COLOURS, MARKERS, Arm, Results, results_of
from dpo_ray.buffer import (
    PreferenceBuffer,
    SnapshotQuery,
    default_url,
    read_snapshot,
    read_snapshot_manifest,
)
from dpo_ray.config import TrainingConfig
from dpo_ray.desk import TrainRound
from dpo_ray.evaluation import mean, read_evaluation
from dpo_ray.machines import connect
from dpo_ray.metrics import read_steps
from dpo_ray.registry import PolicyRegistry
from dpo_ray.run import publish_start
from dpo_ray.starter import make_starter
from dpo_ray.storage import Storage
from dpo_ray.train import TrainerGroup
from dpo_ray.types import Pair

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 16
INTERVALS = (1, 2, 4, 8, ROUNDS)
"""Rounds from one push to the next; the last is never: the start alone is sampled."""
BETA = 0.3
FILM, LANGUAGE = "film reviews, whole jobs", "enumerable language, exact"
BEDS = (FILM, LANGUAGE)
SETTINGS: dict[str, Any] = {
    "rounds": ROUNDS,
    "tensorboard": False,
    "sampling": {
        "prompts_per_round": 32,
        "samples_per_prompt": 4,
        "max_new_tokens": 32,
        "cpus_per_replica": 0.25,
    },
    "pairing": {"rule": "all_pairs"},
    "buffer": {"pairs_per_round": 320},
    "judge": {"function": "benchmarks.reproduce.film_labels:bradley_terry", "cpus_per_actor": 0.25},
    "training": {
        "workers": 1,
        "cpus_per_worker": 0.25,
        "loss": {"beta": BETA},
        "learning_rate": 1.5e-4,
        "batch_size": 16,
        "reference": {"keep_logps": False},
    },
    "evaluation": {"prompts": 192, "samples_per_prompt": 2},
    "serving": {"port": 8132},
}


def interval_name(interval: int) -> str:
    return "never" if interval == ROUNDS else str(interval)


def arm_name(bed: str, interval: int) -> str:
    return f"{bed}: {interval_name(interval)}"


def run_folder(seed: int, interval: int) -> Path:
    return ROOT / f"runs/reproduce/staleness_{seed}_{interval_name(interval)}"


def measure(results: Results, seed: int) -> None:
    for interval in INTERVALS:
        results.run(seed, arm_name(FILM, interval), lambda interval=interval: run_job(seed, interval))
    results.run(seed, "workers", lambda: compare_workers(seed))
    if not results.lacks(seed, [arm_name(LANGUAGE, interval) for interval in INTERVALS]):
        return
    with tempfile.TemporaryDirectory() as folder:
        language = build(seed, Path(folder))
        for interval in INTERVALS:
            rounds = Rounds(BETA, num=ROUNDS, steps=30, prompts=40, push_every=interval)
            results.run(
                seed,
                arm_name(LANGUAGE, interval),
                lambda rounds=rounds: improve(language, rounds, seed),
            )


def run_job(seed: int, interval: int) -> Arm:
    """One job from its start or from where it was stopped, and how its last version does."""
    began, folder = time.perf_counter(), run_folder(seed, interval)
    settings = {**SETTINGS, "model": str(make_starter(0, lambda step, total, loss: None))}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(settings, file)
        file.flush()
        options = {
            "--config": file.name,
            "--run_dir": str(folder),
            "--seed": str(seed),
            "--sampling.push_every_rounds": str(interval),
        }
        arguments = [each for option in options.items() for each in option]
        subprocess.run([sys.executable, "jobs/iterative_dpo.py", *arguments], cwd=ROOT, check=True)
    return {**measured(folder, interval), "wall_s": time.perf_counter() - began}


def measured(folder: Path, interval: int) -> Arm:
    """Reward and KL of the last version, and what the pairs in the buffer say of themselves."""
    storage = Storage(str(folder))
    evaluation = read_evaluation(storage, ROUNDS)
    assert evaluation is not None, "the last round pushes, and what is pushed is evaluated"
    reward = mean([row.metrics["true"] for row in evaluation])
    kl = mean([row.logp - row.start_logp for row in evaluation])
    rows = buffered(storage)
    return {
        "reward": reward,
        "kl": kl,
        "J": reward - BETA * kl,
        "labels": len(rows),
        "wrong_version": sum(version != writer(round_, interval) for round_, version in rows),
        "age": mean([round_ - version for round_, version in rows]),
        "grammatical": mean([row.metrics["grammatical"] for row in evaluation]),
    }


def buffered(storage: Storage) -> list[tuple[int, int]]:
    """Round and policy version of every pair that is kept."""
    buffer = PreferenceBuffer(default_url(storage), storage)
    try:
        return [(row["round"], row["policy_version"]) for row in buffer.rows()]
    finally:
        buffer.close()


def writer(round_: int, interval: int) -> int:
    """The version that is live in a round, by arithmetic."""
    return round_ // interval * interval


def compare_workers(seed: int) -> Arm:
    """How far the losses of one and of two trainers are apart on the same batches of a run's first round."""
    run = Storage(str(run_folder(seed, 1)))
    manifest = read_snapshot_manifest(run, 0)
    assert manifest is not None, "the arms are measured before"
    pairs, start = read_snapshot(run, manifest), PolicyRegistry(run).fetch(0)
    connect()
    losses = [losses_of(workers, pairs, start) for workers in (1, 2)]
    return {
        "steps": len(losses[0]),
        "apart": max(abs(one - two) for one, two in zip(*losses, strict=True)),
    }


def losses_of(workers: int, pairs: Sequence[Pair], start: Path) -> list[float]:
    """Of each step of a round."""
    training = TrainingConfig.model_validate({**SETTINGS["training"], "workers": workers})
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        publish_start(PolicyRegistry(storage), start, canaries=())
        buffer = PreferenceBuffer(default_url(storage), storage)
        buffer.put(pairs)
        query = SnapshotQuery(max_round=0, min_policy_version=0, limit=len(pairs), seed=0)
        buffer.declare_snapshot(query, live_version=0)
        buffer.close()
        trainers = TrainerGroup(folder, training)
        try:
            trainers.run(TrainRound(round=0, parent=0, candidate=1, seed=0, canaries=()))
        finally:
            trainers.close()
        return [step["loss"] for step in read_steps(storage, 0)]


def claims(results: Results) -> list[Claim]:
    def falls(bed: str, one: int, other: int) -> dict[int, float]:
        return results.by_seed(
            lambda seed: (
                results.of(seed, arm_name(bed, one))["J"] - results.of(seed, arm_name(bed, other))["J"]
            )
        )

    every = []
    for bed in BEDS:
        every += [
            Claim(f"{bed}: J at interval 1 less that at 4", "<", 0.1, falls(bed, 1, 4)),
            Claim(f"{bed}: J at interval 4 less that of never", ">", 0.15, falls(bed, 4, ROUNDS)),
        ]
    wrong = results.by_seed(
        lambda seed: sum(results.of(seed, arm_name(FILM, each))["wrong_version"] for each in INTERVALS)
    )
    apart = results.by_seed(lambda seed: results.of(seed, "workers")["apart"])
    return [
        *every,
        Claim("buffered pairs that do not name the version that wrote them", "<=", 0, wrong),
        Claim("losses with 1 and 2 trainers, most apart, nats", "<=", 1e-5, apart),
    ]


def table(results: Results) -> str:
    """Each number with all seeds."""
    rows = []
    for bed in BEDS:
        for interval in INTERVALS:
            arms = [results.of(seed, arm_name(bed, interval)) for seed in results.seeds]
            numbers = (", ".join(f"{arm[name]:.2f}" for arm in arms) for name in ("reward", "kl", "J"))
            labels = ", ".join(str(arm["labels"]) for arm in arms)
            seconds = sum(arm.get("wall_s", arm["cpu_s"]) for arm in arms)
            rows.append([bed, interval_name(interval), *numbers, labels, f"{seconds:.0f}"])
    header = ["bed", "rounds between pushes", "reward", "KL, nats", "J = reward − β KL", "labels", "time, s"]
    return markdown(header, rows, words=2)


def plot(results: Results) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, bed in zip(panels, BEDS, strict=True):
        for number, seed in enumerate(results.seeds):
            reached = [results.of(seed, arm_name(bed, interval))["J"] for interval in INTERVALS]
            style = {"color": COLOURS[number], "marker": MARKERS[number]}
            axes.plot(range(len(INTERVALS)), reached, label=f"seed {seed}", **style)
        axes.set(title=bed, xlabel="rounds between pushes", xticks=range(len(INTERVALS)))
        axes.set_xticklabels([interval_name(interval) for interval in INTERVALS])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"J = reward − {BETA:g} KL at the end")
    panels[0].legend(fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    results = results_of("staleness", __doc__, arguments)
    for seed in results.seeds:
        measure(results, seed)
    results.write(claims(results), [table(results)], plot(results))


if __name__ == "__main__":
    main()
