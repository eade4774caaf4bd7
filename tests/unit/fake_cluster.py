"""The parts of a job as plain objects in this process, deterministic, with a hook at every line."""

import functools
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle
from safetensors.torch import save_file

from dpo_ray.buffer import PreferenceBuffer, PutReceipt, SnapshotManifest, TrialVotes, snapshot_query
from dpo_ray.cluster import Cluster
from dpo_ray.config import IterativeDPOConfig
from dpo_ray.desk import ScoreWithStart
from dpo_ray.metrics import write_steps
from dpo_ray.registry import PolicyManifest, PolicyRegistry, SnapshotRef
from dpo_ray.run import Run
from dpo_ray.sampler import Answer, Sampler
from dpo_ray.storage import Storage
from dpo_ray.terminal import Terminal
from dpo_ray.train import TrainerGroup
from dpo_ray.types import Completion, Judgement, Pair, Prompt, ScoredCompletion

AtPoint = Callable[[str], None]
"""Told the name of each point that a job passes; it may end the job there."""
STEPS_PER_ROUND = 2
_Method = TypeVar("_Method", bound=Callable[..., Any])


class Crash(BaseException):
    """The end of the process."""


class CrashAt:
    """Ends the job at one point, counted from 0; notes all that were passed."""

    def __init__(self, point: int | None = None) -> None:
        self.passed: list[str] = []
        self._point = point

    def __call__(self, name: str) -> None:
        self.passed.append(name)
        if len(self.passed) - 1 == self._point:
            raise Crash(name)


