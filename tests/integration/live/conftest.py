"""Two replicas of a live policy, served as a user serves a run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from dpo_ray.logprobs import CompletionScorer
from dpo_ray.models import load_model, load_tokenizer, make_canaries, save_policy
from dpo_ray.registry import PolicyManifest, PolicyRegistry
from dpo_ray.storage import Storage
from serve.tokens import Tokens
from tests.integration.conftest import ROOT, free_port, wait_for

CANARIES = [[5, 9, 12, 7, 30, 4, 8, 11] * 5, [6, 6, 6, 40, 41, 42, 43, 44]]
VERSIONS = 4
"""The last one is not what its canaries say."""


@dataclass(frozen=True)
class Service:
    """What a client knows of it."""

    run_dir: Path
    port: int
    replica_port: int
    """Where replicas answer without Ray Serve's proxy."""
    admin: str
    user: str
    labelers: tuple[str, str]
    """Tokens of lea and lou."""
    pid: int
    """Of `python -m serve`, whose children are Ray's processes."""

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def registry(self) -> PolicyRegistry:
        return PolicyRegistry(Storage(str(self.run_dir)))

    def client(self, *, admin: bool = False) -> httpx.Client:
        token = self.admin if admin else self.user
        return httpx.Client(base_url=self.base_url, headers={"authorization": f"Bearer {token}"}, timeout=60)

    def policy(self) -> dict[str, Any]:
        with self.client() as client:
            return client.get("/v1/policy").raise_for_status().json()


def publish_versions(starter: Path, folder: Path, run_dir: Path) -> None:
    """Version 0 is the starter, and live; each further one has other weights."""
    registry = PolicyRegistry(Storage(str(run_dir)))
    model, canaries = load_model(starter), []
    for version in range(VERSIONS):
        if version < VERSIONS - 1:
            canaries = make_canaries(CompletionScorer(model, flat=True), CANARIES)
        save_policy(model, load_tokenizer(starter), folder / str(version))
        registry.publish(folder / str(version), PolicyManifest(version=version, canaries=canaries))
        torch.manual_seed(version)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    registry.promote(0)


@pytest.fixture(scope="package")
def service(starter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    run_dir, port, replica_port = tmp_path_factory.mktemp("live") / "run", free_port(), free_port()
    publish_versions(starter, tmp_path_factory.mktemp("models"), run_dir)
    sampling = {"replicas": 2, "cpus_per_replica": 0.5}
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"sampling": sampling}))
    tokens = Tokens(Storage(str(run_dir)))
    admin, user = tokens.add("ada", role="admin"), tokens.add("uma", role="user")
    labelers = tokens.add("lea", role="labeler"), tokens.add("lou", role="labeler")
    environment = {n: v for n, v in os.environ.items() if n != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    log = run_dir / "serve.log"
    with log.open("w") as file:
        ports = [f"--serving.port={port}", f"--serving.replica_port={replica_port}"]
        command = [sys.executable, "-m", "serve", f"--run_dir={run_dir}", *ports]
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT)
    wait_for(lambda: "answers on" in log.read_text() or process.poll() is not None, what="python -m serve")
    assert process.poll() is None, log.read_text()[-6000:]
    service = Service(run_dir, port, replica_port, admin, user, labelers, process.pid)
    wait_for(lambda: len(service.policy()["replicas"]) == 2, what="two replicas")
    yield service
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()


@pytest.fixture
def live(service: Service) -> Iterator[Service]:
    """Version 0 is live, before and after a test."""
    yield service
    if service.policy()["version"] != 0 or service.policy()["candidate"]:
        with service.client(admin=True) as client:
            client.post(
                "/v1/policy/promote", json={"version": 0, "reason": "end of a test"}
            ).raise_for_status()
    deadline = time.monotonic() + 60
    while {state["state"] for state in service.policy()["replicas"]} != {"serving"}:
        assert time.monotonic() < deadline
        time.sleep(0.2)
