"""The whole loop: whatever ends it and wherever, the same command started again ends up the same."""

import json
import sqlite3
from pathlib import Path
from typing import Any, cast

import pytest
from fake_cluster import STEPS_PER_ROUND, Crash, CrashAt, FakeCluster, Faults, RunWithPoints, publish_weights

from dpo_ray.config import (
    BufferConfig,
    EvaluationConfig,
    GateConfig,
    IterativeDPOConfig,
    PairingConfig,
    SamplingConfig,
)
from dpo_ray.gate import GateError
from dpo_ray.registry import PolicyManifest, PolicyRegistry
from dpo_ray.sampler import RefusedError
from dpo_ray.storage import Storage
from dpo_ray.terminal import Terminal
from dpo_ray.types import Prompt
from jobs.iterative_dpo import improve

PROMPTS = [Prompt(f"prompt {number}", (1, number)) for number in range(20)]


NO_FAULTS = Faults()
BEST_VS_WORST = PairingConfig()


def make_config(
    folder: Path, *, rounds: int, replicas: int = 1, on_failure: str = "continue"
) -> IterativeDPOConfig:
    return IterativeDPOConfig(
        run_dir=str(folder),
        rounds=rounds,
        tensorboard=False,
        sampling=SamplingConfig(prompts_per_round=4, samples_per_prompt=3, replicas=replicas),
        buffer=BufferConfig(pairs_per_round=6),
        evaluation=EvaluationConfig(prompts=3),
        gate=GateConfig.model_validate(
            {"max_chosen_drop": 5.0, "max_degenerate_rise": 0.5, "on_failure": on_failure}
        ),
    )


def run_job(
    folder: Path,
    *,
    rounds: int,
    crash: CrashAt | None = None,
    faults: Faults = NO_FAULTS,
    replicas: int = 1,
    on_failure: str = "continue",
    pairing: PairingConfig = BEST_VS_WORST,
    push_every_rounds: int = 1,
) -> FakeCluster:
    """The job as one process runs it, from the start or from where a process before was killed."""
    at_point = crash or CrashAt()
    config = make_config(folder, rounds=rounds, replicas=replicas, on_failure=on_failure)
    sampling = config.sampling.model_copy(update={"push_every_rounds": push_every_rounds})
    config = config.model_copy(update={"pairing": pairing, "sampling": sampling})
    run = RunWithPoints(config, PROMPTS, at_point)
    if run.registry.live() is None:
        publish_weights(run.registry, PolicyManifest(version=0), "start")
        run.registry.promote(0)
    run.end_trial()
    cluster = FakeCluster(config, at_point, faults)
    try:
        improve(run, cluster, Terminal())
    finally:
        cluster.close()
    return cluster


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{n: v for n, v in json.loads(line).items() if not n.startswith("time/")} for line in lines]


def manifests(folder: Path) -> list[dict[str, Any]]:
    registry = PolicyRegistry(Storage(str(folder)))
    return [
        registry.manifest(v).model_dump(exclude={"created_at", "git_commit"}) for v in registry.versions()
    ]


def check_events(folder: Path) -> None:
    """Each move begins where the one before ended, and the last one ended at LIVE."""
    registry = PolicyRegistry(Storage(str(folder)))
    events = registry.events()
    assert [event.previous for event in events[1:]] == [event.version for event in events[:-1]]
    assert events[-1].version == registry.live()
    assert registry.candidate() is None


def moves(folder: Path) -> list[tuple[str, int]]:
    """Kind and version of each move of LIVE."""
    return [(event.kind, event.version) for event in PolicyRegistry(Storage(str(folder))).events()]


def gates(folder: Path) -> list[tuple[bool, str, int]]:
    """Of each round: whether its candidate passed, why not, and what was live afterwards."""
    finished = [row for row in rows(folder) if row["kind"] == "round"]
    return [(row["gate/passed"], row["gate/reason"], row["policy_version"]) for row in finished]


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
    for module in ("store", "snapshots"):
        monkeypatch.setattr(f"dpo_ray.buffer.{module}.now", lambda: "2025-01-01T00:00:00.000+00:00")


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine itself does not crash here."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def test_n_rounds_make_n_versions_and_a_row_for_everything_once(tmp_path: Path) -> None:
    cluster = run_job(tmp_path, rounds=3)
    assert [manifest["version"] for manifest in manifests(tmp_path)] == [0, 1, 2, 3]
    assert [manifest["parent"] for manifest in manifests(tmp_path)] == [None, 0, 1, 2]
    assert cluster.replicas.held == [3]
    assert moves(tmp_path) == [("promote", version) for version in range(4)]
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


