"""What a push costs: by phase, up to the first token of the new version, and as one message or as many."""

import asyncio
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import torch.distributed as dist
from serving_setup import PORT, TURNS, Rows, body_of, publish_versions, serve_policy, spread

TENSORS = 399
"""Of a Qwen3 of eight billion parameters."""
BYTES = 64 << 20
RECEIVERS = 2


def push_rows(run_dir: Path) -> Rows:
    """Pushes of a 16M-parameter model in fp32 to two replicas, next to two copies of its bytes."""
    registry = publish_versions(run_dir, 2)
    handle = serve_policy(run_dir, replicas=RECEIVERS)
    weights = np.fromfile(next(registry.fetch(1).glob("*.safetensors")), dtype=np.uint8)
    totals, copies, phases = [], [], []
    for turn in range(2 * TURNS + 1):
        registry.promote((turn + 1) % 2)
        begin = time.perf_counter()
        states = handle.broadcast("converge").results()
        total = _ms_since(begin)
        begin = time.perf_counter()
        weights.copy().copy()
        if turn:  # The first one warms up.
            totals.append(total)
            copies.append(_ms_since(begin))
            phases += [state.push_ms for state in states]
    push, copy = statistics.median(totals), statistics.median(copies)
    named = [(f"… {name}, ms", f"{statistics.median(p[name] for p in phases):.0f}") for name in phases[0]]
    return [
        (
            f"push of {weights.nbytes / 1e6:.0f} MB to {RECEIVERS} replicas, proven, ms",
            f"{push:.0f} ({min(totals):.0f}–{max(totals):.0f})",
        ),
        *named,
        ("two copies of the bytes in memory, ms", f"{copy:.0f} ({push / copy:.1f} times less)"),
        *asyncio.run(_first_token_rows(registry, handle)),
    ]


def _ms_since(begin: float) -> float:
    return 1000 * (time.perf_counter() - begin)


async def _first_token_rows(registry: Any, handle: Any) -> Rows:
    """How long after a push that is proven a running stream gets a token of the new version."""
    waits, steps = [], []
    for turn in range(TURNS):
        streams = [asyncio.create_task(_arrivals(number)) for number in range(2 * RECEIVERS)]
        await asyncio.sleep(0.5)
        registry.promote((turn + 1) % 2)
        await handle.broadcast("converge").results_async()
        proven = time.perf_counter()
        for arrivals, spans in await asyncio.gather(*streams):
            if len(spans) > 1:
                waits.append(1000 * (arrivals[spans[-1]["start"]] - proven))
            steps.append(1000 * statistics.median(np.diff(arrivals)))
    step = statistics.median(steps)
    return [
        ("a decode step of 2 streams, ms", f"{step:.1f}"),
        (
            "proven everywhere → a stream's first token of the new version, ms",
            f"{statistics.median(waits):.1f} ({min(waits):.1f}–{max(waits):.1f})",
        ),
    ]


async def _arrivals(number: int) -> tuple[list[float], list[dict[str, int]]]:
    """When each token of a stream arrived, and which version made which tokens."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = body_of(number, max_tokens=400, stream=True, stream_options=options)
    arrivals: list[float] = []
    spans: list[dict[str, int]] = []
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                num = chunk["usage"]["completion_tokens"]
                arrivals += [time.perf_counter()] * (num - len(arrivals))
                spans = chunk.get("policy_version_spans", spans)
    return arrivals, spans


def messages_rows(run_dir: Path) -> Rows:
    """The same bytes to two processes as one message, and as a call and a broadcast for each tensor."""
    import ray

    from dpo_ray.machines import connect

    connect()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    remote: Any = ray.remote(num_cpus=0.5)(Receiver)
    receivers = [remote.remote(store.port, rank + 1) for rank in range(RECEIVERS)]
    group = _group(store, 0)
    tensors = list(torch.zeros(BYTES, dtype=torch.uint8).chunk(TENSORS))
    packed = torch.zeros(BYTES, dtype=torch.uint8)

    def send(parts: list[torch.Tensor]) -> float:
        begin = time.perf_counter()
        for part in parts:
            calls = [each.receive.remote(part.numel()) for each in receivers]
            group.broadcast(part, 0).wait()
            ray.get(calls)
        return _ms_since(begin)

    took: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, Callable[[], float]] = {"one": lambda: send([packed]), "many": lambda: send(tensors)}
    for turn in range(TURNS + 1):
        for name, measure in kinds.items():
            if milliseconds := measure() * bool(turn):
                took[name].append(milliseconds)
    ratios = [many / one for many, one in zip(took["many"], took["one"], strict=True)]
    return [
        ("1 message, ms", f"{statistics.median(took['one']):.0f}"),
        (f"{len(tensors)} messages, one per tensor, ms", f"{statistics.median(took['many']):.0f}"),
        ("ratio, median (range)", spread(ratios)),
    ]


def _group(store: Any, rank: int) -> Any:
    return dist.ProcessGroupGloo(store, rank, RECEIVERS + 1, timedelta(seconds=60))


class Receiver:
    """Takes tensors as they are announced, as a sampler's process would."""

    def __init__(self, port: int, rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
        self._group = _group(store, rank)

    def receive(self, num_bytes: int) -> None:
        self._group.broadcast(torch.empty(num_bytes, dtype=torch.uint8), 0).wait()
