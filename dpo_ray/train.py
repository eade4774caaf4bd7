"""The learner under Ray Train: one group of workers that lives through all rounds."""

import functools
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_never

import ray
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from dpo_ray.buffer import SnapshotManifest, read_snapshot, read_snapshot_manifest
from dpo_ray.checkpoints import RoundCheckpoints, load_state, save_state, state_file
from dpo_ray.config import TrainingConfig
from dpo_ray.desk import (
    Assignment,
    EvaluatePairs,
    Finished,
    Outcome,
    SamplePolicy,
    ScoreWithStart,
    SendVersion,
    TrainerDesk,
    TrainRound,
    Work,
)
from dpo_ray.generation import Drawing, generate
from dpo_ray.learner import Learner, TrainingError
from dpo_ray.metrics import StepMetrics, write_steps
from dpo_ray.parallel import Peers
from dpo_ray.registry import PolicyManifest, PolicyRegistry, SnapshotRef
from dpo_ray.rounds import RoundPlan, RoundResult, train_round
from dpo_ray.storage import Storage
from dpo_ray.stream import send
from dpo_ray.types import Completion, Stream, TokenSequence

_CLOSE_S = 60
"""Workers that are still starting hear only then that they are not needed."""
_KEPT_STATES = 3
"""Optimizer states of this many versions are kept, and that of the one that training goes on from."""


class TrainerGroup:
    """Starts the workers, and gives them one assignment at a time."""

    def __init__(self, run_dir: str, config: TrainingConfig) -> None:
        desk = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(TrainerDesk)
        self._desk: Any = desk.remote()
        self._failure: BaseException | None = None
        self._trainer = make_trainer(run_dir, config, self._desk)
        self._thread = threading.Thread(target=self._fit, daemon=True, name="trainer")
        self._thread.start()

    def run(self, assignment: Assignment, *, on_progress: Callable[[int, int], None] | None = None) -> Any:
        """The assignment's value.

        TrainingError: it can never succeed. RuntimeError: the workers keep dying.
        """
        pending = self._desk.submit.remote(assignment)
        while True:
            done, _ = ray.wait([pending], timeout=0.2)
            if done:
                break
            if self._failure is not None:
                raise RuntimeError(f"the training workers failed: {self._failure}") from self._failure
            if on_progress is not None:
                on_progress(*ray.get(self._desk.progress.remote()))
        outcome: Outcome = ray.get(pending)
        if outcome.error is not None:
            raise TrainingError(outcome.error)
        return outcome.value

    def close(self) -> None:
        """Let the workers return. A thread that still is in Ray when Python ends would crash it."""
        if self._failure is None:
            ray.wait([self._desk.submit.remote(Finished())], timeout=_CLOSE_S)
            self._thread.join(timeout=_CLOSE_S)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self._failure = error


