"""What the measurements of the live policy share: versions of a model, our deployment, vLLM's own server."""

import asyncio
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from learner_setup import SIZES, make_model

PORT, REPLICA_PORT, VLLM_PORT = 8124, 8126, 8125
TURNS = 7
Rows = list[tuple[str, str]]


def publish_versions(run_dir: Path, num: int, *, size: str = "16M") -> Any:
    """Versions of a model with other weights each; version 0 is live."""
    from dpo_ray.logprobs import CompletionScorer
    from dpo_ray.models import load_model, load_tokenizer, make_canaries, save_policy
    from dpo_ray.registry import PolicyManifest, PolicyRegistry
    from dpo_ray.storage import Storage

    start = make_model(run_dir / "start", SIZES[size])
    registry = PolicyRegistry(Storage(str(run_dir / "run")))
    sequences = [[5 + n * 7 + i * 13 for i in range(34)] for n in range(2)]
    model = load_model(start)
    for version in range(num):
        folder = run_dir / f"model{version}"
        save_policy(model, load_tokenizer(start), folder)
        canaries = make_canaries(CompletionScorer(model, flat=True), sequences)
        registry.publish(folder, PolicyManifest(version=version, canaries=canaries))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.001)
    registry.promote(0)
    return registry


def serve_policy(run_dir: Path, *, replicas: int) -> Any:
    """The handle of our deployment, which answers on PORT and REPLICA_PORT."""
    from ray import serve

    from dpo_ray.config import SamplingConfig, ServingConfig
    from dpo_ray.machines import connect
    from serve.deployment import deploy, wait_until_serving
    from serve.settings import ReplicaSettings

    connect()
    sampling = SamplingConfig(replicas=replicas, cpus_per_replica=0.5, cpu_kv_cache_mib=256)
    serving = ServingConfig(port=PORT, replica_port=REPLICA_PORT, requests_per_minute=10**6)
    name = deploy(str(run_dir / "run"), ReplicaSettings(sampling, serving))
    wait_until_serving(name)
    return serve.get_app_handle(name)


@asynccontextmanager
async def vllm_server(folder: Path) -> AsyncIterator[None]:
    """vLLM's own server on VLLM_PORT, with the settings that our engine has."""
    from dpo_ray.config import SamplingConfig
    from serve.deployment import engine_environment

    options = ["--model", str(folder), "--served-model-name", "policy", "--port", str(VLLM_PORT)]
    options += ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-num-seqs", "256"]
    options += ["--kv-cache-memory-bytes", str(256 << 20), "--no-enable-chunked-prefill"]
    options += ["--distributed-executor-backend", "uni", "--uvicorn-log-level", "warning"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
    log = open(folder.parent / "vllm.log", "w")  # noqa: SIM115
    environment = {**os.environ, **engine_environment(SamplingConfig())}
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        async with httpx.AsyncClient() as client:
            while True:
                assert process.poll() is None, (folder.parent / "vllm.log").read_text()[-3000:]
                try:
                    if (await client.get(f"http://127.0.0.1:{VLLM_PORT}/health")).is_success:
                        break
                except httpx.HTTPError:
                    await asyncio.sleep(0.5)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # Its engine too, which would stay.


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def body_of(number: int, **fields: Any) -> dict[str, Any]:
    prompt = [3 + (number * 31 + i * 17) % 4000 for i in range(32)]
    return {"model": "policy", "prompt": prompt, "max_tokens": 32, "ignore_eos": True, **fields}
