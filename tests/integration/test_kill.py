"""Kill -9 of anything at any phase: the job goes on, with the same versions and pairs."""

import signal
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.integration.conftest import (
    SMALL,
    Head,
    check_run_folder,
    metric_rows,
    run_job,
    start_job,
    wait_for,
)

JOB = "jobs/iterative_dpo.py"


def arguments(run_dir: Path, model: Path, rounds: int, port: int) -> Sequence[str]:
    run = (f"--run_dir={run_dir}", f"--model={model}", f"--rounds={rounds}")
    return (*run, f"--serving.port={port}", *SMALL)


def in_round(run_dir: Path, round_: int, file: str = "") -> bool:
    """Whether a round has begun, or has left a file already."""
    begun = len(metric_rows(run_dir, "round")) == round_ and bool(metric_rows(run_dir, "start"))
    return (run_dir / "rounds" / f"{round_:05d}" / file).exists() if file else begun


def test_job_outlives_the_death_of_each_of_its_parts(head: Head, starter: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [*arguments(run_dir, starter, 5, head.http_port), "--training.workers=2"]
    job = start_job(JOB, command, tmp_path / "log", head.environment)
    deaths = [
        (0, "manifest.json", "ray::RayTrainWorker"),  # A rank, while it trains.
        (1, "", "ray::PreferenceBuffer"),  # The buffer, before it is needed again.
        (2, "", "ray::ServeReplica:"),  # The replica, while it samples.
        (3, "", "VLLM::EngineCore"),  # Its engine, while it samples.
        (4, "samples.jsonl", "ray::PreferenceBuffer"),  # The buffer, while it keeps pairs.
    ]
    for round_, file, title in deaths:
        wait_for(
            lambda round_=round_, file=file: in_round(run_dir, round_, file) or job.poll() is not None,
            what=f"round {round_}",
        )
        assert job.poll() is None, (tmp_path / "log").read_text()[-6000:]
        engines = head.processes("VLLM::EngineCore")
        head.kill(title)
        if title == "ray::ServeReplica:":
            psutil.wait_procs(engines, timeout=30)
            assert not any(engine.is_running() for engine in engines)  # None keeps memory from its successor.
    assert job.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-6000:]
    check_run_folder(run_dir, rounds=5)


def test_killed_driver_goes_on_when_it_is_run_again(head: Head, starter: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = arguments(run_dir, starter, 2, head.http_port)
    deaths = [
        "rounds/00000/manifest.json",  # It trains.
        "policies/v00001/manifest.json",  # It pushes.
    ]
    for marker in deaths:
        job = start_job(JOB, command, log, head.environment)
        wait_for(
            lambda marker=marker, job=job: (run_dir / marker).exists() or job.poll() is not None, what=marker
        )
        assert job.poll() is None, log.read_text()[-6000:]
        job.send_signal(signal.SIGKILL)
        job.wait()
    run_job(JOB, command, log, head.environment)
    check_run_folder(run_dir, rounds=2)
