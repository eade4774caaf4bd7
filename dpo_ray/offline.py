"""Training on rows that are there already: kept, divided, trained on epoch by epoch."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_ray.buffer import PreferenceBuffer, SnapshotQuery, default_url
from dpo_ray.config import OfflineConfig, exit_with
from dpo_ray.desk import EvaluatePairs, TrainRound
from dpo_ray.learner import TrainingError
from dpo_ray.losses import accepts_weights
from dpo_ray.machines import connect, training_bundles, wait_for_resources
from dpo_ray.metrics import StepMetrics, read_steps
from dpo_ray.preference_data import PairSet
from dpo_ray.report import write_report
from dpo_ray.run import canary_sequences, publish_start, starting_model
from dpo_ray.run_folder import RunFolder
from dpo_ray.run_warnings import StopError, reasons_to, require_no_stop, round_warnings
from dpo_ray.terminal import OnProgress, Terminal
from dpo_ray.train import TrainerGroup
from dpo_ray.types import Pair

DROPPED_ROWS = "dropped_rows.csv"
"""In the run's folder."""
Read = Callable[[Path | str], Iterable[PairSet]]
"""Rows, tokenized for a model's folder or hub name."""


def run_offline(config: OfflineConfig, read: Read) -> None:
    """Train a model and report; ends the process with one message on an error."""
    terminal = Terminal()
    connect()
    try:
        trainers, _ = train_offline(config, read, terminal)
    except (TrainingError, StopError) as error:
        exit_with(str(error), code=1)
    except (ValueError, FileNotFoundError) as error:
        exit_with(str(error))
    trainers.close()
    terminal.say(f"report: {write_report(config.run_dir)}")


def train_offline(config: OfflineConfig, read: Read, terminal: Terminal) -> tuple[TrainerGroup, RunFolder]:
    """Train a model on rows, epoch by epoch; the trainers are still there.

    ValueError: model or rows cannot be used. TrainingError: training cannot go on. StopError: a warning
    ends it.
    """
    folder = RunFolder(config)
    model = folder.registry.fetch(0) if folder.registry.has(0) else starting_model(config, terminal)
    wait_for_resources(training_bundles(config.training), timeout_s=config.cluster.wait_for_resources_s)
    with terminal.phase("read", "read and tokenize") as on_progress:
        kept = keep_rows(read(model), config, folder, on_progress)
    terminal.say(kept.sentence())
    publish_start(folder.registry, model, _canaries(kept.held_out))
    trainers = TrainerGroup(config.run_dir, config.training)
    try:
        train_epochs(config, folder, trainers, kept.held_out, terminal)
    except BaseException:
        trainers.close()
        raise
    return trainers, folder


@dataclass(slots=True)
class KeptRows:
    """What became of the rows of a source."""

    held_out: list[Pair] = field(default_factory=list)
    num_training: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_rows: list[tuple[int, str]] = field(default_factory=list)
    """Number of each row in its file (the first is 1), and why it was dropped."""

    def sentence(self) -> str:
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        dropped += f" (named in {DROPPED_ROWS})" if self.dropped_rows else ""
        cut = f"; cut at the start: {self.truncated}" if self.truncated else ""
        return (
            f"{self.num_training} rows to train on, {len(self.held_out)} held out; "
            f"dropped: {dropped or 'none'}{cut}"
        )


def keep_rows(
    pair_sets: Iterable[PairSet], config: OfflineConfig, folder: RunFolder, on_progress: OnProgress
) -> KeptRows:
    """Put rows into the run's buffer as they come, and declare what each epoch trains on.

    Which rows are held out depends on the rows and the seed alone. ValueError: too few rows.
    """
    kept, held_out = KeptRows(), _HeldOut(config)
    buffer = PreferenceBuffer(default_url(folder.storage), folder.storage)
    for pair_set in pair_sets:
        _check_weights(pair_set, config)
        buffer.put(held_out.take(pair_set.pairs))
        kept.truncated += pair_set.truncated
        kept.dropped.update(pair_set.dropped)
        kept.dropped_rows += pair_set.dropped_rows
        on_progress(buffer.count(), 0)
    if kept.dropped_rows:
        lines = [f"{number},{reason}\n" for number, reason in kept.dropped_rows]
        folder.storage.write_text(DROPPED_ROWS, "".join(["row,reason\n", *lines]))
    kept.held_out = held_out.pairs()
    if not buffer.count():
        raise ValueError(
            f"{len(kept.held_out)} usable rows are too few to hold {config.held_out_pairs} out and train on "
            "others: give more rows, or lower held_out_pairs"
        )
    kept.num_training = min(buffer.count(), config.max_pairs or buffer.count())
    for epoch in range(config.rounds):
        query = SnapshotQuery(
            max_round=epoch, min_policy_version=0, limit=kept.num_training, seed=config.seed
        )
        buffer.declare_snapshot(query, live_version=0)
    buffer.close()
    return kept


