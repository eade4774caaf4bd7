"""The learner against TRL's DPOTrainer, against its own FLOPs, and with several workers.

`python benchmarks/learner.py [--size 5M] [--steps 16] [--only speed memory work agreement] [--workers 1 2]
[--dialogues FILE] [--out FILE.md]` prints a Markdown table. Run it on a quiet machine. TRL comes from
requirements/bench.txt.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # One thread per process, here too: torch reads it when it is imported.

import argparse
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from learner_peers import MISSING_TRL
from learner_rows import (
    NAMES,
    Benchmark,
    Rows,
    agreement_rows,
    gpu_rows,
    memory_rows,
    speed_rows,
    tuned_heap_rows,
    work_rows,
    worker_rows,
)
from learner_setup import SIZES
from rich.console import Console
from rich.progress import Progress

from dpo_ray.config.training import TrainingConfig

PARTS = ("speed", "memory", "work", "agreement")
TUNED_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_ARENA_MAX": "1",
}
"""glibc's allocator keeps its pages instead of asking the kernel for zeroed ones at every large tensor."""


def cpu_rows(benchmark: Benchmark, parts: Sequence[str]) -> Rows:
    """The parts that were asked for."""
    rows: Rows = []
    if "speed" in parts or "memory" in parts:
        turns = benchmark.take_turns(list(NAMES), {})
        rows += speed_rows(benchmark, turns) if "speed" in parts else []
        rows += memory_rows(turns) if "memory" in parts else []
    if "speed" in parts:
        rows += tuned_heap_rows(
            benchmark, benchmark.take_turns(["ours", "trl-tuned", "trl-grouped"], benchmark.heap)
        )
    if "work" in parts:
        rows += work_rows(benchmark)
    if "agreement" in parts:
        rows += agreement_rows(benchmark)
    return rows


def describe(benchmark: Benchmark) -> str:
    """The hardware, the versions, and the lengths."""
    with open("/proc/cpuinfo") as lines:
        cpu = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU"
        )
    gpu = f", {torch.cuda.get_device_name()}" if benchmark.device == "cuda" else ""
    packages = ("torch", "transformers", *(("trl",) if importlib.util.find_spec("trl") else ()))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    pairs = benchmark.pairs
    lengths = [
        sum(len(getattr(pair, name)) for pair in pairs) / len(pairs)
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    ]
    return (
        f"{os.cpu_count()} × {cpu}, {psutil.virtual_memory().total / 2**30:.0f} GB{gpu}; {versions}. "
        f"{benchmark.size} parameters, {benchmark.steps} steps of {benchmark.batch} pairs; mean tokens: "
        f"prompt {lengths[0]:.0f}, chosen {lengths[1]:.0f}, rejected {lengths[2]:.0f}."
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="16M")
    parser.add_argument("--steps", type=int, default=16, help="timed steps of each side")
    parser.add_argument("--batch", type=int, default=8, help="pairs per step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=None, help="parts of the CPU benchmark")
    parser.add_argument("--workers", nargs="+", type=int, default=(), help="numbers of workers to compare")
    parser.add_argument(
        "--dialogues", default=None, help="JSON lines with chosen and rejected; else random ones"
    )
    tokens = TrainingConfig().tokens_per_pass  # Unset: what suits the device.
    parser.add_argument(
        "--tokens_per_pass", type=int, default=tokens, help="of ours; TRL has one pass per batch"
    )
    parser.add_argument(
        "--preload", default=None, help="allocator library to tune both sides with; else glibc's"
    )
    parser.add_argument("--out", type=Path, default=None, help="file for the table")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    given = parse()
    parts = given.only or (() if given.workers else PARTS)
    if set(parts) - {"work"} and importlib.util.find_spec("trl") is None:
        raise SystemExit(MISSING_TRL)
    heap = {"LD_PRELOAD": given.preload} if given.preload else TUNED_HEAP
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, Progress(console=console, transient=True) as progress:
        shown = progress.add_task("starting", total=None)
        benchmark = Benchmark(
            size=given.size,
            device=given.device,
            batch=given.batch,
            steps=given.steps,
            dialogues=given.dialogues,
            tokens_per_pass=given.tokens_per_pass,
            heap=heap,
            folder=Path(folder),
            on_step=lambda name: progress.update(shown, description=name, advance=1),
        )
        rows = gpu_rows(benchmark) if given.device == "cuda" and parts else cpu_rows(benchmark, parts)
        rows += worker_rows(benchmark, given.workers)
        lines = [describe(benchmark), "", f"| learner, {given.size} | measured | target |", "|---|---|---|"]
    text = "\n".join([*lines, *(f"| {name} | {value} | {target} |" for name, value, target in rows)])
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