def make_trainer(run_dir: str, config: TrainingConfig, desk: Any) -> TorchTrainer:
    on_gpu = config.gpus_per_worker > 0
    resources = {"CPU": config.cpus_per_worker, **({"GPU": config.gpus_per_worker} if on_gpu else {})}
    return TorchTrainer(
        functools.partial(work, run_dir, config, desk),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=on_gpu,
            resources_per_worker=resources,
            placement_strategy="SPREAD",
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=RunConfig(
            name="trainer",
            storage_path=f"{Storage(run_dir).root}/ray_train",
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )


def work(run_dir: str, config: TrainingConfig, desk: Any) -> None:
    """One worker: take assignments until the run is over."""
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    worker = TrainWorker(Storage(run_dir), config, Peers.current(get_device()), desk)
    while True:
        number, assignment = worker.next_assignment()
        if isinstance(assignment, Finished):
            worker.finish(number, Outcome())
            return
        try:
            outcome = Outcome(worker.do(assignment))
        except TrainingError as error:  # Every worker sees the same error: it is not repeated.
            outcome = Outcome(error=str(error))
        worker.finish(number, outcome)


class TrainWorker:
    """A learner that holds one policy version, and loads another where an assignment starts elsewhere."""

    def __init__(self, storage: Storage, config: TrainingConfig, peers: Peers, desk: Any) -> None:
        self._storage = storage
        self._registry = PolicyRegistry(storage)
        self._config = config
        self._peers = peers
        self._desk = desk
        # Assignments are Python objects: they travel on CPU, whatever the gradients use.
        self._objects: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._learner: Learner | None = None
        self._version: int | None = None

    def next_assignment(self) -> tuple[int, Assignment]:
        """What rank 0 finds on the desk, with its number, on every rank."""
        box: list[Any] = [None]
        while box[0] is None:
            if self._peers.rank == 0:
                box = [ray.get(self._desk.take.remote())]
            if self._objects is not None:
                dist.broadcast_object_list(box, src=0, group=self._objects)
        return box[0]

    def do(self, assignment: Work) -> Any:
        match assignment:
            case TrainRound():
                return self._train(assignment)
            case ScoreWithStart(sequences):
                return self._learner_at(self._version or 0).start_logps(sequences)
            case EvaluatePairs(version, pairs):
                return self._learner_at(version).evaluate(pairs)
            case SamplePolicy():
                return self._sample(assignment)
            case SendVersion(stream):
                return self._send(stream)
            case _:
                assert_never(assignment)

    def finish(self, number: int, outcome: Outcome) -> None:
        """Rank 0 reports; the others may not take the next assignment before."""
        if self._peers.rank == 0:
            ray.get(self._desk.finish.remote(number, outcome))

    def _train(self, assignment: TrainRound) -> None:
        """Make and publish the candidate. One that workers before us published is not made again."""
        if self._registry.has(assignment.candidate):
            return
        learner = self._learner_at(assignment.parent)
        self._version = None  # From here on, the weights are between versions.
        snapshot = read_snapshot_manifest(self._storage, assignment.round)
        assert snapshot is not None, "a round is trained only after its snapshot is declared"
        plan = RoundPlan(
            pairs=read_snapshot(self._storage, snapshot),
            seed=assignment.seed,
            held_out=assignment.held_out,
            round=assignment.round,
            rounds=assignment.rounds,
        )
        checkpoints = RoundCheckpoints(self._storage, assignment.candidate, self._peers)
        result = train_round(learner, plan, on_step=self._report, checkpoints=checkpoints)
        self._publish(learner, assignment, snapshot, result)
        checkpoints.remove()
        self._version = assignment.candidate

    def _sample(self, assignment: SamplePolicy) -> tuple[list[Completion], list[float]]:
        """Each process samples for its share of the prompts."""
        learner, peers = self._learner_at(assignment.version), self._peers
        own = assignment.prompts[peers.rank :: peers.world_size]
        token_ids = generate(
            self._registry.fetch(assignment.version),
            [prompt.token_ids for prompt in own],
            Drawing(
                n=assignment.samples_per_prompt,
                max_new_tokens=assignment.max_new_tokens,
                seed=assignment.seed + peers.rank,
            ),
            device=peers.device,
        )
        prompts = [prompt for prompt in own for _ in range(assignment.samples_per_prompt)]
        mine = list(zip(prompts, token_ids, strict=True))
        shares: list[Any] = [mine] * peers.world_size
        if self._objects is not None:
            dist.all_gather_object(shares, mine, group=self._objects)
        both = [item for share in shares for item in share]
        sequences = [TokenSequence(prompt.token_ids, tuple(ids)) for prompt, ids in both]
        logps, start_logps = learner.logps(sequences), learner.start_logps(sequences)
        completions = [
            Completion(
                prompt=prompt,
                text=str(learner.tokenizer.decode(ids, skip_special_tokens=True)),
                token_ids=tuple(ids),
                logp=logp,
                policy_version=assignment.version,
                finish_reason="length" if len(ids) == assignment.max_new_tokens else "stop",
            )
            for (prompt, ids), logp in zip(both, logps, strict=True)
        ]
        return completions, start_logps

    def _send(self, stream: Stream) -> str:
        if self._peers.rank == 0:
            try:
                send(stream, self._registry)
            except (RuntimeError, ValueError) as error:  # Whoever got nothing takes it from storage.
                return str(error)
        return ""

    def _report(self, metrics: StepMetrics, num_steps: int) -> None:
        if self._peers.rank == 0:
            self._desk.report.remote(int(metrics["step"]), num_steps)

    def _publish(
        self, learner: Learner, assignment: TrainRound, snapshot: SnapshotManifest, result: RoundResult
    ) -> None:
        """Every process gives its part; the first one writes, the version last."""
        state, weights = learner.state_dict(), learner.policy.state_dict()
        manifest = PolicyManifest(
            version=assignment.candidate,
            parent=assignment.parent,
            snapshot=SnapshotRef(round=snapshot.round, rows=snapshot.rows, sha256=snapshot.sha256),
            step=learner.step,
            metrics=result.history[-1],
            stopped_early=result.stopped,
            canaries=learner.canaries(assignment.canaries),
            config=self._config.model_dump(),
        )
        if self._peers.rank != 0:
            return
        write_steps(self._storage, assignment.round, result.history)
        save_state(self._storage, state_file(assignment.candidate), state)
        old = assignment.candidate - _KEPT_STATES
        if old not in (assignment.parent, self._registry.live()):  # A refusal goes back to what is live.
            self._storage.remove(state_file(old))
        with tempfile.TemporaryDirectory() as folder:
            learner.policy.save(Path(folder), weights)
            self._registry.publish(Path(folder), manifest)

    def _learner_at(self, version: int) -> Learner:
        """The learner with the weights and optimizer of a published version."""
        if self._learner is not None and self._version == version:
            return self._learner
        folder, reference = self._registry.fetch(version), self._registry.fetch(0)
        learner = Learner(folder, reference, self._config, self._peers)
        if (state := load_state(self._storage, state_file(version))) is not None:
            learner.load_state_dict(state)
        self._learner, self._version = learner, version
        return learner