def _check_weights(pair_set: PairSet, config: OfflineConfig) -> None:
    weighted = [pair.weight for pair in pair_set.pairs if pair.weight != 1.0]
    if weighted and not accepts_weights(config.training.loss):
        raise ValueError(
            f"{len(weighted)} rows have weights, the first {weighted[0]}, which training.loss.type="
            f"{config.training.loss.type} cannot keep apart: remove the column weight, or take another loss"
        )


class _HeldOut:
    """Of all rows that come by, those with the smallest hashes."""

    def __init__(self, config: OfflineConfig) -> None:
        self._config = config
        self._heap: list[tuple[int, str]] = []  # The largest hash first.
        self._pairs: dict[str, Pair] = {}

    def take(self, pairs: Iterable[Pair]) -> list[Pair]:
        """The rows that are not held out, or no more."""
        released = []
        for pair in pairs:
            if pair.pair_id in self._pairs:
                continue
            digest = hashlib.sha256(f"{self._config.seed} {pair.pair_id}".encode()).digest()
            self._pairs[pair.pair_id] = pair
            heapq.heappush(self._heap, (-int.from_bytes(digest), pair.pair_id))
            if len(self._heap) > self._config.held_out_pairs:
                released.append(self._pairs.pop(heapq.heappop(self._heap)[1]))
        return released

    def pairs(self) -> list[Pair]:
        return [self._pairs[pair_id] for _, pair_id in sorted(self._heap)]


def train_epochs(
    config: OfflineConfig,
    folder: RunFolder,
    trainers: TrainerGroup,
    held_out: list[Pair],
    terminal: Terminal,
) -> None:
    """One policy version per epoch, trained from the live one; started again after a crash, go on."""
    for epoch in range(folder.finished_rounds(), config.rounds):
        if folder.registry.manifest(epoch).stopped_early:
            terminal.say(f"training stopped early before epoch {epoch}: a longer run needs other bounds")
            return
        folder.wait_while_paused(terminal.say)
        terminal.start_round()
        assignment = TrainRound(
            round=epoch,
            parent=folder.registry.live() or 0,
            candidate=epoch + 1,
            seed=config.seed,
            canaries=_canaries(held_out),
            rounds=config.rounds,
            held_out=tuple(held_out),
        )
        with terminal.phase("train", f"epoch {epoch}: train") as on_progress:
            trainers.run(assignment, on_progress=on_progress)
        folder.registry.promote(epoch + 1)
        with terminal.phase("evaluate"):
            measured = trainers.run(EvaluatePairs(epoch + 1, tuple(held_out)))
        _finish_epoch(config, folder, epoch, measured, terminal)


def _finish_epoch(
    config: OfflineConfig, folder: RunFolder, epoch: int, measured: StepMetrics, terminal: Terminal
) -> None:
    """Write the epoch's row, and do what its warnings ask for."""
    metrics = {f"eval/{name}": value for name, value in measured.items()}
    steps = read_steps(folder.storage, epoch)
    warnings = round_warnings(metrics, steps, start={}, config=config.warnings)
    if reasons := reasons_to("roll_back", warnings):
        folder.registry.rollback(by="job", reason=reasons)
    stopped = folder.registry.manifest(epoch + 1).stopped_early
    metrics |= {"stopped_early": stopped, **terminal.seconds()}
    row = folder.finish_round(epoch, folder.registry.live() or 0, metrics, warnings)
    terminal.say(_epoch_line(row))
    terminal.warn(row)
    if stopped:
        terminal.say(f"training stopped early: {stopped}")
    require_no_stop(warnings)


def _epoch_line(row: dict[str, Any]) -> str:
    measured = [
        f"{name} {row[f'eval/{name}']:.4f}"
        for name in ("loss", "rewards/accuracies", "rewards/margins", "kl/reference")
        if f"eval/{name}" in row
    ]
    return (
        f"epoch {row['round']} · version {row['policy_version']} · held-out {' · '.join(measured)} · "
        f"train {row['time/train_s']:.1f} s"
    )


def _canaries(pairs: Iterable[Pair]) -> tuple[tuple[int, ...], ...]:
    return canary_sequences([(*pair.prompt_ids, *pair.chosen_ids) for pair in pairs])
