"""The rows of the learner's table: each part measures, and holds its targets against what it found."""

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from learner_checks import LOSSES, differences, gpu_matmul_rate, measure_work
from learner_peers import Kind, PeerProcess, Ready, Step, Task, peer_process
from learner_setup import SIZES, batches_of, make_model, make_pairs, useful_flops

from dpo_ray.types import Pair

Rows = list[tuple[str, str, str]]
Turns = dict[Kind, tuple[Ready, list[Step]]]
NAMES: dict[Kind, str] = {
    "ours": "ours",
    "trl": "TRL, defaults",
    "trl-tuned": "TRL, tuned",
    "trl-grouped": "TRL, tuned, grouped by length",
}
SPEED_TARGETS: dict[Kind, float] = {"trl": 4.5, "trl-tuned": 2.8, "trl-grouped": 1.8}
MAX_DIFFERENCE = 1e-5
SHORT = 32
"""fp32 rounds a sum of log-probs the more the longer it is: agreement is shown on short completions."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What is measured on what."""

    size: str
    device: str
    batch: int
    steps: int
    dialogues: str | None
    tokens_per_pass: int | None
    """Of ours; TRL computes each batch in one pass."""
    heap: dict[str, str]
    """Environment of the processes with a tuned allocator."""
    folder: Path
    on_step: Callable[[str], None]

    @property
    def pairs(self) -> list[Pair]:
        return make_pairs(self.batch * self.steps, SIZES[self.size].vocab, self.dialogues)

    @property
    def model(self) -> Path:
        return make_model(self.folder / "model", SIZES[self.size])

    def task(self, kind: Kind, *, fsdp: bool = False) -> Task:
        return Task(
            kind=kind,
            model=str(self.model),
            size=self.size,
            device=self.device,
            batch=self.batch,
            num_batches=self.steps,
            dialogues=self.dialogues,
            tokens_per_pass=self.tokens_per_pass,
            parallelism="fsdp" if fsdp else "ddp",
        )

    def take_turns(self, kinds: Sequence[Kind], env: Mapping[str, str]) -> Turns:
        """Each kind's steps: one after another, the first of which warms up."""
        with ExitStack() as stack:
            peers: dict[Kind, PeerProcess] = {
                kind: stack.enter_context(peer_process(self.task(kind), env)) for kind in kinds
            }
            turns: Turns = {kind: (peer.wait_until_ready(), []) for kind, peer in peers.items()}
            for _ in range(1 + self.steps):
                for kind, peer in peers.items():
                    turns[kind][1].append(peer.step())
                    self.on_step(NAMES[kind])
        return turns


def speed_rows(benchmark: Benchmark, turns: Turns) -> Rows:
    """Pairs per CPU-second of each, and how many times faster we are."""
    ready, _ = turns["ours"]
    pairs, ours_s = benchmark.batch * benchmark.steps, _seconds(turns["ours"][1])
    rows = [
        (f"pairs per CPU-second: {NAMES[kind]}", f"{pairs / _seconds(s):.2f}", "")
        for kind, (_, s) in turns.items()
    ]
    rows.insert(1, ("the same, reference pass included", f"{pairs / (ours_s + ready.reference_s):.2f}", ""))
    for kind, target in SPEED_TARGETS.items():
        rows.append(_ratio_row(NAMES[kind], turns[kind][1], turns["ours"][1], target))
    return rows


def tuned_heap_rows(benchmark: Benchmark, turns: Turns) -> Rows:
    """The same with an allocator that keeps its pages, on both sides."""
    pairs = benchmark.batch * benchmark.steps
    rows = [
        (f"pairs per CPU-second, tuned allocator: {NAMES[kind]}", f"{pairs / _seconds(steps):.2f}", "")
        for kind, (_, steps) in turns.items()
    ]
    name = f"{NAMES['trl-tuned']}, tuned allocator"
    return [*rows, _ratio_row(name, turns["trl-tuned"][1], turns["ours"][1], 2.3)]


def _seconds(steps: Sequence[Step]) -> float:
    return sum(step.seconds for step in steps[1:])


def _ratio_row(
    name: str, theirs: Sequence[Step], ours: Sequence[Step], target: float
) -> tuple[str, str, str]:
    ratio = _seconds(theirs) / _seconds(ours)
    return f"times faster than {name}", f"{ratio:.2f}", _verdict(f"≥ {target}", passed=ratio >= target)


def _verdict(target: str, *, passed: bool) -> str:
    return f"{target}: {'PASS' if passed else 'missed'}"


def memory_rows(turns: Turns) -> Rows:
    """Working memory: the peak of all steps above what the process held before the first one."""
    peaks: dict[Kind, int] = {kind: steps[-1].working_bytes for kind, (_, steps) in turns.items()}
    rows: Rows = [
        (f"working memory, MB: {NAMES[kind]}", f"{peak / 1e6:.0f}", "") for kind, peak in peaks.items()
    ]
    for kind, peak in peaks.items():
        if kind != "ours":
            share = peaks["ours"] / peak
            verdict = _verdict("≤ 0.33", passed=share <= 1 / 3)
            rows.append((f"our working memory in that of {NAMES[kind]}", f"{share:.2f}", verdict))
    return rows


