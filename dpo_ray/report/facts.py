"""What a run's records say: its result, and its curves' points with their doubt."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from dpo_ray.evaluation import Interval, mean_interval, wilson
from dpo_ray.metrics import number
from dpo_ray.report.record import Row, RunRecord


class Point(NamedTuple):
    """One point of a curve; low and high bound its band."""

    x: float
    y: float
    low: float
    high: float


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


def result(record: RunRecord) -> Result:
    """The run's outcome, measured on held-out prompts."""
    version = record.result_version()
    row = record.round_of(version) if version else {}
    evaluation = record.evaluations.get(version or 0, [])
    rate, interval = _win_rate(row, "win_rate/vs_start", evaluation, record.evaluations.get(0, []))
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


def setting(config: Row, path: str) -> Any:
    """The value under a dotted path; None where the config lacks it."""
    branch: Any = config
    for key in path.split("."):
        branch = branch.get(key) if isinstance(branch, dict) else None
    return branch


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
    """A mean over held-out prompts, with its 95 % interval; x: rounds finished, so the start is at 0.

    The interval takes a prompt's completions for one draw; where they were not kept, there is none.
    """
    points: list[Point] = []
    for row in (record.start, *record.rounds):
        evaluation = record.evaluations.get(row.get("policy_version", -1), [])
        means = [fmean(values) for values in _by_prompt(evaluation, _VALUES.get(key, _judged(key))).values()]
        value = _mean_reward(row, evaluation) if key == "eval/reward_mean" else number(row, key)
        if row and value is not None:
            half = (mean_interval(means).high - fmean(means)) if len(means) > 1 else 0.0
            points.append(Point(row["round"] + 1, value, value - half, value + half))
    return points


def sample_reward(record: RunRecord) -> list[Point]:
    """Mean reward of each round's samples with its 95 % interval; x: rounds finished when they were made.

    The band takes the samples of one prompt for a single draw, so it is never too narrow.
    """
    num_prompts = setting(record.config, "sampling.prompts_per_round") or math.inf
    halves = [1.96 * (number(row, "reward/std") or 0.0) / math.sqrt(num_prompts) for row in record.rounds]
    means = [series([row], "reward/mean") for row in record.rounds]
    return [
        Point(p.x, p.y, p.y - half, p.y + half)
        for points, half in zip(means, halves, strict=True)
        for p in points
    ]


def win_rate_vs_start(record: RunRecord) -> list[Point]:
    """With its 95 % interval; x: rounds finished."""
    return _win_rates(record, "win_rate/vs_start", lambda version: 0)


def win_rate_vs_previous(record: RunRecord) -> list[Point]:
    """Against the version that each was trained from, with its 95 % interval; x: rounds finished."""
    return _win_rates(record, "win_rate/vs_previous", record.parent)


def wins_by_prompt(after: list[Row], before: list[Row]) -> list[float]:
    """Per held-out prompt, the share of (after, before) completions that after wins; a tie is half."""
    new, old = (_by_prompt(rows, _VALUES["eval/reward_mean"]) for rows in (after, before))
    return [
        fmean((a > b) + 0.5 * (a == b) for a in new[index] for b in old[index])
        for index in sorted(new.keys() & old.keys())
    ]


_Value = Callable[[Row], float | None]
"""What one held-out completion contributes to a mean."""


def _kl(row: Row) -> float | None:
    logp, at_start = number(row, "logp"), number(row, "start_logp")
    return None if logp is None or at_start is None else logp - at_start


_VALUES: dict[str, _Value] = {
    "eval/reward_mean": lambda row: number(row, "reward"),
    "eval/length_mean": lambda row: number(row, "length"),
    "kl/start": _kl,
}


def _judged(key: str) -> _Value:
    return lambda row: number(row.get("metrics") or {}, key.removeprefix("eval/"))


def _by_prompt(rows: list[Row], value_of: _Value) -> dict[int, list[float]]:
    values: defaultdict[int, list[float]] = defaultdict(list)
    for row in rows:
        if (value := value_of(row)) is not None:
            values[row["index"]].append(value)
    return values


def _mean_reward(row: Row, evaluation: list[Row]) -> float | None:
    if (recorded := number(row, "eval/reward_mean")) is not None:
        return recorded
    rewards = [reward for each in evaluation if (reward := number(each, "reward")) is not None]
    return fmean(rewards) if rewards else None


def _win_rates(record: RunRecord, key: str, rival: Callable[[int], int]) -> list[Point]:
    points: list[Point] = []
    for row in record.rounds:
        version = row["policy_version"]
        ours, theirs = (record.evaluations.get(each, []) for each in (version, rival(version)))
        rate, interval = _win_rate(row, key, ours, theirs)
        if rate is not None:
            points.append(Point(row["round"] + 1, rate, *(interval or (rate, rate))))
    return points


def _win_rate(
    row: Row, key: str, after: list[Row], before: list[Row]
) -> tuple[float | None, Interval | None]:
    """The recorded rate, else the counted one; the interval where the completions were kept."""
    wins = wins_by_prompt(after, before)
    recorded = number(row, key)
    rate = recorded if recorded is not None or not wins else fmean(wins)
    if rate is None or not wins:
        return rate, None
    return rate, wilson(rate, len(wins))