@pytest.mark.parametrize(
    ("faults", "replicas"),
    [
        (Faults(trained_badly=[1]), 1),
        (Faults(writes_badly=[1]), 1),
        (Faults(writes_badly=[1]), 2),
        (Faults(unprovable=[1]), 1),
        (Faults(unprovable_beside_others=[1]), 2),
    ],
)
def test_a_crash_anywhere_changes_nothing(
    tmp_path: Path, standing_clock: None, faults: Faults, replicas: int
) -> None:
    """The first candidate is refused, the second goes live."""
    points = CrashAt()
    run_job(tmp_path / "whole", rounds=2, crash=points, faults=faults, replicas=replicas)
    expected = left_behind(tmp_path / "whole")
    assert [passed for passed, _, _ in gates(tmp_path / "whole")][1:] == [True]
    assert {"before put", "after put", "written rounds/00001/steps.jsonl"} <= set(points.passed)
    for number, name in enumerate(points.passed):
        folder = tmp_path / str(number)
        with pytest.raises(Crash, match=f"^{name}$"):
            run_job(folder, rounds=2, crash=CrashAt(number), faults=faults, replicas=replicas)
        run_job(folder, rounds=2, faults=faults, replicas=replicas)
        assert left_behind(folder) == expected, f"crashed at point {number}, {name}"
        check_events(folder)


