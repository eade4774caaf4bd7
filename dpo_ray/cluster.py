"""The parts of a job that run elsewhere, as plain calls: sample, judge, keep, train, promote."""

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from dpo_ray.buffer import PreferenceBuffer, PutReceipt, SnapshotManifest, default_url, snapshot_query
from dpo_ray.config import BufferConfig, IterativeDPOConfig, TrainingConfig
from dpo_ray.desk import ScoreWithStart, TrainRound
from dpo_ray.evaluation import evaluated, read_evaluation, write_evaluation
from dpo_ray.judges.actor import JudgeActor
from dpo_ray.learner import TrainingError
from dpo_ray.registry import PolicyManifest, PolicyRegistry
from dpo_ray.sampler import RefusedError, Sampler
from dpo_ray.storage import Storage
from dpo_ray.terminal import Terminal
from dpo_ray.train import TrainerGroup
from dpo_ray.types import Completion, Pair, Prompt, ScoredCompletion, TokenSequence

Bundle = dict[str, float]
"""CPUs and GPUs that one process reserves on one node, by Ray's names."""
_NAMESPACE = "dpo_ray"
_BUFFER = "buffer of "
_RETRIED: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}
"""Ray brings the actor back and repeats the call: every call below may be repeated."""


class Cluster:
    """Every call shows its progress, and returns when its effect is durable."""

    def __init__(self, config: IterativeDPOConfig, handle: DeploymentHandle, terminal: Terminal) -> None:
        self._config = config
        self._storage = Storage(config.run_dir)
        self._registry = PolicyRegistry(self._storage)
        self._terminal = terminal
        self._sampler = Sampler(handle, replicas=config.sampling.replicas)
        self._buffer = buffer_actor(self._storage, config.buffer)
        _result(self._buffer.hold.remote())
        _result(self._buffer.count.remote())  # Opened, and ours.
        self._judges = _start_judges(config)
        self._trainers = TrainerGroup(config.run_dir, config.training)

    def sample(self, prompts: Sequence[Prompt], *, round_: int) -> list[Completion]:
        """Completions of the live policy, `samples_per_prompt` in a row for each prompt."""
        params = self._params(self._config.sampling.samples_per_prompt)
        with self._terminal.phase("sample", f"round {round_}: sample") as on_progress:
            return self._sampler.sample(
                prompts, params, seed=f"{self._config.seed} {round_}", on_progress=on_progress
            )

    def judge(self, completions: Sequence[Completion]) -> list[ScoredCompletion]:
        with self._terminal.phase("judge"):
            return self._judge(completions)

    def put(self, pairs: Sequence[Pair]) -> PutReceipt:
        with self._terminal.phase("buffer"):
            return _result(self._buffer.put.remote(list(pairs)))

    def declare_snapshot(self, round_: int) -> SnapshotManifest:
        """What round `round_` trains on: the votes that it takes, and pairs of all rounds."""
        live, config = self._live(), self._config.buffer
        query = snapshot_query(config, round_=round_, live_version=live, seed=self._config.seed)
        with self._terminal.phase("buffer"):
            _result(self._buffer.release.remote(round_, self._config.votes))
            return _result(
                self._buffer.declare_snapshot.remote(
                    query, live_version=live, retention_rounds=config.retention_rounds
                )
            )

    def train(self, snapshot: SnapshotManifest, canaries: tuple[tuple[int, ...], ...]) -> PolicyManifest:
        """The candidate that the round makes; a finished one is returned as it is."""
        if not snapshot.rows:
            raise TrainingError(
                f"round {snapshot.round} has no pair to train on: in every prompt, all completions have one "
                "reward or none. Sample more of them or at a higher temperature, lower pairing.min_margin, "
                "or take a judge that tells them apart"
            )
        candidate = snapshot.round + 1
        if not self._registry.has(candidate):
            assignment = TrainRound(
                round=snapshot.round,
                parent=self._live(),
                candidate=candidate,
                seed=self._config.seed,
                canaries=canaries,
                rounds=self._config.rounds,
            )
            with self._terminal.phase("train", f"round {snapshot.round}: train") as on_progress:
                self._trainers.run(assignment, on_progress=on_progress)
        return self._registry.manifest(candidate)

    def show(self, version: int) -> None:
        """Let a version answer somewhere, so that it can be evaluated; one that is evaluated needs no trial.

        One of several replicas takes it beside the live one; a single replica must go live with it.
        RefusedError: the replicas do not take it.
        """
        if read_evaluation(self._storage, version) is not None:
            return
        if self._config.sampling.replicas == 1:
            self.promote(version)
        else:
            self._registry.offer(version, share=self._config.gate.canary_share)
            with self._terminal.phase("push"):
                self._sampler.converge()

    def promote(self, version: int) -> None:
        """Make a version live: every replica has proven it on return. RefusedError: one does not take it."""
        self._registry.promote(version)
        self._push()

    def reject(self, version: int, *, reason: str) -> None:
        """Take a version out of service, wherever it got: every replica holds the one before on return."""
        if self._live() == version:
            self._registry.rollback(by="job", reason=reason)
        elif self._is_on_offer(version):
            self._registry.withdraw()
        else:
            return
        self._push()

    def evaluate(self, version: int, prompts: Sequence[Prompt]) -> None:
        """Keep how a version that is live or on trial does on held-out prompts, once.

        RefusedError: it was taken back before all were answered.
        """
        if read_evaluation(self._storage, version) is not None:
            return
        per_prompt = self._config.evaluation.samples_per_prompt
        with self._terminal.phase("evaluate", f"evaluate version {version}"):
            completions = self._sample_as(version, prompts, self._params(per_prompt))
            scored = self._judge(completions)
            sequences = tuple(TokenSequence(c.prompt.token_ids, c.token_ids) for c in completions)
            start_logps = self._trainers.run(ScoreWithStart(sequences))
            write_evaluation(self._storage, version, evaluated(scored, start_logps, per_prompt=per_prompt))

    def close(self) -> None:
        """Let the training workers return, and leave Ray.

        Where the cluster stays, so do the served policy and the buffer, which opens its file for votes.
        """
        self._trainers.close()
        _result(self._buffer.close.remote())
        ray.shutdown()

    def _judge(self, completions: Sequence[Completion]) -> list[ScoredCompletion]:
        share = -(-len(completions) // len(self._judges))
        parts = [completions[start : start + share] for start in range(0, len(completions), share)]
        pending = [judge.judge.remote(part) for judge, part in zip(self._judges, parts, strict=False)]
        return [scored for part in pending for scored in _result(part)]

    def _push(self) -> None:
        with self._terminal.phase("push"):
            self._sampler.push(self._live())

    def _sample_as(self, version: int, prompts: Sequence[Prompt], params: dict[str, Any]) -> list[Completion]:
        """Completions of exactly this version."""
        seed = f"{self._config.seed} eval"
        if version == self._live():
            completions = self._sampler.sample(prompts, params, seed=seed)
        else:
            completions = self._sampler.sample_as(
                version, prompts, params, seed=seed, is_on_offer=lambda: self._is_on_offer(version)
            )
        if {completion.policy_version for completion in completions} != {version}:
            raise RefusedError(f"version {version} was taken back while it was evaluated")
        return completions

    def _is_on_offer(self, version: int) -> bool:
        candidate = self._registry.candidate()
        return candidate is not None and candidate.version == version

    def _live(self) -> int:
        live = self._registry.live()
        assert live is not None, "a run promotes version 0 before its cluster starts"
        return live

    def _params(self, n: int) -> dict[str, Any]:
        sampling = self._config.sampling
        return {
            "n": n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
        }


def connect() -> None:
    """Attach to the running Ray cluster, or start one on this machine where there is none."""
    if ray.is_initialized():
        return
    # Ray Train looks at its workers this often, and each round would wait for the next look.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(log_to_driver=False, logging_level=logging.ERROR, namespace=_NAMESPACE)


def wait_for_resources(bundles: Sequence[Bundle], *, timeout_s: float) -> None:
    """Return when the cluster has what the parts reserve; ValueError where it does not get it in time."""
    needed = {name: sum(bundle[name] for bundle in bundles) for name in ("CPU", "GPU")}
    deadline = time.monotonic() + timeout_s
    while True:
        present = ray.cluster_resources()
        missing = [name for name, amount in needed.items() if amount > present.get(name, 0.0)]
        if not missing:
            return
        if time.monotonic() > deadline:
            lacks = " and ".join(
                f"{needed[name]:g} {name}s (it has {present.get(name, 0):g})" for name in missing
            )
            raise ValueError(
                f"the job reserves {lacks} of the Ray cluster: add nodes, lower training.workers, "
                "sampling.replicas or the cpus_per_… and gpus_per_… settings, "
                "or raise cluster.wait_for_resources_s if the cluster is growing"
            )
        request_resources(bundles=[dict(bundle) for bundle in bundles])
        time.sleep(1.0)


def buffer_actor(storage: Storage, config: BufferConfig) -> Any:
    """The run's one preference buffer, for the job and for whoever serves its policy; it outlives both."""
    url = config.url or default_url(storage)
    actor = ray.remote(PreferenceBuffer).options(
        num_cpus=0,
        name=_buffer_name(storage),
        namespace=_NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_concurrency=64,
        **_RETRIED,
    )
    return actor.remote(url, storage, is_held=False)


def end_other_buffers(storage: Storage) -> None:
    """End the buffers of runs whose policy this cluster serves no more, for which nobody votes."""
    actors: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    for actor in actors:
        name, is_ours = actor["name"], actor["namespace"] == _NAMESPACE
        if is_ours and name.startswith(_BUFFER) and name != _buffer_name(storage):
            ray.kill(ray.get_actor(name, namespace=_NAMESPACE))


def _buffer_name(storage: Storage) -> str:
    return f"{_BUFFER}{storage.root}"


def training_bundles(config: TrainingConfig) -> list[Bundle]:
    """What each training worker reserves."""
    return [{"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}] * config.workers


def all_bundles(config: IterativeDPOConfig) -> list[Bundle]:
    """What each sampler replica, training worker and judge reserves."""
    sampling, judge = config.sampling, config.judge
    replica: Bundle = {"CPU": sampling.cpus_per_replica, "GPU": sampling.gpus_per_replica}
    judges: list[Bundle] = [{"CPU": judge.cpus_per_actor, "GPU": 0.0}] * judge.actors
    return [*training_bundles(config.training), *[replica] * sampling.replicas, *judges]


def _start_judges(config: IterativeDPOConfig) -> list[Any]:
    actor = ray.remote(num_cpus=config.judge.cpus_per_actor, **_RETRIED)(JudgeActor)
    return [actor.remote(config.judge.function) for _ in range(config.judge.actors)]


def _result(reference: ray.ObjectRef) -> Any:
    """What an actor's call returned; a ValueError there is the same ValueError here."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise
