"""Epochs that warn: what the next one starts from, and whether there is one."""

from pathlib import Path
from typing import cast

import pytest
from fake_cluster import publish_weights

from dpo_ray.config import OfflineDPOConfig
from dpo_ray.desk import EvaluatePairs, TrainRound, Work
from dpo_ray.metrics import StepMetrics, write_steps
from dpo_ray.offline import train_epochs
from dpo_ray.registry import PolicyManifest
from dpo_ray.run_folder import PAUSED, RunFolder
from dpo_ray.run_warnings import StopError
from dpo_ray.terminal import Terminal
from dpo_ray.train import TrainerGroup


class Trainers:
    """Of whose versions only the second has lost its chosen completions."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def run(self, assignment: Work, on_progress: object = None) -> StepMetrics | None:
        match assignment:
            case TrainRound(round=round_, parent=parent, candidate=candidate):
                write_steps(self._folder.storage, round_, [{"step": candidate, "loss": 0.5}])
                manifest = PolicyManifest(version=candidate, parent=parent, step=candidate)
                publish_weights(self._folder.registry, manifest, f"{candidate} of {parent}")
            case EvaluatePairs(version=version):
                return {"chosen_log_ratio": -50.0 if version == 2 else 1.0, "rewards/margins": 2.0}
            case _:
                raise AssertionError(assignment)


class Deleting(Terminal):
    """Somebody deletes the file as soon as it is named."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.said: list[str] = []
        self._file = file

    def say(self, text: str) -> None:
        self.said.append(text)
        if text.endswith("to go on"):
            self._file.unlink()


def train(tmp_path: Path, action: str, terminal: Terminal | None = None) -> RunFolder:
    config = OfflineDPOConfig.model_validate(
        {
            **{"model": "m", "pairs": "p", "run_dir": str(tmp_path), "rounds": 3, "tensorboard": False},
            "warnings": {"displacement": {"action": action}},
        }
    )
    folder = RunFolder(config)
    publish_weights(folder.registry, PolicyManifest(version=0), "start")
    if folder.registry.live() is None:
        folder.registry.promote(0)
    trainers = cast(TrainerGroup, Trainers(folder))
    train_epochs(config, folder, trainers, [], terminal or Terminal())
    return folder


def parents(folder: RunFolder) -> list[int | None]:
    return [folder.registry.manifest(version).parent for version in folder.registry.versions()]


def rounds(folder: RunFolder) -> list[tuple[int, int]]:
    """Of each epoch, the version that was live after it, and the number of its warnings."""
    finished = [row for row in folder.rows() if row["kind"] == "round"]
    return [(row["policy_version"], len(row["warnings"])) for row in finished]


def test_epochs_go_on_from_one_another(tmp_path: Path) -> None:
    folder = train(tmp_path, "log")
    assert parents(folder) == [None, 0, 1, 2]
    assert rounds(folder) == [(1, 0), (2, 1), (3, 0)]


def test_no_epoch_goes_on_from_a_version_that_was_rolled_back(tmp_path: Path) -> None:
    folder = train(tmp_path, "roll_back")
    assert parents(folder) == [None, 0, 1, 1]
    assert rounds(folder) == [(1, 0), (1, 1), (3, 0)]
    (rollback,) = (event for event in folder.registry.events() if event.kind == "rollback")
    assert (rollback.version, rollback.previous, rollback.by) == (1, 2, "job")
    assert rollback.reason.startswith("warning displacement: chosen completions lost 50.0 nats")


def test_an_epoch_that_stops_is_finished_and_the_next_one_follows_later(tmp_path: Path) -> None:
    with pytest.raises(StopError, match="warning displacement: chosen completions lost 50"):
        train(tmp_path, "stop")
    folder = train(tmp_path, "stop")
    assert rounds(folder) == [(1, 0), (2, 1), (3, 0)]


def test_a_paused_epoch_waits_for_its_file(tmp_path: Path) -> None:
    terminal = Deleting(tmp_path / PAUSED)
    folder = train(tmp_path, "pause", terminal)
    assert any(text.startswith("paused: warning displacement") for text in terminal.said)
    assert rounds(folder) == [(1, 0), (2, 1), (3, 0)]