def test_a_crash_in_every_process_but_the_last_changes_nothing(tmp_path: Path, standing_clock: None) -> None:
    run_job(tmp_path / "whole", rounds=1)
    for point in range(100):  # Each process gets a little further than the one before.
        try:
            run_job(tmp_path / "crashing", rounds=1, crash=CrashAt(6 + point // 2))
        except Crash:
            continue
        break
    assert left_behind(tmp_path / "crashing") == left_behind(tmp_path / "whole")


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_candidate_that_trained_badly_never_answers(tmp_path: Path, replicas: int) -> None:
    cluster = run_job(tmp_path, rounds=3, faults=Faults(trained_badly=[2]), replicas=replicas)
    assert [manifest["parent"] for manifest in manifests(tmp_path)] == [None, 0, 1, 1]
    assert moves(tmp_path) == [("promote", 0), ("promote", 1), ("promote", 3)]
    assert not any(2 in held for held in cluster.replicas.pushed)
    refusal = "chosen log-prob fell 99.0 nats below the reference's"
    assert gates(tmp_path) == [(True, "", 1), (False, refusal, 1), (True, "", 3)]


TRIED = {1: [("promote", 2), ("rollback", 1)], 2: []}
"""What is written of a candidate that is tried and refused: a single replica must go live with it."""


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_candidate_that_writes_badly_is_taken_back(tmp_path: Path, replicas: int) -> None:
    cluster = run_job(tmp_path, rounds=3, faults=Faults(writes_badly=[2]), replicas=replicas)
    assert [manifest["parent"] for manifest in manifests(tmp_path)] == [None, 0, 1, 1]
    assert moves(tmp_path) == [("promote", 0), ("promote", 1), *TRIED[replicas], ("promote", 3)]
    tried = [2] if replicas == 1 else [1, 2]
    assert cluster.replicas.pushed.count(tried) == 1
    assert cluster.replicas.pushed[cluster.replicas.pushed.index(tried) + 1] == [1] * replicas
    refusal = "100% of completions are degenerate (6 cut off), 100% more than the start's, above 50%"
    assert gates(tmp_path) == [(True, "", 1), (False, refusal, 1), (True, "", 3)]
    first, second = (row for row in rows(tmp_path) if row["kind"] == "round" and row["policy_version"] == 1)
    assert not {name for name in first if name.startswith("eval/") and first[name] != second[name]}
    assert (tmp_path / "evaluation/v00002.jsonl").exists()


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_candidate_that_no_replica_can_prove_is_taken_back(tmp_path: Path, replicas: int) -> None:
    run_job(tmp_path, rounds=3, faults=Faults(unprovable=[2]), replicas=replicas)
    assert moves(tmp_path) == [("promote", 0), ("promote", 1), *TRIED[replicas], ("promote", 3)]
    assert gates(tmp_path) == [(True, "", 1), (False, "[2] is not proven", 1), (True, "", 3)]
    assert not (tmp_path / "evaluation/v00002.jsonl").exists()


def test_a_version_that_one_replica_proved_and_another_did_not_is_rolled_back(tmp_path: Path) -> None:
    run_job(tmp_path, rounds=2, faults=Faults(unprovable_beside_others=[1]), replicas=2)
    assert moves(tmp_path) == [("promote", 0), ("promote", 1), ("rollback", 0), ("promote", 2)]
    (rollback,) = (e for e in PolicyRegistry(Storage(str(tmp_path))).events() if e.kind == "rollback")
    assert (rollback.by, rollback.reason) == ("job", "[1] is not proven")
    assert gates(tmp_path) == [(False, "[1] is not proven", 0), (True, "", 2)]


def test_a_replica_evaluates_a_candidate_while_the_other_stays_live(tmp_path: Path) -> None:
    cluster = run_job(tmp_path, rounds=2, replicas=2)
    assert cluster.replicas.pushed == [[0, 1], [1, 1], [1, 2], [2, 2]]


def test_one_replica_and_two_make_the_same_policies(tmp_path: Path, standing_clock: None) -> None:
    for replicas in (1, 2):
        run_job(tmp_path / str(replicas), rounds=3, faults=Faults(writes_badly=[2]), replicas=replicas)
    assert left_behind(tmp_path / "1") == left_behind(tmp_path / "2")


def test_a_person_who_rolls_back_during_a_trial_refuses_the_candidate(tmp_path: Path) -> None:
    def roll_back(name: str) -> None:
        registry = PolicyRegistry(Storage(str(tmp_path)))
        if name == "before evaluate" and registry.live() == 2:
            registry.rollback(by="ann", reason="too short")

    run_job(tmp_path, rounds=3, crash=cast(CrashAt, roll_back))
    assert moves(tmp_path) == [("promote", 0), ("promote", 1), *TRIED[1], ("promote", 3)]
    assert gates(tmp_path)[1] == (False, "version 2 was withdrawn before it was evaluated", 1)


def test_answers_of_another_version_are_no_evaluation(tmp_path: Path) -> None:
    cluster = run_job(tmp_path, rounds=1)
    (tmp_path / "evaluation/v00001.jsonl").unlink()
    cluster.replicas.held = [0]
    with pytest.raises(RefusedError, match="version 1 was taken back while it was evaluated"):
        cluster.evaluate(1, PROMPTS)
    assert not (tmp_path / "evaluation/v00001.jsonl").exists()


def test_an_evaluated_version_is_not_tried_again(tmp_path: Path) -> None:
    cluster = run_job(tmp_path, rounds=1, faults=Faults(writes_badly=[1]))
    before = moves(tmp_path)
    cluster.show(1)
    assert moves(tmp_path) == before


def test_a_job_may_stop_at_a_refusal_and_be_started_again(tmp_path: Path) -> None:
    faults = Faults(writes_badly=[1])
    with pytest.raises(GateError, match=r"refused version 1: 100% of .*goes on from version 0$"):
        run_job(tmp_path, rounds=2, faults=faults, on_failure="stop")
    assert [version for _, _, version in gates(tmp_path)] == [0]
    run_job(tmp_path, rounds=2, faults=faults, on_failure="stop")
    assert [version for _, _, version in gates(tmp_path)] == [0, 2]


def test_more_rounds_go_on_where_a_finished_run_ended(tmp_path: Path, standing_clock: None) -> None:
    run_job(tmp_path / "at once", rounds=3)
    run_job(tmp_path / "in parts", rounds=1)
    run_job(tmp_path / "in parts", rounds=3)
    assert left_behind(tmp_path / "in parts") == left_behind(tmp_path / "at once")


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    run_job(tmp_path, rounds=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    cluster = run_job(tmp_path, rounds=1)
    assert cluster.replicas.pushed == []
    assert {path: path.read_bytes() for path in before} == before
