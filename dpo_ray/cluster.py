"""The parts of a job that run elsewhere, as plain calls: sample, judge, keep, train, promote."""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from dpo_ray.buffer import PutReceipt, SnapshotManifest, TrialVotes, snapshot_query
from dpo_ray.buffer_actor import buffer_actor
from dpo_ray.config import IterativeDPOConfig
from dpo_ray.desk import ScoreWithStart, SendVersion, TrainRound
from dpo_ray.evaluation import beside_start, evaluated, read_evaluation, write_evaluation
from dpo_ray.judges import prompt_shares, require_judged
from dpo_ray.judges.actor import JudgeActor
from dpo_ray.registry import ADAPTER, PolicyManifest, PolicyRegistry
from dpo_ray.sampler import RefusedError, Sampler
from dpo_ray.storage import Storage
from dpo_ray.stream import meeting_place
from dpo_ray.terminal import Terminal
from dpo_ray.train import TrainerGroup
from dpo_ray.types import Completion, Pair, Prompt, ScoredCompletion, Stream, TokenSequence

_VOTES_POLL_S = 1.0
_RETRIED: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}
"""Ray brings the actor back and repeats the call: every call below may be repeated."""


class Cluster:
    """Every call shows its progress, and returns when its effect is durable."""

    def __init__(
        self, config: IterativeDPOConfig, handle: DeploymentHandle, terminal: Terminal, *, live_url: str
    ) -> None:
        self._config = config
        self._storage = Storage(config.run_dir)
        self._registry = PolicyRegistry(self._storage)
        self._terminal = terminal
        self._sampler = Sampler(handle, replicas=config.sampling.replicas)
        self._buffer = buffer_actor(self._storage, config.buffer)
        _result(self._buffer.hold.remote())
        _result(self._buffer.count.remote())  # Opened, and ours.
        self._judges = _start_judges(config, live_url)
        self._trainers = TrainerGroup(config.run_dir, config.training)
        self._sent: int | None = None

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

    def train(
        self, snapshot: SnapshotManifest, parent: int, canaries: tuple[tuple[int, ...], ...]
    ) -> PolicyManifest:
        """The candidate that the round makes of `parent`; a finished one is returned as it is."""
        candidate = snapshot.round + 1
        if not self._registry.has(candidate):
            assignment = TrainRound(
                round=snapshot.round,
                parent=parent,
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
            self._send(version)
            self._registry.offer(version, share=self._config.gate.canary_share)
            with self._terminal.phase("push"):
                self._sampler.converge()

    def votes(self, version: int) -> TrialVotes:
        """What people say of a version beside the live one; those that are wanted are waited for."""
        gate, live = self._config.gate, self._live()
        if live == version:
            return TrialVotes()
        deadline = time.monotonic() + gate.votes_wait_s
        with self._terminal.phase("votes", f"version {version}: wait for people's votes") as on_progress:
            while True:
                votes: TrialVotes = _result(self._buffer.trial_votes.remote(version, live))
                on_progress(votes.compared, gate.votes_wanted)
                enough = votes.compared >= gate.votes_wanted or time.monotonic() > deadline
                if enough or not self._is_on_offer(version):
                    return votes
                time.sleep(_VOTES_POLL_S)

    def promote(self, version: int) -> None:
        """Make a version live: every replica has proven it on return. RefusedError: one does not take it."""
        self._send(version)
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
            scored = self._judge_held_out(version, completions)
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
        parts = prompt_shares(completions, len(self._judges))
        pending = [judge.judge.remote(part) for judge, part in zip(self._judges, parts, strict=False)]
        scored = [scored for part in pending for scored in _result(part)]
        require_judged(scored, self._config.judge)
        return scored

    def _judge_held_out(self, version: int, completions: Sequence[Completion]) -> list[ScoredCompletion]:
        """Where a judge compares, with the start: among its own, a version's completions win the half."""
        start = read_evaluation(self._storage, 0) if self._config.judge.is_relative else None
        if start is None:
            return self._judge(completions)
        per_prompt = self._config.evaluation.samples_per_prompt
        judged = self._judge(beside_start(completions, start, per_prompt=per_prompt))
        return [item for item in judged if item.completion.policy_version == version]

    def _send(self, version: int) -> None:
        """Bring a version to the nodes of all replicas, once; where that fails, they read it from storage."""
        sampling = self._config.sampling
        if sampling.transport == "storage" or version == self._sent:
            return
        self._sent = version
        with self._terminal.phase("push"):
            on_gpus = min(sampling.gpus_per_replica, self._config.training.gpus_per_worker) >= 1
            store = meeting_place(host := ray.util.get_node_ip_address())
            stream = Stream(
                version=version,
                part=ADAPTER if sampling.lora_rank else "",
                host=host,
                port=store.port,
                receivers=tuple(self._sampler.receivers()),
                device="cuda" if on_gpus else "cpu",
            )
            arriving = self._sampler.receive(stream)
            complaints = [self._trainers.run(SendVersion(stream)), *arriving.result()]
        for complaint in filter(None, complaints):
            self._terminal.say(f"version {version} was not sent to all nodes: {complaint}")

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


def _start_judges(config: IterativeDPOConfig, live_url: str) -> list[Any]:
    judge = config.judge
    actor = ray.remote(num_cpus=judge.cpus_per_actor, num_gpus=judge.gpus_per_actor, **_RETRIED)(JudgeActor)
    return [actor.remote(judge, config.run_dir, place, live_url) for place in range(judge.actors)]


def _result(reference: ray.ObjectRef) -> Any:
    """What an actor's call returned; a ValueError there is the same ValueError here."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise
