"""`python -m serve --run_dir RUN`: the live policy of a run over HTTP, until it is stopped."""

import os
import signal
import sys
import threading
from typing import Any

import yaml

from dpo_ray.config import (
    BufferConfig,
    SamplingConfig,
    ServeConfig,
    ServingConfig,
    VotesConfig,
    exit_with,
    parse_config,
)
from serve.settings import ReplicaSettings


def main(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM."""
    from ray import serve

    from dpo_ray.machines import connect
    from dpo_ray.registry import PolicyRegistry
    from dpo_ray.storage import Storage
    from serve.deployment import deploy, http_address, wait_until_serving
    from serve.guard import check_environment, check_exposure

    storage = Storage(config.run_dir)
    live = PolicyRegistry(storage).live()
    if live is None or not storage.exists("config.yaml"):
        exit_with(f"--run_dir {config.run_dir} has no live policy: run jobs/iterative_dpo.py there first")
    settings = _settings(yaml.safe_load(storage.read_text("config.yaml")), config.serving)
    try:
        check_environment(os.environ)
        check_exposure(config.run_dir, config.serving)
        connect()
        name = deploy(config.run_dir, settings)
        wait_until_serving(name)
    except ValueError as error:
        exit_with(str(error))
    print(
        f"policy version {live} of {storage.root} answers on {http_address()}/v1 (Ctrl-C stops it)",
        flush=True,
    )
    _wait_for_a_signal()
    print("requests under way are finished (Ctrl-C again ends them)", flush=True)
    serve.delete(name)


def _wait_for_a_signal() -> None:
    """Return at the first SIGINT or SIGTERM; a second one does what it always does."""
    stopped = threading.Event()
    before = {name: signal.signal(name, lambda *_: stopped.set()) for name in (signal.SIGINT, signal.SIGTERM)}
    while not stopped.wait(0.5):  # A signal that another thread got does not end a longer wait.
        pass
    for name, handler in before.items():
        signal.signal(name, handler)


def _settings(run: dict[str, Any], serving: ServingConfig) -> ReplicaSettings:
    """Of the run, which may be older than some of its settings."""
    return ReplicaSettings(
        sampling=SamplingConfig(**run.get("sampling", {})),
        serving=serving,
        votes=VotesConfig(**run.get("votes", {})),
        buffer=BufferConfig(**run.get("buffer", {})),
    )


if __name__ == "__main__":
    main(parse_config(ServeConfig, sys.argv[1:]))
