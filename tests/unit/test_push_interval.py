"""With a push every few rounds, training runs ahead of the sampler, and every pair says who wrote it."""

import sqlite3
from pathlib import Path

import pytest
from fake_cluster import Crash, CrashAt, Faults
from test_improve import check_events, gates, left_behind, manifests, moves, rows, run_job
from test_improve import quick_disk as quick_disk
from test_improve import standing_clock as standing_clock

from dpo_ray.evaluation import read_evaluation, win_rate
from dpo_ray.registry import PolicyRegistry
from dpo_ray.storage import Storage


def writers(folder: Path) -> list[tuple[int, int]]:
    """Each round in the buffer, with the version that wrote its pairs."""
    with sqlite3.connect(folder / "buffer.sqlite") as connection:
        return sorted(set(connection.execute("SELECT round, policy_version FROM pairs")))


def parents(folder: Path) -> list[int | None]:
    return [manifest["parent"] for manifest in manifests(folder)]


def evaluated(folder: Path) -> list[str]:
    return sorted(file.stem for file in (folder / "evaluation").iterdir())


def test_training_goes_on_between_two_pushes_and_pairs_name_the_sampled_version(tmp_path: Path) -> None:
    run_job(tmp_path, rounds=5, push_every_rounds=2)
    assert parents(tmp_path) == [None, 0, 1, 2, 3, 4]
    assert moves(tmp_path) == [("promote", version) for version in (0, 2, 4, 5)]  # The last always.
    assert writers(tmp_path) == [(0, 0), (1, 0), (2, 2), (3, 2), (4, 4)]
    assert evaluated(tmp_path) == ["v00000", "v00002", "v00004", "v00005"]
    assert gates(tmp_path) == [(True, "", live) for live in (0, 2, 2, 4, 5)]


def test_an_interval_longer_than_the_run_samples_the_start_alone(tmp_path: Path) -> None:
    run_job(tmp_path, rounds=3, push_every_rounds=99)
    assert writers(tmp_path) == [(0, 0), (1, 0), (2, 0)]
    assert moves(tmp_path) == [("promote", 0), ("promote", 3)]


def test_a_refused_push_sends_training_back_to_what_is_live(tmp_path: Path) -> None:
    run_job(tmp_path, rounds=4, push_every_rounds=2, faults=Faults(writes_badly=[2]))
    assert parents(tmp_path) == [None, 0, 1, 0, 3]
    assert [passed for passed, _, _ in gates(tmp_path)] == [True, False, True, True]
    assert writers(tmp_path) == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_a_candidate_that_trained_badly_between_pushes_is_no_parent(tmp_path: Path) -> None:
    run_job(tmp_path, rounds=3, push_every_rounds=3, faults=Faults(trained_badly=[2]))
    assert parents(tmp_path) == [None, 0, 1, 0]


def test_a_rollback_between_two_pushes_holds_for_training_too(tmp_path: Path) -> None:
    run_job(tmp_path, rounds=3, push_every_rounds=2)  # Live are 2, and at the end 3.
    PolicyRegistry(Storage(str(tmp_path))).rollback(2, by="ann", reason="too short")
    run_job(tmp_path, rounds=4, push_every_rounds=2)
    assert parents(tmp_path)[4] == 2


@pytest.mark.usefixtures("standing_clock")
def test_a_crash_anywhere_between_pushes_changes_nothing(tmp_path: Path) -> None:
    points, faults = CrashAt(), Faults(writes_badly=[2])
    run_job(tmp_path / "whole", rounds=3, push_every_rounds=2, crash=points, faults=faults)
    expected = left_behind(tmp_path / "whole")
    for number in range(4, len(points.passed), 8):
        folder = tmp_path / str(number)
        with pytest.raises(Crash):
            run_job(folder, rounds=3, push_every_rounds=2, crash=CrashAt(number), faults=faults)
        run_job(folder, rounds=3, push_every_rounds=2, faults=faults)
        assert left_behind(folder) == expected, f"crashed at point {number}, {points.passed[number]}"
        check_events(folder)


def test_a_pushed_version_is_compared_with_the_one_that_was_live(tmp_path: Path) -> None:
    run_job(tmp_path, rounds=6, push_every_rounds=3)
    storage = Storage(str(tmp_path))
    start, before, last = (read_evaluation(storage, version) or [] for version in (0, 3, 6))
    *_, row = rows(tmp_path)
    assert row["win_rate/vs_previous"] == win_rate(last, before) != win_rate(last, start)
