"""The live policy, measured: requests against vLLM's own server, pushes by phase, a long time under load.

`python benchmarks/serving.py [requests] [push] [messages] [load] [load-16M]` prints a table for each.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from serving_load import CLIENTS, load_rows
from serving_push import messages_rows, push_rows
from serving_setup import (
    PORT,
    REPLICA_PORT,
    TURNS,
    VLLM_PORT,
    Rows,
    body_of,
    publish_versions,
    serve_policy,
    spread,
    vllm_server,
)


async def requests_rows(run_dir: Path) -> Rows:
    """Requests per second of CLIENTS clients, and the time to the first token of one, by turns."""
    registry = publish_versions(run_dir, 1)
    await asyncio.to_thread(serve_policy, run_dir, replicas=1)
    ports = {"replica": REPLICA_PORT, "proxy": PORT, "vLLM": VLLM_PORT}
    rates: dict[str, list[float]] = {name: [] for name in ports}
    firsts: dict[str, list[float]] = {name: [] for name in ports}
    async with vllm_server(registry.fetch(0)):
        for turn in range(TURNS + 1):
            for name, port in ports.items():
                rate, first = await _requests_per_second(port), await _first_token_ms(port)
                if turn:  # The first one warms up.
                    rates[name].append(rate)
                    firsts[name].append(first)
    return [
        *_side_by_side("requests/s", rates),
        *_side_by_side("time to first token, ms", firsts),
    ]


def _side_by_side(what: str, measured: dict[str, list[float]]) -> Rows:
    titles = {"replica": "ours, at the replica's port", "proxy": "ours, through Serve's proxy"}
    rows = [(f"{what}, vLLM's server", f"{statistics.median(measured['vLLM']):.1f}")]
    for name, title in titles.items():
        ratios = [ours / theirs for ours, theirs in zip(measured[name], measured["vLLM"], strict=True)]
        median = statistics.median(measured[name])
        rows.append((f"{what}, {title}", f"{median:.1f}; ratio {spread(ratios)}"))
    return rows


async def _requests_per_second(port: int, *, num: int = 96) -> float:
    numbers = iter(range(num))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        async def one_client() -> None:
            for number in numbers:
                (await client.post("/v1/completions", json=body_of(number))).raise_for_status()

        begin = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
        return num / (time.perf_counter() - begin)


async def _first_token_ms(port: int, *, num: int = 15) -> float:
    waits = []
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        for number in range(num):
            begin = time.perf_counter()
            body = body_of(number, stream=True, max_tokens=2)
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data:"):
                        break
            waits.append(1000 * (time.perf_counter() - begin))
    return statistics.median(waits)


def table(title: str, rows: Rows) -> None:
    print(f"\n| {title} | measured |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |", flush=True)


MEASURED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "requests": ("16M parameters, 1 replica", requests_rows),
    "push": ("16M parameters, 2 replicas", push_rows),
    "messages": ("64 MB to 2 processes", messages_rows),
    "load": (f"5M parameters, {CLIENTS} clients for 3 minutes", partial(load_rows, size="5M")),
    "load-16M": (f"16M parameters, {CLIENTS} clients for 3 minutes", partial(load_rows, size="16M")),
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
