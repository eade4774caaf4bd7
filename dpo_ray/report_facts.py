"""What a run's records say: its result, its curves' points, and examples from before and after."""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, NamedTuple

from dpo_ray.evaluation import Interval, wilson

Row = dict[str, Any]
"""One JSON object, as a file of the run's folder has it; any measurement may be absent or null."""

_NUM_EXAMPLES, _NUM_BEST, _NUM_WORST = 12, 4, 3


@dataclass(frozen=True, slots=True)
class RunRecord:
    """All that a report reads from a run's folder."""

    config_text: str
    config: Row
    start: Row
    """Measurements of version 0; empty where it was not measured."""
    rounds: tuple[Row, ...]
    steps: tuple[Row, ...]
    evaluations: dict[int, list[Row]]
    """Judged held-out completions, by policy version."""
    policies: dict[int, Row]
    """Manifests, by policy version."""
    snapshots: dict[int, Row]
    """Manifests, by round."""
    live: int | None
    moves: tuple[Row, ...] = ()
    """Moves of LIVE: promotions and rollbacks."""

    def round_of(self, version: int) -> Row:
        """The row of the round that made `version`; empty where there is none."""
        return next((row for row in self.rounds if row.get("policy_version") == version), {})

    def round_that_made(self, version: int) -> Row:
        """The row of the round whose candidate `version` was; empty while it is not finished."""
        return next((row for row in self.rounds if row["round"] == version - 1), {})

    def result_version(self) -> int | None:
        """The version that the run is judged by: the live one, or the newest while the start is live."""
        made = [row["policy_version"] for row in self.rounds if row.get("policy_version")]
        return self.live if self.live in made else max(made, default=None)


class Point(NamedTuple):
    """One point of a curve; low and high bound its band."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Example:
    """One held-out prompt with the first completion of each of two versions."""

    index: int
    prompt: str
    before: str
    after: str
    before_reward: float | None
    after_reward: float | None
    why: str = ""
    """Why this prompt is shown."""

    @property
    def change(self) -> float | None:
        """Reward after less reward before; None where the judge could not rate both."""
        if self.before_reward is None or self.after_reward is None:
            return None
        return self.after_reward - self.before_reward


@dataclass(frozen=True, slots=True)
class Result:
    """What the headline states; None: not known (yet)."""

    version: int | None
    is_live: bool
    num_rounds: int
    start_reward: float | None
    end_reward: float | None
    win_rate: float | None
    win_interval: Interval | None
    kl: float | None


def number(row: Row, key: str) -> float | None:
    """The finite number under `key`, if there is one."""
    value = row.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def series(rows: Sequence[Row], key: str, x_key: str = "round") -> list[Point]:
    """The points (`x_key`, `key`) of the rows that have both."""
    points = [(number(row, x_key), number(row, key)) for row in rows]
    return [Point(x, y, y, y) for x, y in points if x is not None and y is not None]


def thinned(points: list[Point], most: int = 400) -> list[Point]:
    """At most `most` points: means over equal stretches of the curve."""
    size = math.ceil(len(points) / most) or 1
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    return [Point(*map(fmean, zip(*stretch, strict=True))) for stretch in stretches]


def held_out(record: RunRecord, key: str) -> list[Point]:
    """Points of an `eval/`, `win_rate/` or `kl/` metric; x: rounds finished, so the start is at 0."""
    return series([{**row, "round": row["round"] + 1} for row in [record.start, *record.rounds] if row], key)


def held_out_reward(record: RunRecord) -> list[Point]:
    """Mean held-out reward with its standard error over prompts, where the completions were kept."""
    rows = [row for row in (record.start, *record.rounds) if row]
    points = [_reward_point(row, record.evaluations.get(row["policy_version"], [])) for row in rows]
    return [point for point in points if point]


def sample_reward(record: RunRecord) -> list[Point]:
    """Mean reward of each round's samples; x: rounds finished when they were made.

    The band takes the samples of one prompt for a single draw, so it is never too narrow.
    """
    num_prompts = setting(record.config, "sampling.prompts_per_round") or math.inf
    errors = [(number(row, "reward/std") or 0.0) / math.sqrt(num_prompts) for row in record.rounds]
    means = [series([row], "reward/mean") for row in record.rounds]
    return [
        Point(p.x, p.y, p.y - error, p.y + error)
        for points, error in zip(means, errors, strict=True)
        for p in points
    ]


def win_rate_over_rounds(record: RunRecord) -> list[Point]:
    """Win rate against the start with its 95 % interval; x: rounds finished."""
    start = record.evaluations.get(0, [])
    points: list[Point] = []
    for row in record.rounds:
        evaluation = record.evaluations.get(row["policy_version"], [])
        rate, interval = _win_rate(row, evaluation, start)
        if rate is not None:
            points.append(Point(row["round"] + 1, rate, *(interval or (rate, rate))))
    return points


def result(record: RunRecord) -> Result:
    """The run's outcome, measured on held-out prompts."""
    version = record.result_version()
    row = record.round_of(version) if version else {}
    evaluation = record.evaluations.get(version or 0, [])
    rate, interval = _win_rate(row, evaluation, record.evaluations.get(0, []))
    return Result(
        version=version,
        is_live=version is not None and version == record.live,
        num_rounds=len(record.rounds),
        start_reward=_mean_reward(record.start, record.evaluations.get(0, [])),
        end_reward=_mean_reward(row, evaluation) if version else None,
        win_rate=rate if version else None,
        win_interval=interval if version else None,
        kl=number(row, "kl/start"),
    )


