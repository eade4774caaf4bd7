"""The default run, timed: phases, sampling through Serve against the bare engine, pushes, start-up.

`python benchmarks/loop.py [--run_dir DIR]` prints a Markdown table. Run it on a quiet machine.
"""

import argparse
import asyncio
import contextlib
import json
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
import numpy as np
import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
PORT = 8123
REPEATS = 7
Rows = list[tuple[str, str]]


def run_default(run_dir: str) -> Rows:
    """Times from the start of the command, and the memory of all processes that it started."""
    command = [sys.executable, "jobs/iterative_dpo.py", "--run_dir", run_dir, "--serving.port", str(PORT)]
    started = time.perf_counter()
    job = subprocess.Popen(command, cwd=ROOT)
    first, peak = None, 0
    while job.poll() is None:
        if first is None and _answers():
            first = time.perf_counter() - started
        time.sleep(0.2 if first is None else 15.0)  # Reading the memory costs the run time
        peak = max(peak, 0 if first is None else _memory(job.pid))
    if job.returncode != 0 or first is None:
        raise SystemExit("the default run failed")
    return [
        ("command to first sampled token, s", f"{first:.1f}"),
        ("whole run, s", f"{time.perf_counter() - started:.1f}"),
        ("peak memory of all processes, shared pages counted once, GB", f"{peak / 1e9:.1f}"),
    ]


def _memory(pid: int) -> int:
    """Proportional set sizes of a process and its descendants, in bytes."""
    total = 0
    parent = psutil.Process(pid)
    for process in [parent, *parent.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def _answers() -> bool:
    request = {"model": "policy", "prompt": "the film", "max_tokens": 1}
    try:
        return httpx.post(f"http://127.0.0.1:{PORT}/v1/completions", json=request, timeout=5).is_success
    except httpx.HTTPError:
        return False


def phase_rows(run_dir: Path) -> Rows:
    """Median seconds of each phase of a steady round, and the share in which nothing computes."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    rounds = [row for row in lines if row["kind"] == "round"][1:]  # The first one warms up.
    names = [name for name in rounds[0] if name.startswith("time/")]
    medians = {name: statistics.median(row[name] for row in rounds) for name in names}
    working = ("time/sample_s", "time/train_s", "time/evaluate_s")
    idle = [1 - sum(row[name] for name in working) / row["time/round_s"] for row in rounds]
    table = [
        (f"{name.removeprefix('time/').removesuffix('_s')}, s", f"{value:.2f}")
        for name, value in medians.items()
    ]
    return [*table, ("share of a round without sampler and trainer", f"{statistics.median(idle):.1%}")]


async def compare_sampling(run_dir: Path) -> Rows:
    """Completions per second through Serve and from the same engine in this process, by turns; pushes."""
    from ray import serve as ray_serve

    from dpo_ray.config import SamplingConfig, ServingConfig
    from dpo_ray.film_reviews import generate_prompts
    from dpo_ray.machines import connect
    from dpo_ray.models import load_tokenizer
    from dpo_ray.registry import PolicyRegistry
    from dpo_ray.sampler import Sampler
    from dpo_ray.storage import Storage
    from dpo_ray.types import Prompt
    from serve.deployment import deploy, engine_environment, wait_until_serving
    from serve.settings import ReplicaSettings

    config = SamplingConfig(**yaml.safe_load((run_dir / "config.yaml").read_text())["sampling"])
    os.environ.update(engine_environment(config))
    from serve.engine import PolicyEngine

    registry = PolicyRegistry(Storage(str(run_dir)))
    connect()
    name = deploy(str(run_dir), ReplicaSettings(config, ServingConfig(port=PORT)))
    wait_until_serving(name)
    sampler = Sampler(ray_serve.get_app_handle(name), replicas=config.replicas)
    engine = await PolicyEngine.start(registry, config)
    tokenizer = load_tokenizer(registry.fetch(0))
    prompts = [Prompt(text, tuple(tokenizer(text).input_ids)) for text in generate_prompts(128, seed=1)]
    params = {"n": 8, "temperature": 1.0, "max_tokens": config.max_new_tokens}

    def through_serve() -> int:
        return len(sampler.sample(prompts, params, seed="bench"))

    async def directly() -> int:
        outputs = await engine.sample([p.token_ids for p in prompts], list(range(len(prompts))), params)
        return sum(len(output.outputs) for output in outputs)

    await directly()
    served, direct = [], []
    for _ in range(REPEATS):
        served.append(await _rate(lambda: asyncio.to_thread(through_serve)))
        direct.append(await _rate(directly))
    ratios = [ours / bare for ours, bare in zip(served, direct, strict=True)]
    return [
        ("completions/s through Serve", f"{statistics.median(served):.0f}"),
        ("completions/s of the bare engine", f"{statistics.median(direct):.0f}"),
        (
            "ratio, median of pairs",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        ),
        *await asyncio.to_thread(_push_rows, registry, sampler, run_dir),
    ]


async def _rate(sample: Callable[[], Any]) -> float:
    started = time.perf_counter()
    completions = await sample()
    return completions / (time.perf_counter() - started)


def _push_rows(registry: Any, sampler: Any, run_dir: Path) -> Rows:
    """Pushes between the last two versions, beside two copies of the same bytes in memory."""
    live = registry.live()
    weights = np.fromfile(run_dir / f"policies/v{live:05d}/model.safetensors", dtype=np.uint8)
    pushes, copies = [], []
    for turn in range(2 * REPEATS):
        registry.promote(live - 1 + turn % 2)
        started = time.perf_counter()
        sampler.push(live - 1 + turn % 2)
        pushes.append(time.perf_counter() - started)
        started = time.perf_counter()
        weights.copy().copy()
        copies.append(time.perf_counter() - started)
    push, copy = statistics.median(pushes), statistics.median(copies)
    return [
        (f"push of {weights.nbytes / 1e6:.1f} MB, proven, ms", f"{push * 1e3:.0f}"),
        ("the same bytes copied twice in memory, ms", f"{copy * 1e3:.1f} ({push / copy:.0f} times less)"),
    ]


def main() -> None:
    """Run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run_dir", default=None, help="folder of the timed run (default: a new one)")
    run_dir = parser.parse_args().run_dir or f"{tempfile.mkdtemp(prefix='dpo_ray_loop_')}/run"
    rows = [*run_default(run_dir), *phase_rows(Path(run_dir))]
    rows += asyncio.run(compare_sampling(Path(run_dir)))
    print("\n| default run, 2 training workers | measured |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")
    os._exit(0)  # The engine of this process and the local cluster end with it.


if __name__ == "__main__":
    main()
