"""A real Ray cluster on this machine, and jobs that run on it as a user would start them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from dpo_ray.starter import Recipe, make_starter

ROOT = Path(__file__).resolve().parents[2]
SHARED_DATA = ROOT.parent / "shared" / "data"
ACTIVATED = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
"""The environment of a shell in which the virtual environment is active."""
SMALL = (
    "--sampling.prompts_per_round=32",
    "--sampling.samples_per_prompt=4",
    "--evaluation.prompts=16",
    "--evaluation.samples_per_prompt=1",
    "--buffer.pairs_per_round=64",
    "--training.workers=1",
)
"""Settings that make a round short."""


def pytest_configure() -> None:
    """Jobs that start a cluster by themselves find none of another test process."""
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        os.environ["RAY_TMPDIR"] = f"/tmp/dpo_ray_tests_{os.getuid()}_{worker}"
        Path(os.environ["RAY_TMPDIR"]).mkdir(exist_ok=True)


class Halves(LoadScopeScheduling):
    """Two processes take as long, divided so, and one alone starts clusters with default ports."""

    def _split_scope(self, nodeid: str) -> str:
        local = ("live/", "test_commands.py", "test_submitted_job.py")
        first = nodeid.removeprefix("tests/integration/").startswith(local)
        return "first half" if first else "second half"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Halves:
    return Halves(config, log)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], object], *, timeout_s: float = 240, what: str = "") -> None:
    """Return when the condition holds; fail the test after the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s:.0f} s: {what or condition}")
        time.sleep(0.02)


@dataclass(frozen=True)
class Head:
    """`ray start --head` on this machine."""

    address: str
    dashboard: str
    pid: int
    http_port: int
    """Where its Ray Serve listens, which outlives the jobs."""

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "disabled",
            "PYTHONUNBUFFERED": "1",
        }

    def processes(self, title: str) -> list[psutil.Process]:
        """The cluster's processes whose title starts so."""
        return processes_below(self.pid, title)

    def kill(self, title: str) -> None:
        """kill -9 the last one of them."""
        wait_for(lambda: self.processes(title), what=f"a process {title}")
        self.processes(title)[-1].send_signal(signal.SIGKILL)


def processes_below(pid: int, title: str) -> list[psutil.Process]:
    """Children of a process, and theirs, whose title starts so."""
    return [p for p in psutil.Process(pid).children(recursive=True) if _title(p).startswith(title)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head node with 4 logical CPUs, for all tests of the session."""
    port, dashboard = free_port(), free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    options = [f"--dashboard-port={dashboard}", "--num-cpus=4", f"--temp-dir=/tmp/dpo_ray_test_{port}"]
    # Of these two, heads that run at the same time would take the same.
    options += [
        f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "ray-client-server-port")
    ]
    log = tmp_path_factory.mktemp("ray") / "log"
    environment = {**ACTIVATED, "RAY_AUTH_MODE": "disabled"}
    with log.open("w") as file:
        ray_start = subprocess.Popen([*command, *options], stdout=file, stderr=file, env=environment)
    wait_for(lambda: "started" in log.read_text(), what="ray start --head")
    yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", ray_start.pid, free_port())
    for process in [*psutil.Process(ray_start.pid).children(recursive=True), ray_start]:
        process.kill()
    ray_start.wait()


@pytest.fixture(scope="session")
def starter() -> Path:
    """A barely trained policy of film reviews: enough for rewards to differ."""
    return make_starter(0, lambda step, total, loss: None, recipe=Recipe(steps=150))


def start_job(
    script: str, arguments: Sequence[str], log: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """A job as a process of its own, in a session of its own."""
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, script, *arguments],
            stdout=file,
            stderr=file,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )


def run_job(script: str, arguments: Sequence[str], log: Path, environment: dict[str, str]) -> None:
    """Run a job to its end; a failure shows its log."""
    job = start_job(script, arguments, log, environment)
    assert job.wait(timeout=600) == 0, log.read_text()[-6000:]


def metric_rows(run_dir: Path, kind: str) -> list[dict]:
    """The rows of metrics.jsonl of one kind."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def check_run_folder(run_dir: Path, *, rounds: int) -> None:
    """Assert what must hold of every finished run: versions, snapshots, pairs and rows belong together."""
    versions = sorted(p.name for p in (run_dir / "policies").iterdir() if p.is_dir())
    assert versions == [f"v{version:05d}" for version in range(rounds + 1)]
    assert (run_dir / "policies" / "LIVE").read_text().strip() == str(rounds)
    assert [row["round"] for row in metric_rows(run_dir, "round")] == list(range(rounds))
    made = 0
    for round_ in range(rounds):
        made += _check_round(run_dir, round_)
    engine = sa.create_engine(f"sqlite:///{run_dir}/buffer.sqlite")
    with engine.connect() as connection:
        ids = connection.execute(sa.text("select pair_id from pairs")).scalars().all()
    engine.dispose()
    assert len(ids) == len(set(ids)) == made
    assert "<html" in (run_dir / "report.html").read_text()


def _check_round(run_dir: Path, round_: int) -> int:
    """The pairs that the round made."""
    import hashlib

    folder = run_dir / "rounds" / f"{round_:05d}"
    declared = json.loads((folder / "manifest.json").read_text())
    policy = json.loads((run_dir / "policies" / f"v{round_ + 1:05d}" / "manifest.json").read_text())
    content = (folder / "pairs.parquet").read_bytes()
    assert declared["sha256"] == hashlib.sha256(content).hexdigest() == policy["snapshot"]["sha256"]
    assert pq.read_table(folder / "pairs.parquet").num_rows == declared["rows"] == policy["snapshot"]["rows"]
    row = metric_rows(run_dir, "round")[round_]
    steps = [step["step"] for step in metric_rows(run_dir, "step") if step["round"] == round_]
    assert steps == list(range(row["step"] - len(steps) + 1, row["step"] + 1))
    return row["pairs/made"]