def work_rows(benchmark: Benchmark) -> Rows:
    """FLOPs against the least possible, and their rate against that of the same matrix products alone."""
    batches = batches_of(benchmark.pairs, benchmark.batch)
    useful = sum(useful_flops(SIZES[benchmark.size], batch) for batch in batches)
    work = measure_work(
        benchmark.model,
        batches,
        tokens_per_pass=benchmark.tokens_per_pass,
        on_batch=lambda: benchmark.on_step("our work"),
    )
    rate = work.product_flops / work.product_s / 1e9
    ratio = work.counted_flops / useful
    share = useful / work.step_s / (work.product_flops / work.product_s)
    return [
        ("FLOPs counted, of the least possible", f"{ratio:.3f}", _verdict("≤ 1.08", passed=ratio <= 1.08)),
        ("GFLOP/s of the step's matrix products alone", f"{rate:.1f}", ""),
        ("useful FLOP/s of a step, of that rate", f"{share:.0%}", _verdict("≥ 65%", passed=share >= 0.65)),
    ]


def agreement_rows(benchmark: Benchmark) -> Rows:
    """Loss and gradients of one batch, where policy and reference differ."""
    policy = make_model(benchmark.folder / "policy", SIZES[benchmark.size], noise=0.5)
    pairs = make_pairs(16 * benchmark.batch, SIZES[benchmark.size].vocab, benchmark.dialogues)
    short = [pair for pair in pairs if max(len(pair.chosen_ids), len(pair.rejected_ids)) <= SHORT]
    rows = []
    for name, found in differences(policy, benchmark.model, short[: benchmark.batch], list(LOSSES)):
        passed = max(found.loss, found.gradient) <= MAX_DIFFERENCE
        value = f"loss {found.loss:.1e}, gradients {found.gradient:.1e}"
        rows.append((f"difference from TRL: {name}", value, _verdict("≤ 1e-5", passed=passed)))
        benchmark.on_step(name)
    return rows


def worker_rows(benchmark: Benchmark, numbers: Sequence[int]) -> Rows:
    """The same global batches by several workers: pairs per second of wall time, and memory.

    Memory is what one worker holds for training: weights, gradients, optimizer and the work itself.
    """
    rows = []
    for workers in numbers:
        for fsdp in (False, True) if workers > 1 else (False,):
            steps = list(_together(benchmark, workers, fsdp=fsdp))
            rate = benchmark.batch * benchmark.steps / sum(wall for wall, _ in steps[1:])
            name = "1 worker" if workers == 1 else f"{workers} workers, {'fsdp' if fsdp else 'ddp'}"
            memory = f"{max(held for _, held in steps) / 1e6:.0f} MB each"
            rows.append((f"pairs per second, {name}", f"{rate:.2f}, {memory}", ""))
    return rows


def _together(benchmark: Benchmark, workers: int, *, fsdp: bool) -> Iterator[tuple[float, int]]:
    """Wall seconds of each step of all workers at the same time, and the most that one holds for training."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(workers)}
    with ExitStack() as stack:
        peers = []
        for rank in range(workers):
            own = {**shared, "RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(rank)} if workers > 1 else {}
            peers.append(stack.enter_context(peer_process(benchmark.task("ours", fsdp=fsdp), own)))
        bare = [peer.wait_until_ready().bare_bytes for peer in peers]
        for _ in range(1 + benchmark.steps):
            for peer in peers:
                peer.start_step()
            steps = [peer.finish_step() for peer in peers]
            benchmark.on_step(f"{workers} workers")
            held = max(step.peak_bytes - before for step, before in zip(steps, bare, strict=True))
            yield max(step.wall_s for step in steps), held


def gpu_rows(benchmark: Benchmark) -> Rows:
    """On a GPU, one side after the other, since there is no room for two."""
    kinds: tuple[Kind, ...] = ("ours", "trl-tuned", "trl-grouped")
    turns: Turns = {kind: benchmark.take_turns([kind], {})[kind] for kind in kinds}
    pairs, rate = benchmark.pairs, gpu_matmul_rate()
    tokens = sum(len(ids) for pair in pairs for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
    useful = useful_flops(SIZES[benchmark.size], pairs)
    rows: Rows = [("TFLOP/s of large bf16 matrix products", f"{rate / 1e12:.0f}", "")]
    for kind, (_, steps) in turns.items():
        share = useful / _seconds(steps) / rate
        value = f"{tokens / _seconds(steps):.0f} tokens/s, {share:.1%} of that rate useful"
        rows.append((NAMES[kind], f"{value}, {steps[-1].peak_bytes / 1e9:.1f} GB", ""))
    for kind in kinds[1:]:
        rows.append(_ratio_row(NAMES[kind], turns[kind][1], turns["ours"][1], SPEED_TARGETS[kind]))
    return rows
