"""Findings as a table at the terminal, a column for each policy."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dpo_ray.evaluating.findings import Comparison, Measures
from dpo_ray.evaluating.outcome import Outcome
from dpo_ray.evaluating.sentences import interval, percent
from dpo_ray.evaluating.statistics import Estimate
from dpo_ray.report.page import format_number

_NONE = "–"


def findings_table(outcome: Outcome) -> Table:
    """What is measured of each policy, and what the others do against the first."""
    columns = [_measure_cells(each) for each in outcome.measures]
    for column, comparison in zip(columns[1:], outcome.comparisons, strict=True):
        column.update(_comparison_cells(comparison))
    rows = list(dict.fromkeys(name for column in reversed(columns) for name in column))
    table = Table("", *(each.policy for each in outcome.measures), box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(row, *(column.get(row, "") for column in columns))
    return table


def _comparison_cells(row: Comparison) -> dict[str, str]:
    shares = " / ".join(percent(share) for share in (row.wins, row.ties, row.losses))
    return {
        "win rate": _share(row.win_rate),
        "wins / ties / losses": shares,
        "win rate at equal length": _share(row.controlled),
        "reward gain": _with_interval(row.reward_gain),
    }


def _measure_cells(row: Measures) -> dict[str, str]:
    return {
        "reward": _with_interval(row.reward),
        **{name: format_number(value) for name, value in row.metrics.items()},
        "KL to the first": _with_interval(row.kl),
        "KL, sampled": _with_interval(row.kl_sampled),
        "tokens": _with_interval(row.tokens),
        "distinct-1, -2": f"{format_number(row.distinct_1)}, {format_number(row.distinct_2)}",
        "self-BLEU": format_number(row.self_bleu),
        "degenerate": percent(row.degenerate_share),
    }


def _share(estimate: Estimate | None) -> str:
    return _NONE if estimate is None else f"{percent(estimate.value)} ({interval(estimate)})"


def _with_interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return _NONE
    value, low, high = map(format_number, estimate)
    return f"{value} ({low} to {high})"