def wins_by_prompt(after: list[Row], before: list[Row]) -> list[float]:
    """Per held-out prompt, the share of (after, before) completions that after wins; a tie is half."""
    new, old = _rewards_by_prompt(after), _rewards_by_prompt(before)
    return [
        fmean((a > b) + 0.5 * (a == b) for a in new[index] for b in old[index])
        for index in sorted(new.keys() & old.keys())
    ]


def examples(record: RunRecord) -> list[Example]:
    """About a dozen prompts: the biggest improvements, the worst changes, and others at random."""
    version = record.result_version()
    if version is None:
        return []
    before, after = (_first_by_prompt(record.evaluations.get(v, [])) for v in (0, version))
    return _chosen([_example(i, before[i], after[i]) for i in sorted(before.keys() & after.keys())])


def setting(config: Row, path: str) -> Any:
    """The value under a dotted path; None where the config lacks it."""
    branch: Any = config
    for key in path.split("."):
        branch = branch.get(key) if isinstance(branch, dict) else None
    return branch


def as_text(prompt: object) -> str:
    """A prompt for reading: text as it is, messages as `role: content` paragraphs."""
    if not isinstance(prompt, list):
        return str(prompt)
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def _chosen(candidates: list[Example]) -> list[Example]:
    rated = sorted((e for e in candidates if e.change is not None), key=lambda e: -(e.change or 0.0))
    best = [e for e in rated[:_NUM_BEST] if (e.change or 0.0) > 0]
    worst = rated[len(best) :][-_NUM_WORST:][::-1]
    taken = {e.index for e in best + worst}
    others = [e for e in candidates if e.index not in taken]
    count = min(len(others), _NUM_EXAMPLES - len(taken))
    drawn = sorted(random.Random(0).sample(others, count), key=lambda e: e.index)
    labelled = (("Biggest improvement", best), ("Drawn at random", drawn), ("Worst change", worst))
    return [replace(example, why=why) for why, group in labelled for example in group]


def _example(index: int, before: Row, after: Row) -> Example:
    return Example(
        index=index,
        prompt=as_text(before.get("prompt", "")),
        before=str(before.get("text", "")),
        after=str(after.get("text", "")),
        before_reward=number(before, "reward"),
        after_reward=number(after, "reward"),
    )


def _first_by_prompt(rows: list[Row]) -> dict[int, Row]:
    # Later rows must not replace earlier ones: picking a version's best answer would flatter it.
    return {row["index"]: row for row in reversed(rows)}


def _rewards_by_prompt(rows: list[Row]) -> dict[int, list[float]]:
    rewards: defaultdict[int, list[float]] = defaultdict(list)
    for row in rows:
        reward = number(row, "reward")
        if reward is not None:
            rewards[row["index"]].append(reward)
    return rewards


def _mean_reward(row: Row, evaluation: list[Row]) -> float | None:
    recorded = number(row, "eval/reward_mean")
    if recorded is not None:
        return recorded
    rewards = [reward for group in _rewards_by_prompt(evaluation).values() for reward in group]
    return fmean(rewards) if rewards else None


def _reward_point(row: Row, evaluation: list[Row]) -> Point | None:
    mean = _mean_reward(row, evaluation)
    if mean is None:
        return None
    means = [fmean(group) for group in _rewards_by_prompt(evaluation).values()]
    error = stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return Point(row["round"] + 1, mean, mean - error, mean + error)


def _win_rate(row: Row, after: list[Row], before: list[Row]) -> tuple[float | None, Interval | None]:
    """The recorded rate, else the counted one; the interval where the completions were kept."""
    wins = wins_by_prompt(after, before)
    recorded = number(row, "win_rate/vs_start")
    rate = recorded if recorded is not None or not wins else fmean(wins)
    if rate is None or not wins:
        return rate, None
    return rate, wilson(rate, len(wins))
