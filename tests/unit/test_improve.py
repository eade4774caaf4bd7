"""The whole loop: whatever ends it and wherever, the same command started again ends up the same."""

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from fake_cluster import STEPS_PER_ROUND, Crash, CrashAt, FakeCluster, RunWithPoints, publish_weights

from dpo_ray.config import (
    BufferConfig,
    EvaluationConfig,
    GateConfig,
    IterativeDPOConfig,
    SamplingConfig,
)
from dpo_ray.registry import PolicyManifest, PolicyRegistry
from dpo_ray.storage import Storage
from dpo_ray.terminal import Terminal
from dpo_ray.types import Prompt
from jobs.iterative_dpo import improve

if TYPE_CHECKING:
    from dpo_ray.cluster import Cluster

PROMPTS = [Prompt(f"prompt {number}", (1, number)) for number in range(20)]


def make_config(folder: Path, *, rounds: int, seed: int = 0) -> IterativeDPOConfig:
    return IterativeDPOConfig(
        run_dir=str(folder),
        rounds=rounds,
        seed=seed,
        tensorboard=False,
        sampling=SamplingConfig(prompts_per_round=4, samples_per_prompt=3),
        buffer=BufferConfig(pairs_per_round=6),
        evaluation=EvaluationConfig(prompts=3),
        gate=GateConfig(max_chosen_drop=5.0),
    )


def run_job(
    folder: Path, *, rounds: int, crash: CrashAt | None = None, bad_candidates: Sequence[int] = ()
) -> FakeCluster:
    """The job as one process runs it, from the start or from where a process before was killed."""
    at_point = crash or CrashAt()
    config = make_config(folder, rounds=rounds)
    run = RunWithPoints(config, PROMPTS, at_point)
    if run.registry.live() is None:
        publish_weights(run.registry, PolicyManifest(version=0), "start")
        run.registry.promote(0)
    cluster = FakeCluster(config, at_point, bad_candidates=bad_candidates)
    try:
        improve(run, cast("Cluster", cluster), Terminal())
    finally:
        cluster.close()
    return cluster


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{n: v for n, v in json.loads(line).items() if not n.startswith("time/")} for line in lines]


def manifests(folder: Path) -> list[dict[str, Any]]:
    registry = PolicyRegistry(Storage(str(folder)))
    return [registry.manifest(v).model_dump(exclude={"created_at"}) for v in registry.versions()]


