"""The live policy, measured: requests against vLLM's own server, pushes by phase, a long time under load.

`python benchmarks/serving.py [requests] [push] [messages] [load]` prints a Markdown table for each.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from serving_load import CLIENTS, load_rows
from serving_push import messages_rows, push_rows
from serving_setup import (
    PEER_PORT,
    PORT,
    TURNS,
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
        ("ratio, median (range)", spread(ratios)),
        ("time to first token, ours, ms", f"{statistics.median(firsts[PORT]):.1f}"),
        ("time to first token, vLLM's server, ms", f"{statistics.median(firsts[PEER_PORT]):.1f}"),
        ("ratio, median (range)", spread(waits)),
    ]


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
