"""A long time under load: clients of all kinds while versions change."""

import asyncio
import gc
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from serving_setup import REPLICA_PORT, Rows, body_of, publish_versions, serve_policy

CLIENTS = 16
PUSHES = 20


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


async def load_rows(run_dir: Path, *, size: str, seconds: float = 180.0) -> Rows:
    """CLIENTS clients, half of them streaming, while PUSHES versions, of two weights by turns, go live."""
    registry = publish_versions(run_dir, 2, size=size)
    for version in range(2, PUSHES + 1):
        manifest = registry.manifest(version % 2)
        registry.publish(registry.fetch(version % 2), manifest.model_copy(update={"version": version}))
    handle = await asyncio.to_thread(serve_policy, run_dir, replicas=1)
    gc.collect()
    gc.freeze()  # A collection of all that is imported here would hold the clients for half a second.
    load, deadline = Load(), time.monotonic() + seconds
    clients = [asyncio.create_task(_client(load, number, deadline)) for number in range(CLIENTS)]
    pushes = []
    for version in range(1, PUSHES + 1):
        await asyncio.sleep(seconds / (PUSHES + 1))
        await asyncio.to_thread(registry.promote, version)  # The clients' clocks do not stand still.
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


async def _client(load: Load, number: int, deadline: float) -> None:
    last = 0
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{REPLICA_PORT}", timeout=60) as client:
        while time.monotonic() < deadline:
            load.requests += 1
            try:
                ask = _stream if number % 2 else _whole
                versions, tokens = await ask(client, body_of(load.requests, max_tokens=64), load)
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