def pairs(folder: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(folder / "buffer.sqlite") as connection:
        return sorted(connection.execute("SELECT pair_id, content_sha256 FROM pairs"))


def left_behind(folder: Path) -> dict[str, Any]:
    """Everything in a run's folder that must not depend on when it was made."""
    files = [*folder.glob("rounds/*/*"), *folder.glob("evaluation/*"), folder / "policies" / "LIVE"]
    return {
        "rows": rows(folder),
        "versions": manifests(folder),
        "pairs": pairs(folder),
        **{str(file.relative_to(folder)): file.read_bytes() for file in files},
    }


@pytest.fixture
def standing_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs have the same snapshots to the byte, `created_at` included."""
    monkeypatch.setattr("dpo_ray.buffer._now", lambda: "2025-01-01T00:00:00.000+00:00")


def test_n_rounds_make_n_versions_and_a_row_for_everything_once(tmp_path: Path) -> None:
    cluster = run_job(tmp_path, rounds=3)
    assert [manifest["version"] for manifest in manifests(tmp_path)] == [0, 1, 2, 3]
    assert [manifest["parent"] for manifest in manifests(tmp_path)] == [None, 0, 1, 2]
    assert cluster.pushed == [1, 2, 3]
    assert (tmp_path / "policies/LIVE").read_text() == "3\n"
    expected = [("start", -1, 0, 0)]
    for round_ in range(3):
        steps = [STEPS_PER_ROUND * round_ + 1 + place for place in range(STEPS_PER_ROUND)]
        expected += [("step", round_, step, round_) for step in steps]
        expected += [("round", round_, steps[-1], round_ + 1)]
    named = [(row["kind"], row["round"], row["step"], row["policy_version"]) for row in rows(tmp_path)]
    assert named == expected


def test_a_version_names_the_snapshot_that_it_was_trained_on(tmp_path: Path) -> None:
    run_job(tmp_path, rounds=2)
    for round_ in range(2):
        declared = json.loads((tmp_path / f"rounds/{round_:05d}/manifest.json").read_text())
        trained_on = manifests(tmp_path)[round_ + 1]["snapshot"]
        assert trained_on == {name: declared[name] for name in ("round", "rows", "sha256")}


def test_a_round_trains_on_its_own_pairs_first(tmp_path: Path) -> None:
    run_job(tmp_path, rounds=2)
    first, second = (row for row in rows(tmp_path) if row["kind"] == "round")
    assert (first["pairs/made"], first["pairs/kept"]) == (4, 4)
    assert (second["pairs/made"], second["pairs/kept"]) == (4, 6)  # Of eight, as many as are allowed.


def test_a_crash_anywhere_changes_nothing(tmp_path: Path, standing_clock: None) -> None:
    """The first candidate is refused, the second goes live."""
    points = CrashAt()
    run_job(tmp_path / "whole", rounds=2, crash=points, bad_candidates=[1])
    expected = left_behind(tmp_path / "whole")
    assert {"before put", "after put", "written rounds/00001/steps.jsonl"} <= set(points.passed)
    for number, name in enumerate(points.passed):
        folder = tmp_path / str(number)
        with pytest.raises(Crash, match=f"^{name}$"):
            run_job(folder, rounds=2, crash=CrashAt(number), bad_candidates=[1])
        run_job(folder, rounds=2, bad_candidates=[1])
        assert left_behind(folder) == expected, f"crashed at point {number}, {name}"


def test_a_crash_in_every_process_but_the_last_changes_nothing(tmp_path: Path, standing_clock: None) -> None:
    run_job(tmp_path / "whole", rounds=1)
    for point in range(100):  # Each process gets a little further than the one before.
        try:
            run_job(tmp_path / "crashing", rounds=1, crash=CrashAt(6 + point // 2))
        except Crash:
            continue
        break
    assert left_behind(tmp_path / "crashing") == left_behind(tmp_path / "whole")


def test_a_refused_candidate_is_kept_but_neither_live_nor_a_parent(tmp_path: Path) -> None:
    cluster = run_job(tmp_path, rounds=3, bad_candidates=[2])
    assert [manifest["parent"] for manifest in manifests(tmp_path)] == [None, 0, 1, 1]
    assert cluster.pushed == [1, 3]
    verdicts = [(r["gate/passed"], r["policy_version"]) for r in rows(tmp_path) if r["kind"] == "round"]
    assert verdicts == [(True, 1), (False, 1), (True, 3)]


def test_more_rounds_go_on_where_a_finished_run_ended(tmp_path: Path, standing_clock: None) -> None:
    run_job(tmp_path / "at once", rounds=3)
    run_job(tmp_path / "in parts", rounds=1)
    run_job(tmp_path / "in parts", rounds=3)
    assert left_behind(tmp_path / "in parts") == left_behind(tmp_path / "at once")


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    run_job(tmp_path, rounds=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    cluster = run_job(tmp_path, rounds=1)
    assert cluster.pushed == []
    assert {path: path.read_bytes() for path in before} == before


def test_another_seed_on_the_same_folder_is_refused_by_name(tmp_path: Path) -> None:
    run_job(tmp_path, rounds=1)
    with pytest.raises(ValueError, match=r"holds a run with other settings \(seed: 0 there, 7 now\)"):
        RunWithPoints(make_config(tmp_path, rounds=1, seed=7), PROMPTS, CrashAt())
