"""One side of the comparison, in a process of its own that takes one training step whenever it is told to.

Sides that take turns see the same machine, and each has its own heap: its memory and its allocator are
its own. TRL runs its own `Trainer.train`, held between two steps by a callback.
"""

import ctypes
import gc
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
import torch.distributed as dist
from learner_setup import SIZES, batches_of, grouped_by_length, make_pairs

from dpo_ray.config.training import ReferenceConfig, TrainingConfig
from dpo_ray.learner import Learner, Peers
from dpo_ray.models import load_tokenizer
from dpo_ray.types import Pair

Kind = Literal["ours", "trl", "trl-tuned", "trl-grouped"]
MISSING_TRL = "TRL is not installed: .venv/bin/python -m uv pip install --no-deps -r requirements/bench.txt"


@dataclass(frozen=True, slots=True)
class Task:
    """What one process trains, and how."""

    kind: Kind
    model: str
    """Folder of the policy; at the start, it is the reference too."""
    size: str
    device: str
    batch: int
    """Pairs per step."""
    num_batches: int
    """They are gone through again and again."""
    dialogues: str | None
    tokens_per_pass: int | None
    """Ours only."""
    parallelism: Literal["ddp", "fsdp"] = "ddp"


@dataclass(frozen=True, slots=True)
class Ready:
    """What a process says before its first step."""

    bare_bytes: int
    """What it held before it made a model: Python, torch, and their libraries."""
    reference_s: float = 0.0
    """Seconds that the reference log-probs of all batches took; TRL's are not timed, or part of each step."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step took."""

    seconds: float
    """CPU-seconds of the process; on a GPU, seconds until it was done."""
    wall_s: float
    working_bytes: int
    """Most memory so far, above that before the first step."""
    peak_bytes: int
    """Most memory so far."""


@contextmanager
def peer_process(task: Task, env: Mapping[str, str]) -> Iterator["PeerProcess"]:
    """A process that trains as the task says; it ends after its step when there is no further command."""
    command = [sys.executable, __file__, json.dumps(asdict(task))]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=log, text=True) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        yield PeerProcess(process.stdin, process.stdout, log)


@dataclass(frozen=True, slots=True)
class PeerProcess:
    """The handle: `start_step` of several, then `finish_step` of each, runs them at the same time."""

    commands: IO[str]
    reports: IO[str]
    log: IO[str]

    def wait_until_ready(self) -> Ready:
        return Ready(**self._receive())

    def start_step(self) -> None:
        self.commands.write("step\n")
        self.commands.flush()

    def finish_step(self) -> Step:
        return Step(**self._receive())

    def step(self) -> Step:
        self.start_step()
        return self.finish_step()

    def _receive(self) -> dict[str, Any]:
        line = self.reports.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"a measured process ended:\n{self.log.read()[-4000:]}")
        return json.loads(line)


class Commands:
    """The process's side: measures from each command to the end of its step."""

    def __init__(self, device: torch.device, reports: IO[str]) -> None:
        self._on_gpu = device.type == "cuda"
        self._reports = reports
        self._bare_bytes = _reset_peak(on_gpu=self._on_gpu)
        self._idle_bytes = 0
        self._started = (0.0, 0.0)

    def ready(self, *, reference_s: float = 0.0) -> None:
        gc.collect()
        if not self._on_gpu:
            # What the heap keeps of the set-up would hide what the steps need.
            ctypes.CDLL(None).malloc_trim(0)
        self._idle_bytes = _reset_peak(on_gpu=self._on_gpu)
        self._send(asdict(Ready(self._bare_bytes, reference_s)))

    def begin(self) -> None:
        """SystemExit: there is no further command."""
        if not sys.stdin.readline():
            raise SystemExit
        self._started = self._now()

    def end(self) -> None:
        seconds, wall_s = (now - then for now, then in zip(self._now(), self._started, strict=True))
        peak = _peak(on_gpu=self._on_gpu)
        self._send(asdict(Step(seconds, wall_s, peak - self._idle_bytes, peak)))

    def seconds_of(self, call: Callable[[], object]) -> float:
        started, _ = self._now()
        call()
        return self._now()[0] - started

    def _now(self) -> tuple[float, float]:
        if self._on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter(), time.perf_counter()
        return time.process_time(), time.perf_counter()

    def _send(self, facts: Mapping[str, Any]) -> None:
        self._reports.write(json.dumps(facts) + "\n")
        self._reports.flush()


