"""A copy of a run, served by a process of its own: its versions go live there, and nowhere else."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml

from dpo_ray.registry import PolicyRegistry
from dpo_ray.storage import Storage

_LOG_LINES = 12
_STOP_S = 60.0
_PUSH_S = 600.0


class ServeError(Exception):
    """The copy does not answer."""


@contextmanager
def served_copy(run: Storage, versions: Sequence[int]) -> Iterator[Callable[[int], str]]:
    """What it yields makes a version live in the copy, and returns the URL where it answers."""
    with tempfile.TemporaryDirectory(prefix="dpo_ray_copy_") as folder:
        copy = Path(folder) / "run"
        copy_run(run, versions, copy)
        url, log = f"http://127.0.0.1:{_free_port()}", Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                _command(copy, url), stdout=file, stderr=file, env={**os.environ, "RAY_ADDRESS": "local"}
            )
        try:
            _wait_until_serving(process, log)
            yield lambda version: _promote(copy, url, version)
        finally:
            _stop(process)


def copy_run(run: Storage, versions: Sequence[int], copy: Path) -> None:
    """Links to the versions' files, the first one live, with one replica; of adapters also to their base."""
    registry = PolicyRegistry(run)
    (copy / "policies").mkdir(parents=True)
    for version in {0, *versions}:
        (copy / "policies" / f"v{version:05d}").symlink_to(registry.fetch(version))
    settings = yaml.safe_load(run.read_text("config.yaml")) if run.exists("config.yaml") else {}
    sampling = {**settings.get("sampling", {}), "replicas": 1, "max_replicas": None}
    (copy / "config.yaml").write_text(yaml.safe_dump({"sampling": sampling}))
    PolicyRegistry(Storage(str(copy))).promote(versions[0])


def _command(copy: Path, url: str) -> list[str]:
    port = url.rpartition(":")[2]
    return [sys.executable, "-m", "serve", f"--run_dir={copy}", f"--serving.port={port}"]


def _wait_until_serving(process: subprocess.Popen[bytes], log: Path) -> None:
    while "answers on" not in log.read_text():
        if process.poll() is not None:
            last = "\n".join(log.read_text().splitlines()[-_LOG_LINES:])
            raise ServeError(f"the copy of the run could not be served:\n{last}")
        time.sleep(0.2)


def _promote(copy: Path, url: str, version: int) -> str:
    """What is live is what the copy's registry says: its replica finds out by itself, and proves it."""
    PolicyRegistry(Storage(str(copy))).promote(version)
    deadline = time.monotonic() + _PUSH_S
    while time.monotonic() < deadline:
        for replica in httpx.get(f"{url}/v1/policy", timeout=_PUSH_S).raise_for_status().json()["replicas"]:
            if replica["state"] == "refused":
                raise ServeError(f"version {version} could not be served: {replica['reason']}")
            if replica["version"] == version:
                return f"{url}/v1"
        time.sleep(0.2)
    raise ServeError(f"version {version} was not served within {_PUSH_S:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
