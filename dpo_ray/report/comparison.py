"""Several runs side by side: the settings that differ, curves over each other, the last numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_ray.metrics import number
from dpo_ray.report.charts import Curve, Level, line_chart
from dpo_ray.report.costs import costs
from dpo_ray.report.facts import (
    Point,
    Result,
    held_out,
    result,
    series,
    thinned,
    win_rate_vs_start,
)
from dpo_ray.report.figures import (
    Figure,
    by_round,
    by_step,
    held_out_pair_metrics,
    judge_metrics,
    shown,
)
from dpo_ray.report.record import RunRecord

Named = dict[str, RunRecord]
"""Runs by the names that the page calls them."""
_NO_DIFFERENCE = ("run_dir", "serving.port")


@dataclass(frozen=True, slots=True)
class LastNumbers:
    """One line of the comparison's table."""

    name: str
    result: Result
    length: float | None
    accuracy: float | None
    """Of an offline run, on held-out pairs."""
    num_steps: int
    seconds: float | None
    num_warnings: int


def run_names(run_dirs: Sequence[str]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    parts = [run_dir.rstrip("/").split("/") for run_dir in run_dirs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same run is named twice: give each of {', '.join(run_dirs)} once")


def differing_settings(runs: Named) -> dict[str, list[str]]:
    """By dotted name, the value in each run, empty where it has none.

    Those on which all agree that have them are left out: other jobs have other settings.
    """
    flat = [_flattened(record.config) for record in runs.values()]
    names = dict.fromkeys(name for settings in flat for name in settings if name not in _NO_DIFFERENCE)
    known = {name: {str(settings[name]) for settings in flat if name in settings} for name in names}
    return {
        name: [str(settings.get(name, "")) for settings in flat]
        for name, values in known.items()
        if len(values) > 1
    }


def last_numbers(runs: Named) -> list[LastNumbers]:
    return [_last_numbers(name, record) for name, record in runs.items()]


def curves_of_all(runs: Named) -> list[Figure]:
    """What was measured on held-out prompts or pairs."""
    own = [
        _over_rounds(runs, "Reward", "Held-out, mean.", lambda run: held_out(run, "eval/reward_mean")),
        by_round(
            "Win rate against the own start", "Held-out.", *_curves(runs, win_rate_vs_start), level=_EVEN
        ),
        _over_rounds(runs, "KL to the start", "Nats per completion.", lambda run: held_out(run, "kl/start")),
        Figure(
            "Reward against KL",
            "Further up and further left is better.",
            line_chart(_curves(runs, _reward_by_kl), x_label="KL to the start, nats"),
        ),
        _over_rounds(runs, "Length", "Mean tokens.", lambda run: held_out(run, "eval/length_mean")),
    ]
    return shown([*own, *_further(runs, judge_metrics), *_further(runs, held_out_pair_metrics)])


def steps_of_all(runs: Named) -> list[Figure]:
    """What the optimizers saw."""
    keys = {"Loss": "loss", "Accuracy": "rewards/accuracies", "Implicit reward margin": "rewards/margins"}
    return shown([by_step(title, *_curves(runs, _steps(key))) for title, key in keys.items()])


_EVEN = Level("even", 0.5)
_Points = Callable[[RunRecord], list[Point]]


def _curves(runs: Named, points_of: _Points) -> list[Curve]:
    # A run without points keeps its place: a colour is one run in all figures.
    return [Curve(name, points_of(record)) for name, record in runs.items()]


def _over_rounds(runs: Named, title: str, note: str, points_of: _Points) -> Figure:
    return by_round(title, note, *_curves(runs, points_of))


def _further(runs: Named, names_of: Callable[[RunRecord], list[str]]) -> list[Figure]:
    names = sorted({name for record in runs.values() for name in names_of(record)})
    return [_over_rounds(runs, name, "Held-out, mean.", _held_out(f"eval/{name}")) for name in names]


def _held_out(key: str) -> _Points:
    return lambda record: held_out(record, key)


def _steps(key: str) -> _Points:
    return lambda record: thinned(series(record.steps, key, "step"))


def _reward_by_kl(record: RunRecord) -> list[Point]:
    rows = [row for row in (record.start, *record.rounds) if row]
    return series(rows, "eval/reward_mean", "kl/start")


def _last_numbers(name: str, record: RunRecord) -> LastNumbers:
    reached = result(record)
    row = record.round_of(reached.version) if reached.version else {}
    spent = costs(record)
    return LastNumbers(
        name=name,
        result=reached,
        length=number(row, "eval/length_mean"),
        accuracy=number(row, "eval/rewards/accuracies"),
        num_steps=len(record.steps),
        seconds=spent.seconds if spent else None,
        num_warnings=sum(len(record.warnings(row)) for row in record.rounds),
    )


def _flattened(branch: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in branch.items():
        flat |= (
            _flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        )
    return flat