def with_points(method: _Method) -> _Method:
    @functools.wraps(method)
    def between_points(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.at_point(f"before {method.__name__}")
        returned = method(self, *args, **kwargs)
        self.at_point(f"after {method.__name__}")
        return returned

    return cast(_Method, between_points)


class StorageWithPoints(Storage):
    """Passes a point whenever a file or folder has appeared."""

    def __init__(self, root: str, at_point: AtPoint) -> None:
        super().__init__(root)
        self.at_point = at_point

    def write_bytes(self, path: str, content: bytes) -> None:
        super().write_bytes(path, content)
        self.at_point(f"written {path}")

    def publish_folder(self, source: Path, path: str, *, marker: str, text: str) -> None:
        super().publish_folder(source, path, marker=marker, text=text)
        self.at_point(f"published {path}")


@dataclass(frozen=True)
class Faults:
    """What is wrong with some candidates."""

    trained_badly: Sequence[int] = ()
    """The metrics of their training are out of bounds."""
    writes_badly: Sequence[int] = ()
    """Their completions are cut off."""
    unprovable: Sequence[int] = ()
    """The replicas refuse them."""
    unprovable_beside_others: Sequence[int] = ()
    """All but the last replica refuse them."""


class StaleWeightsError(RuntimeError):
    """What a replica raises that cannot prove what it should hold; a job knows it by its name."""


@dataclass(frozen=True)
class FakeResponse:
    """Of one replica."""

    result: Callable[[], Any]


@dataclass(frozen=True)
class FakeBroadcast:
    """Of all replicas."""

    results: Callable[[], list[Any]]


class FakeHandle:
    """The handle of replicas that live here; a candidate is for the last of several."""

    def __init__(self, registry: PolicyRegistry, faults: Faults, replicas: int) -> None:
        self.generate = SimpleNamespace(remote=self._generate)
        self.pushed: list[list[int]] = []
        """What the replicas held after each push."""
        self._registry = registry
        self._faults = faults
        self._num = replicas
        self.held = self._wanted()
        assert not self._unproven(), "a replica that cannot prove its first version does not start"

    def broadcast(self, method: str, *args: Any) -> FakeBroadcast:
        return FakeBroadcast(
            {"converge": self._converge, "sample_as": partial(self._sample_as, *args)}[method]
        )

    def _generate(self, prompts: list[list[int]], seeds: list[int], params: dict[str, Any]) -> FakeResponse:
        return FakeResponse(lambda: self._answers(self.held[0], prompts, seeds, params))

    def _sample_as(self, version: int, *args: Any) -> list[Any]:
        return [self._answers(version, *args) if held == version else None for held in self.held]

    def _converge(self) -> list[Any]:
        self.held = self._wanted()
        if unproven := self._unproven():
            refusal = StaleWeightsError(f"{unproven} is not proven")
            raise RayTaskError("converge", "", refusal)
        self.pushed.append(self.held)
        return [SimpleNamespace(version=version) for version in self.held]

    def _wanted(self) -> list[int]:
        live, candidate = self._registry.live(), self._registry.candidate()
        assert live is not None
        last = candidate.version if candidate is not None and self._num > 1 else live
        return [*[live] * (self._num - 1), last]

    def _unproven(self) -> list[int]:
        bad = set(self.held) & set(self._faults.unprovable)
        return sorted(bad | set(self.held[:-1]) & set(self._faults.unprovable_beside_others))

    def _answers(
        self, version: int, prompts: list[list[int]], seeds: list[int], params: dict[str, Any]
    ) -> list[list[Answer]]:
        end = "length" if version in self._faults.writes_badly else "stop"
        return [
            [_answer(version, f"{prompt} {seed} {place}", end) for place in range(params["n"])]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]


class FakeTrainers:
    """Says what version 0 thinks of completions."""

    def run(self, assignment: ScoreWithStart) -> list[float]:
        return [-float(len(sequence.completion_ids)) for sequence in assignment.sequences]


class FakeCluster(Cluster):
    """The real calls, on replicas, judges and trainers that are none, each as repeatable as the real one."""

    def __init__(self, config: IterativeDPOConfig, at_point: AtPoint, faults: Faults) -> None:
        self.at_point = at_point
        self._config = config
        self._faults = faults
        self._storage = StorageWithPoints(config.run_dir, at_point)
        self._registry = PolicyRegistry(self._storage)
        self._terminal = Terminal()
        self.replicas = FakeHandle(self._registry, faults, config.sampling.replicas)
        self._sampler = Sampler(cast(DeploymentHandle, self.replicas), replicas=config.sampling.replicas)
        self._trainers = cast(TrainerGroup, FakeTrainers())
        self._buffer = PreferenceBuffer(f"sqlite:///{self._storage.local_root}/buffer.sqlite", self._storage)

    show = with_points(Cluster.show)
    evaluate = with_points(Cluster.evaluate)
    promote = with_points(Cluster.promote)
    reject = with_points(Cluster.reject)

    def votes(self, version: int) -> TrialVotes:
        return self._buffer.trial_votes(version, self._live())

    @with_points
    def sample(self, prompts: Sequence[Prompt], *, round_: int) -> list[Completion]:
        params = self._params(self._config.sampling.samples_per_prompt)
        return self._sampler.sample(prompts, params, seed=f"{round_}")

    @with_points
    def judge(self, completions: Sequence[Completion]) -> list[ScoredCompletion]:
        return self._judge(completions)

    @with_points
    def put(self, pairs: Sequence[Pair]) -> PutReceipt:
        return self._buffer.put(pairs)

    @with_points
    def declare_snapshot(self, round_: int) -> SnapshotManifest:
        live, config = self._live(), self._config
        query = snapshot_query(config.buffer, round_=round_, live_version=live, seed=config.seed)
        self._buffer.release(round_, config.votes)
        return self._buffer.declare_snapshot(
            query, live_version=live, retention_rounds=config.buffer.retention_rounds
        )

    @with_points
    def train(
        self, snapshot: SnapshotManifest, parent: int, canaries: tuple[tuple[int, ...], ...]
    ) -> PolicyManifest:
        candidate = snapshot.round + 1
        if not self._registry.has(candidate):
            self._train(snapshot, self._registry.manifest(parent), candidate)
        return self._registry.manifest(candidate)

    def close(self) -> None:
        """What the end of the process does: the buffer has no owner any more."""
        self._buffer.close()

    def _judge(self, completions: Sequence[Completion]) -> list[ScoredCompletion]:
        return [ScoredCompletion(each, Judgement(float(sum(each.token_ids))), "sum") for each in completions]

    def _train(self, snapshot: SnapshotManifest, parent: PolicyManifest, candidate: int) -> None:
        steps = [parent.step + 1 + place for place in range(STEPS_PER_ROUND)]
        history = [{"loss": _unit(f"{candidate} {step}"), "step": step} for step in steps]
        write_steps(self._storage, snapshot.round, history)
        manifest = PolicyManifest(
            version=candidate,
            parent=parent.version,
            snapshot=SnapshotRef(round=snapshot.round, rows=snapshot.rows, sha256=snapshot.sha256),
            step=steps[-1],
            metrics={
                **history[-1],
                "chosen_log_ratio": -99.0 if candidate in self._faults.trained_badly else 0.5,
            },
        )
        publish_weights(self._registry, manifest, f"{parent.files} {snapshot.sha256}")


class RunWithPoints(Run):
    """A run that passes a point before and after everything it keeps, and at each file."""

    def __init__(self, config: IterativeDPOConfig, prompts: Sequence[Prompt], at_point: AtPoint) -> None:
        super().__init__(config, prompts)
        self.at_point = at_point
        self.storage = self.folder.storage = StorageWithPoints(config.run_dir, at_point)
        self.registry = self.folder.registry = PolicyRegistry(self.storage)

    end_trial = with_points(Run.end_trial)
    start = with_points(Run.start)
    keep_scored = with_points(Run.keep_scored)
    finish = with_points(Run.finish)


def publish_weights(registry: PolicyRegistry, manifest: PolicyManifest, weights: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_file({"weights": torch.tensor(list(weights.encode()))}, Path(folder) / "model.safetensors")
        registry.publish(Path(folder), manifest)


def _answer(version: int, seed: str, end: str) -> Answer:
    token_ids = tuple(hashlib.sha256(f"{version} {seed}".encode()).digest()[: 3 + version])
    text = f"line\u2028of {token_ids}"  # A separator that ends a line of text, and none of JSON.
    return Answer(text, token_ids, -_unit(seed), version, end)


def _unit(seed: str) -> float:
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") / 2**32
