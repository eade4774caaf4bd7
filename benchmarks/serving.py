"""The live policy, measured: requests against vLLM's own server, pushes by phase, a long time under load.

`python benchmarks/serving.py [requests] [push] [load]` prints a Markdown table for each.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from learner_setup import SIZES, make_model

PORT, PEER_PORT = 8124, 8125
CLIENTS = 16
TURNS = 7
PUSHES = 20
Rows = list[tuple[str, str]]


def publish_versions(run_dir: Path, num: int) -> Any:
    """Versions of a 16M-parameter model with other weights each; version 0 is live."""
    from dpo_ray.logprobs import CompletionScorer
    from dpo_ray.models import load_model, load_tokenizer, make_canaries, save_policy
    from dpo_ray.registry import PolicyManifest, PolicyRegistry
    from dpo_ray.storage import Storage

    start = make_model(run_dir / "start", SIZES["16M"])
    registry = PolicyRegistry(Storage(str(run_dir / "run")))
    sequences = [[5 + n * 7 + i * 13 for i in range(40)] for n in range(4)]
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
    """The handle of our deployment, which answers on PORT."""
    from ray import serve

    from dpo_ray.config import SamplingConfig, ServingConfig
    from dpo_ray.machines import connect
    from serve.deployment import deploy, wait_until_serving
    from serve.settings import ReplicaSettings

    connect()
    sampling = SamplingConfig(replicas=replicas, cpus_per_replica=0.5, cpu_kv_cache_mib=256)
    serving = ServingConfig(port=PORT, requests_per_minute=10**6)
    name = deploy(str(run_dir / "run"), ReplicaSettings(sampling, serving))
    wait_until_serving(name)
    return serve.get_app_handle(name)


@asynccontextmanager
async def vllm_server(folder: Path) -> AsyncIterator[None]:
    """vLLM's own server on PEER_PORT, with the settings that our engine has."""
    from serve.deployment import CPU_ENV

    options = ["--model", str(folder), "--served-model-name", "policy", "--port", str(PEER_PORT)]
    options += ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-num-seqs", "256"]
    options += ["--kv-cache-memory-bytes", str(256 << 20), "--no-enable-chunked-prefill"]
    options += ["--distributed-executor-backend", "uni", "--uvicorn-log-level", "warning"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
    log = open(folder.parent / "vllm.log", "w")  # noqa: SIM115
    process = subprocess.Popen(command, env={**os.environ, **CPU_ENV}, stdout=log, stderr=log)
    try:
        async with httpx.AsyncClient() as client:
            while True:
                assert process.poll() is None, (folder.parent / "vllm.log").read_text()[-3000:]
                try:
                    if (await client.get(f"http://127.0.0.1:{PEER_PORT}/health")).is_success:
                        break
                except httpx.HTTPError:
                    await asyncio.sleep(0.5)
        yield
    finally:
        process.kill()


async def requests_rows(run_dir: Path) -> Rows:
    """Requests per second of CLIENTS clients, and the time to the first token of one, by turns."""
    registry = publish_versions(run_dir, 1)
    await asyncio.to_thread(serve_policy, run_dir, replicas=1)
    rates: dict[int, list[float]] = {PORT: [], PEER_PORT: []}
    firsts: dict[int, list[float]] = {PORT: [], PEER_PORT: []}
    async with vllm_server(registry.fetch(0)):
        for turn in range(TURNS + 1):
            for port in (PORT, PEER_PORT):
                rate, first = await _requests_per_second(port), await _first_token_ms(port)
                if turn:  # The first one warms up.
                    rates[port].append(rate)
                    firsts[port].append(first)
    ratios = [a / b for a, b in zip(rates[PORT], rates[PEER_PORT], strict=True)]
    waits = [a / b for a, b in zip(firsts[PORT], firsts[PEER_PORT], strict=True)]
    return [
        ("requests/s, ours", f"{statistics.median(rates[PORT]):.1f}"),
        ("requests/s, vLLM's server", f"{statistics.median(rates[PEER_PORT]):.1f}"),
        ("ratio, median (range)", _spread(ratios)),
        ("time to first token, ours, ms", f"{statistics.median(firsts[PORT]):.1f}"),
        ("time to first token, vLLM's server, ms", f"{statistics.median(firsts[PEER_PORT]):.1f}"),
        ("ratio, median (range)", _spread(waits)),
    ]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def _body(number: int, **fields: Any) -> dict[str, Any]:
    prompt = [3 + (number * 31 + i * 17) % 8000 for i in range(32)]
    return {"model": "policy", "prompt": prompt, "max_tokens": 32, "ignore_eos": True, **fields}


async def _requests_per_second(port: int, *, num: int = 96) -> float:
    numbers = iter(range(num))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        async def one_client() -> None:
            for number in numbers:
                (await client.post("/v1/completions", json=_body(number))).raise_for_status()

        begin = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
        return num / (time.perf_counter() - begin)


async def _first_token_ms(port: int, *, num: int = 15) -> float:
    waits = []
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        for number in range(num):
            begin = time.perf_counter()
            body = _body(number, stream=True, max_tokens=2)
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data:"):
                        break
            waits.append(1000 * (time.perf_counter() - begin))
    return statistics.median(waits)


def push_rows(run_dir: Path) -> Rows:
    """Pushes of a 16M-parameter model in fp32 to two replicas, next to two copies of its bytes."""
    registry = publish_versions(run_dir, 2)
    handle = serve_policy(run_dir, replicas=2)
    file = next(registry.fetch(1).glob("*.safetensors"))
    weights = np.fromfile(file, dtype=np.uint8)
    totals, copies, phases = [], [], []
    for turn in range(2 * TURNS):
        registry.promote((turn + 1) % 2)
        begin = time.perf_counter()
        states = handle.broadcast("converge").results()
        totals.append(1000 * (time.perf_counter() - begin))
        phases += [state.push_ms for state in states]
        begin = time.perf_counter()
        weights.copy().copy()
        copies.append(1000 * (time.perf_counter() - begin))
    push, copy = statistics.median(totals), statistics.median(copies)
    named = [(f"… {name}, ms", f"{statistics.median(p[name] for p in phases):.0f}") for name in phases[0]]
    return [
        (
            f"push of {weights.nbytes / 1e6:.0f} MB to 2 replicas, proven, ms",
            f"{push:.0f} ({min(totals):.0f} at best)",
        ),
        *named,
        ("two copies of the bytes in memory, ms", f"{copy:.0f} ({push / copy:.1f} times less)"),
    ]


@dataclass(slots=True)
class Load:
    """What the clients of a long time under load have seen."""

    requests: int = 0
    failed: list[str] = field(default_factory=list)
    short: int = 0
    """Answers with fewer tokens than asked for."""
    backwards: int = 0
    """Answers of an older version than one before, in one client's sequence."""
    gaps_ms: list[float] = field(default_factory=list)
    """Longest time between two chunks of each stream."""


async def load_rows(run_dir: Path, *, seconds: float = 180.0) -> Rows:
    """CLIENTS clients, half of them streaming, while versions change PUSHES times."""
    registry = publish_versions(run_dir, 2)
    handle = await asyncio.to_thread(serve_policy, run_dir, replicas=1)
    load, deadline = Load(), time.monotonic() + seconds
    clients = [asyncio.create_task(_client(load, number, deadline)) for number in range(CLIENTS)]
    pushes = []
    for version in range(1, PUSHES + 1):
        await asyncio.sleep(seconds / (PUSHES + 1))
        _publish_copy(registry, version)
        registry.promote(version)
        begin = time.perf_counter()
        await handle.broadcast("converge").results_async()
        pushes.append(1000 * (time.perf_counter() - begin))
    await asyncio.gather(*clients)
    gaps = sorted(load.gaps_ms)
    return [
        ("requests", str(load.requests)),
        ("failed", f"{len(load.failed)} {load.failed[:3] or ''}"),
        ("with fewer tokens than asked for", str(load.short)),
        ("of an older version than the answer before", str(load.backwards)),
        (f"{PUSHES} pushes, median and longest, ms", f"{statistics.median(pushes):.0f}, {max(pushes):.0f}"),
        (
            "longest gap in a stream, median, 99 %, longest, ms",
            f"{statistics.median(gaps):.0f}, {gaps[int(0.99 * len(gaps))]:.0f}, {gaps[-1]:.0f}",
        ),
    ]


def _publish_copy(registry: Any, version: int) -> None:
    """The weights of version 0 or 1 once more, as another version."""
    if registry.has(version):
        return
    manifest = registry.manifest(version % 2)
    registry.publish(registry.fetch(version % 2), manifest.model_copy(update={"version": version}))


async def _client(load: Load, number: int, deadline: float) -> None:
    last = 0
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client:
        while time.monotonic() < deadline:
            load.requests += 1
            try:
                ask = _stream if number % 2 else _whole
                versions, tokens = await ask(client, _body(load.requests, max_tokens=64), load)
            except (httpx.HTTPError, KeyError, ValueError) as error:
                load.failed.append(repr(error))
                continue
            load.short += tokens != 64
            load.backwards += versions != sorted(versions) or versions[0] < last
            last = versions[-1]


async def _whole(client: httpx.AsyncClient, body: dict[str, Any], load: Load) -> tuple[list[int], int]:
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    content = answer.json()
    spans = content["policy_version_spans"]
    return [span["version"] for span in spans], content["usage"]["completion_tokens"]


async def _stream(client: httpx.AsyncClient, body: dict[str, Any], load: Load) -> tuple[list[int], int]:
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    spans, tokens, gap, seen = [], 0, 0.0, time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        first = True
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.perf_counter()
            gap, seen, first = (gap if first else max(gap, now - seen)), now, False
            chunk = json.loads(line.removeprefix("data: "))
            spans = chunk.get("policy_version_spans", spans)
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    load.gaps_ms.append(1000 * gap)
    return [span["version"] for span in spans], tokens


def table(title: str, rows: Rows) -> None:
    print(f"\n| {title} | measured |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |", flush=True)


MEASURED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "requests": ("16M parameters, 1 replica", requests_rows),
    "push": ("16M parameters, 2 replicas", push_rows),
    "load": (f"16M parameters, {CLIENTS} clients for 3 minutes", load_rows),
}


def main() -> None:
    """Measure what is named on the command line, or everything, each in a process of its own."""
    names = sys.argv[1:] or list(MEASURED)
    if len(names) > 1:
        for name in names:
            subprocess.run([sys.executable, __file__, name], check=True)
        return
    title, measure = MEASURED[names[0]]
    run_dir = Path(tempfile.mkdtemp(prefix="dpo_ray_serving_"))
    rows = measure(run_dir)
    table(title, asyncio.run(rows) if asyncio.iscoroutine(rows) else rows)
    os._exit(0)  # The local cluster ends with this process.


if __name__ == "__main__":
    main()