def _reset_peak(*, on_gpu: bool) -> int:
    """Bytes in use now, from which on the peak counts."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _peak(on_gpu=False)


def _peak(*, on_gpu: bool) -> int:
    """Most bytes in use since the reset: resident memory, or what tensors hold on the GPU."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def train_ours(task: Task, batches: Sequence[list[Pair]], commands: Commands) -> None:
    """Our learner, by default but for what the task says; the reference is done before, as with TRL tuned."""
    device = torch.device(task.device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    config = TrainingConfig(
        parallelism=task.parallelism,
        tokens_per_pass=task.tokens_per_pass,
        reference=ReferenceConfig(keep_logps=False),
    )
    learner = Learner(Path(task.model), Path(task.model), config, Peers.current(device))
    pairs = list(itertools.chain.from_iterable(batches))
    # The first call computes the reference too; the second one shows what the rest takes.
    first_s, again_s = (commands.seconds_of(lambda: learner.evaluate(pairs)) for _ in range(2))
    commands.ready(reference_s=first_s - again_s)
    for batch in itertools.cycle(batches):
        commands.begin()
        learner.train_step(batch)
        commands.end()


def train_trl(task: Task, batches: Sequence[list[Pair]], commands: Commands) -> None:
    """TRL's trainer: by default, or with what makes it faster and what it has a setting for."""
    tuned = {} if task.kind == "trl" else {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
    pairs = list(itertools.chain.from_iterable(batches))
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            **tuned,
            "output_dir": folder,
            "use_cpu": task.device == "cpu",
            "bf16": task.device == "cuda",
        }
        trainer = make_trl_trainer(task.model, pairs, {**settings, "per_device_train_batch_size": task.batch})
        trainer.add_callback(_held_between_steps(commands))
        trainer.train()


def make_trl_trainer(model: str, pairs: Sequence[Pair], settings: Mapping[str, Any], **given: Any) -> Any:
    """A DPOTrainer that goes through these pairs in this order, and neither logs nor saves."""
    try:
        trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
    except ImportError as error:
        raise SystemExit(MISSING_TRL) from error

    class PretokenizedTrainer(trl.DPOTrainer):
        """The pairs' own token ids, instead of texts that are tokenized."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    config = trl.DPOConfig(
        **settings,
        max_length=None,
        max_steps=1_000_000,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
    )
    rows = datasets.Dataset.from_list([trl_row(pair) for pair in pairs])
    tokenizer = load_tokenizer(model)
    return PretokenizedTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, **given)


def trl_row(pair: Pair) -> dict[str, list[int]]:
    return {name: list(getattr(pair, name)) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def _held_between_steps(commands: Commands) -> Any:
    transformers = importlib.import_module("transformers")

    class HeldBetweenSteps(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            commands.ready()
            commands.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            commands.end()
            commands.begin()

    return HeldBetweenSteps()


def main() -> None:
    """Train as the argument says, reporting to the parent; what libraries print goes to the log."""
    task = Task(**json.loads(sys.argv[1]))
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    pairs = make_pairs(task.batch * task.num_batches, SIZES[task.size].vocab, task.dialogues)
    group = grouped_by_length if task.kind == "trl-grouped" else batches_of
    batches = group(pairs, task.batch)
    train = train_ours if task.kind == "ours" else train_trl
    train(task, batches, Commands(torch.device(task.device), reports))


if __name__ == "__main__":
    main()
