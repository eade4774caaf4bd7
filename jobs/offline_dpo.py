"""Offline DPO: train on preference pairs that are there already."""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING

from dpo_ray.config import OfflineDPOConfig, exit_with, parse_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpo_ray.run_folder import RunFolder
    from dpo_ray.terminal import Terminal
    from dpo_ray.train import TrainerGroup
    from dpo_ray.types import Pair


def train(
    config: OfflineDPOConfig,
    folder: RunFolder,
    trainers: TrainerGroup,
    held_out: Sequence[Pair],
    terminal: Terminal,
) -> None:
    """One policy version per epoch; started again after a crash, go on."""
    from dpo_ray.desk import EvaluatePairs, TrainRound

    for epoch in range(folder.finished_rounds(), config.rounds):
        terminal.start_round()
        canaries = tuple((*pair.prompt_ids, *pair.chosen_ids)[:64] for pair in held_out[:4])
        with terminal.phase("train", f"epoch {epoch}: train") as on_progress:
            trainers.run(TrainRound(epoch, epoch, epoch + 1, config.seed, canaries), on_progress=on_progress)
        folder.registry.promote(epoch + 1)
        with terminal.phase("evaluate"):
            measured = trainers.run(EvaluatePairs(epoch + 1, tuple(held_out)))
        metrics = {f"eval/{name}": value for name, value in measured.items()}
        row = folder.finish_round(epoch, epoch + 1, {**metrics, **terminal.seconds()})
        terminal.say(
            f"epoch {epoch} · version {epoch + 1} · held-out rewards/accuracies "
            f"{row['eval/rewards/accuracies']:.3f} · loss {row['eval/loss']:.4f} · "
            f"margins {row['eval/rewards/margins']:.3f} · train {row['time/train_s']:.1f} s"
        )


def main(config: OfflineDPOConfig) -> None:
    """Load the pairs, bring up the trainers, train, report."""
    from dpo_ray.cluster import connect, training_bundles, wait_for_resources
    from dpo_ray.learner import TrainingError
    from dpo_ray.models import load_tokenizer
    from dpo_ray.preference_data import load_pairs
    from dpo_ray.report import write_report
    from dpo_ray.run import canary_sequences, publish_start
    from dpo_ray.run_folder import RunFolder
    from dpo_ray.terminal import Terminal
    from dpo_ray.train import TrainerGroup

    terminal = Terminal()
    try:
        tokenizer = load_tokenizer(config.model)
        pair_set = load_pairs(
            config.pairs, split=config.pairs_split, tokenizer=tokenizer, max_tokens=config.max_length
        )
        folder = RunFolder(config)
        training, held_out = split_pairs(pair_set.pairs, config)
        publish_start(folder.registry, config.model, canary_sequences([pair.prompt_ids for pair in held_out]))
    except (ValueError, FileNotFoundError) as error:
        exit_with(str(error))
    dropped = ", ".join(f"{count} {reason}" for reason, count in pair_set.dropped.items() if count)
    terminal.say(f"{len(training)} pairs to train on, {len(held_out)} held out; dropped: {dropped or 'none'}")
    declare_snapshots(config, folder, training)
    try:
        connect()
        wait_for_resources(training_bundles(config.training), timeout_s=config.cluster.wait_for_resources_s)
    except ValueError as error:
        exit_with(str(error))
    trainers = TrainerGroup(config.run_dir, config.training)
    try:
        train(config, folder, trainers, held_out, terminal)
    except TrainingError as error:
        exit_with(str(error), code=1)
    finally:
        trainers.close()
    terminal.say(f"report: {write_report(folder.storage.root)}")


def declare_snapshots(config: OfflineDPOConfig, folder: RunFolder, pairs: Sequence[Pair]) -> None:
    """Keep the pairs in the run's buffer, and declare all of them as what each epoch trains on."""
    from dpo_ray.buffer import PreferenceBuffer, SnapshotQuery, default_url

    buffer = PreferenceBuffer(default_url(folder.storage), folder.storage)
    buffer.put(pairs)
    for epoch in range(config.rounds):
        query = SnapshotQuery(max_round=epoch, min_policy_version=0, limit=len(pairs), seed=config.seed)
        buffer.declare_snapshot(query, live_version=0)
    buffer.close()


def split_pairs(pairs: Sequence[Pair], config: OfflineDPOConfig) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and pairs held out, by the seed. ValueError: too few of them."""
    if len(pairs) <= config.held_out_pairs:
        raise ValueError(
            f"{config.pairs} has {len(pairs)} usable pairs and held_out_pairs={config.held_out_pairs}: "
            "give more pairs, or hold fewer out"
        )
    shuffled = random.Random(config.seed).sample(list(pairs), len(pairs))
    rest = shuffled[config.held_out_pairs :]
    return rest[: config.max_pairs], shuffled[: config.held_out_pairs]


if __name__ == "__main__":
    main(parse_config(OfflineDPOConfig, sys.argv[1:]))
