"""What is measured of a round and of its optimizer steps."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_ray.buffer import SnapshotManifest, TrialVotes
from dpo_ray.evaluation import mean, mean_metrics
from dpo_ray.pairing import PairYield
from dpo_ray.storage import Storage
from dpo_ray.types import ScoredCompletion

StepMetrics = dict[str, float]
"""By name, as TRL names them."""


def number(row: Mapping[str, Any], key: str) -> float | None:
    """The finite number under `key`, if there is one."""
    value = row.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def sample_metrics(scored: Sequence[ScoredCompletion]) -> dict[str, float]:
    """How the policy that a round started with did on the round's own prompts."""
    rewards = [item.judgement.reward for item in scored if item.judgement.reward is not None]
    center = mean(rewards)
    cost = math.fsum(item.judgement.cost for item in scored)
    judged = mean_metrics([item.judgement.metrics for item in scored])
    return {
        "sample_version": min(item.completion.policy_version for item in scored),
        "reward/mean": center,
        "reward/std": mean([(reward - center) ** 2 for reward in rewards]) ** 0.5,
        "length/mean": mean([len(item.completion.token_ids) for item in scored]),
        "samples/unjudged": len(scored) - len(rewards),
        **{f"judge/{name}": value for name, value in judged.items()},
        **({"judge/cost": cost} if cost else {}),
    }


def pair_metrics(counts: PairYield, snapshot: SnapshotManifest) -> dict[str, float]:
    """Pairs that a round made, those that it trains on, and what became of its completions."""
    return {
        "pairs/made": counts.made,
        "pairs/kept": snapshot.rows,
        "pairs/age_mean": snapshot.age_mean,
        **counts.metrics(),
    }


def vote_metrics(votes: TrialVotes) -> dict[str, int]:
    """What people said of a candidate beside the live version; nothing where nobody voted."""
    compared = {"wins": votes.wins, "losses": votes.losses, "ties": votes.ties} if votes.compared else {}
    return {f"votes/{name}": num for name, num in (compared | votes.thumbs).items()}


def write_steps(storage: Storage, round_: int, history: Sequence[StepMetrics]) -> None:
    """The metrics of a round's optimizer steps; they are there before its candidate is."""
    storage.write_text(_steps_file(round_), "".join(json.dumps(step) + "\n" for step in history))


def read_steps(storage: Storage, round_: int) -> list[StepMetrics]:
    """[] before the round is trained."""
    if not storage.exists(_steps_file(round_)):
        return []
    return [json.loads(line) for line in storage.read_text(_steps_file(round_)).splitlines()]


def _steps_file(round_: int) -> str:
    return f"rounds/{round_:05d}/steps.jsonl"
