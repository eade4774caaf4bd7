"""What each action of a warning does to the loop, and what a crash leaves of it."""

from pathlib import Path
from typing import Any

import pytest
from fake_cluster import Crash, CrashAt, FakeCluster, Faults, RunWithPoints, publish_weights
from test_improve import PROMPTS, check_events, gates, make_config, moves, rows

from dpo_ray.config import WarningsConfig
from dpo_ray.registry import PolicyManifest, PolicyRegistry
from dpo_ray.run_folder import PAUSED
from dpo_ray.run_warnings import StopError
from dpo_ray.storage import Storage
from dpo_ray.terminal import Terminal
from jobs.iterative_dpo import improve

MAX_KL = 4.0
"""Of the fake policies, version 1 is below it, and each later one above."""


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine itself does not crash here."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


class Attendant(Terminal):
    """A person who reads what is said, and lets a paused run go on, or ends the job then."""

    def __init__(self, folder: Path, *, is_there: bool = True) -> None:
        super().__init__()
        self.said: list[str] = []
        self._file, self._is_there = folder / PAUSED, is_there

    def say(self, text: str) -> None:
        self.said.append(text)
        if text.endswith("to go on"):
            if not self._is_there:
                raise Crash("while it is paused")
            self._file.unlink()


def run_job(
    folder: Path,
    *,
    action: str,
    rounds: int = 3,
    replicas: int = 1,
    crash: CrashAt | None = None,
    terminal: Terminal | None = None,
) -> None:
    """A job that warns of the KL, as one process runs it."""
    at_point = crash or CrashAt()
    config = make_config(folder, rounds=rounds, replicas=replicas)
    kl_budget = {"max_kl": MAX_KL, "action": action}
    # The fake policies write longer and longer.
    quiet = {"length_drift": {"max_ratio": None}}
    warnings = WarningsConfig.model_validate({"kl_budget": kl_budget, **quiet})
    run = RunWithPoints(config.model_copy(update={"warnings": warnings}), PROMPTS, at_point)
    if run.registry.live() is None:
        publish_weights(run.registry, PolicyManifest(version=0), "start")
        run.registry.promote(0)
    run.end_trial()
    cluster = FakeCluster(config, at_point, Faults())
    try:
        improve(run, cluster, terminal or Terminal())
    finally:
        cluster.close()


def fired(folder: Path) -> list[list[str]]:
    """Of each round, the names of its warnings."""
    return [[each["name"] for each in row["warnings"]] for row in rows(folder) if row["kind"] == "round"]


def live(folder: Path) -> int | None:
    return PolicyRegistry(Storage(str(folder))).live()


def outcome(folder: Path) -> Any:
    return rows(folder), live(folder), moves(folder)[-1]


def test_a_logged_warning_is_said_and_kept_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_job(tmp_path, action="log")
    assert fired(tmp_path) == [[], ["kl_budget"], ["kl_budget"]]
    assert live(tmp_path) == 3
    warned = rows(tmp_path)[-1]["warnings"]
    assert warned[0]["action"] == "log"
    assert f"  warning kl_budget: {warned[0]['message']}\n" in capsys.readouterr().out


def test_a_paused_run_waits_until_its_file_is_deleted(tmp_path: Path) -> None:
    person = Attendant(tmp_path)
    run_job(tmp_path, action="pause", terminal=person)
    assert [
        text for text in person.said if text.startswith("paused: warning kl_budget: the KL to the start is")
    ]
    assert live(tmp_path) == 3
    assert (tmp_path / PAUSED).exists()  # Of the last round: whoever raises `rounds` reads it first.


def test_a_paused_run_that_was_killed_still_waits(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(Crash, match="paused"):
            run_job(tmp_path, action="pause", terminal=Attendant(tmp_path, is_there=False))
        assert len(fired(tmp_path)) == 2
    (tmp_path / PAUSED).unlink()
    run_job(tmp_path, action="pause")
    assert len(fired(tmp_path)) == 3


def test_a_job_that_stopped_goes_on_when_it_is_started_again(tmp_path: Path) -> None:
    for finished in (2, 3):
        with pytest.raises(StopError, match=r"^warning kl_budget: the KL to the start is .*goes on"):
            run_job(tmp_path, action="stop")
        assert fired(tmp_path) == [[], ["kl_budget"], ["kl_budget"]][:finished]
    assert live(tmp_path) == 3


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_rolled_back_version_is_no_ones_parent(tmp_path: Path, replicas: int) -> None:
    run_job(tmp_path, action="roll_back", replicas=replicas)
    registry = PolicyRegistry(Storage(str(tmp_path)))
    assert [registry.manifest(version).parent for version in registry.versions()] == [None, 0, 1, 1]
    assert moves(tmp_path) == [
        *(("promote", 0), ("promote", 1), ("promote", 2), ("rollback", 1)),
        *(("promote", 3), ("rollback", 1)),
    ]
    rollback = registry.events()[-1]
    assert rollback.by == "job"
    assert rollback.reason.startswith("warning kl_budget: the KL to the start is")
    assert [(passed, version) for passed, _, version in gates(tmp_path)] == [
        (True, 1),
        (False, 1),
        (False, 1),
    ]
    assert fired(tmp_path) == [[], ["kl_budget"], ["kl_budget"]]


@pytest.mark.parametrize("action", ["roll_back", "stop", "pause"])
def test_a_crash_anywhere_in_a_warned_round_changes_nothing(tmp_path: Path, action: str) -> None:
    def run_to_the_end(folder: Path, crash: CrashAt | None = None) -> None:
        try:
            run_job(folder, rounds=2, action=action, crash=crash, terminal=Attendant(folder))
        except StopError:
            run_job(folder, rounds=2, action=action)

    run_job(tmp_path / "first", rounds=1, action=action)
    points, whole = CrashAt(), tmp_path / "whole"
    run_job(whole, rounds=1, action=action)
    run_to_the_end(whole, points)
    for number in range(0, len(points.passed), 3):
        folder = tmp_path / f"{action}{number}"
        run_job(folder, rounds=1, action=action)
        with pytest.raises(Crash):
            run_to_the_end(folder, CrashAt(number))
        run_to_the_end(folder)
        assert outcome(folder) == outcome(whole), points.passed[number]
        assert (folder / PAUSED).exists() == (action == "pause"), points.passed[number]
        check_events(folder)
