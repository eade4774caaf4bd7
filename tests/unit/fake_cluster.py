"""The parts of a job as plain objects in this process, deterministic, with a hook at every line."""

import functools
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from dpo_ray.buffer import PreferenceBuffer, PutReceipt, SnapshotManifest, SnapshotQuery
from dpo_ray.config import IterativeDPOConfig
from dpo_ray.evaluation import evaluated, read_evaluation, write_evaluation
from dpo_ray.metrics import write_steps
from dpo_ray.registry import PolicyManifest, PolicyRegistry, SnapshotRef
from dpo_ray.run import Run
from dpo_ray.storage import Storage
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


class FakeCluster:
    """The calls of `Cluster`, each as repeatable as the real one."""

    def __init__(
        self, config: IterativeDPOConfig, at_point: AtPoint, *, bad_candidates: Sequence[int] = ()
    ) -> None:
        self.at_point = at_point
        self.pushed: list[int] = []
        self._config = config
        self._bad_candidates = bad_candidates
        self._storage = StorageWithPoints(config.run_dir, at_point)
        self._registry = PolicyRegistry(self._storage)
        self._buffer = PreferenceBuffer(f"sqlite:///{self._storage.local_root}/buffer.sqlite", self._storage)

    @with_points
    def sample(self, prompts: Sequence[Prompt], *, round_: int) -> list[Completion]:
        return self._sample(prompts, self._config.sampling.samples_per_prompt, f"round {round_}")

    @with_points
    def judge(self, completions: Sequence[Completion]) -> list[ScoredCompletion]:
        return [ScoredCompletion(each, Judgement(float(sum(each.token_ids))), "sum") for each in completions]

    @with_points
    def put(self, pairs: Sequence[Pair]) -> PutReceipt:
        return self._buffer.put(pairs)

    @with_points
    def declare_snapshot(self, round_: int) -> SnapshotManifest:
        limit = self._config.buffer.pairs_per_round
        query = SnapshotQuery(max_round=round_, min_policy_version=0, limit=limit, seed=self._config.seed)
        return self._buffer.declare_snapshot(query, live_version=self._live())

    @with_points
    def train(self, snapshot: SnapshotManifest, canaries: tuple[tuple[int, ...], ...]) -> PolicyManifest:
        candidate = snapshot.round + 1
        if not self._registry.has(candidate):
            self._train(snapshot, candidate)
        return self._registry.manifest(candidate)

    @with_points
    def promote(self, version: int) -> None:
        self._registry.promote(version)
        self.pushed.append(version)

    @with_points
    def evaluate(self, prompts: Sequence[Prompt]) -> None:
        live = self._live()
        if read_evaluation(self._storage, live) is not None:
            return
        completions = self._sample(prompts, 2, "held out")
        scored = [ScoredCompletion(each, Judgement(float(each.token_ids[0])), "sum") for each in completions]
        start_logps = [each.logp - live for each in completions]
        write_evaluation(self._storage, live, evaluated(scored, start_logps, per_prompt=2))

    def close(self) -> None:
        """What the end of the process does: the buffer has no owner any more."""
        self._buffer.close()

    def _train(self, snapshot: SnapshotManifest, candidate: int) -> None:
        parent = self._registry.manifest(self._live())
        steps = [parent.step + 1 + place for place in range(STEPS_PER_ROUND)]
        history = [{"loss": _unit(f"{candidate} {step}"), "step": step} for step in steps]
        write_steps(self._storage, snapshot.round, history)
        manifest = PolicyManifest(
            version=candidate,
            parent=parent.version,
            snapshot=SnapshotRef(round=snapshot.round, rows=snapshot.rows, sha256=snapshot.sha256),
            step=steps[-1],
            metrics={**history[-1], "chosen_log_ratio": -99.0 if candidate in self._bad_candidates else 0.5},
        )
        publish_weights(self._registry, manifest, f"{parent.files} {snapshot.sha256}")

    def _sample(self, prompts: Sequence[Prompt], num: int, seed: str) -> list[Completion]:
        live = self._live()
        seeds = [
            (prompt, f"{seed} {live} {prompt.token_ids} {place}")
            for prompt in prompts
            for place in range(num)
        ]
        return [_completion(prompt, live, text) for prompt, text in seeds]

    def _live(self) -> int:
        live = self._registry.live()
        assert live is not None
        return live


class RunWithPoints(Run):
    """A run that passes a point before and after everything it keeps, and at each file."""

    def __init__(self, config: IterativeDPOConfig, prompts: Sequence[Prompt], at_point: AtPoint) -> None:
        super().__init__(config, prompts)
        self.at_point = at_point
        self.storage = self.folder.storage = StorageWithPoints(config.run_dir, at_point)

    start = with_points(Run.start)
    keep_scored = with_points(Run.keep_scored)
    finish = with_points(Run.finish)


def publish_weights(registry: PolicyRegistry, manifest: PolicyManifest, weights: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_text(weights)
        registry.publish(Path(folder), manifest)


def _completion(prompt: Prompt, live: int, seed: str) -> Completion:
    token_ids = tuple(hashlib.sha256(seed.encode()).digest()[: 3 + live])
    text = f"line\u2028of {token_ids}"  # A separator that ends a line of text, and none of JSON.
    return Completion(prompt, text, token_ids, -_unit(seed), live, "stop")


def _unit(seed: str) -> float:
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") / 2**32
