"""Findings as tables at the terminal."""

import math

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dpo_ray.evaluating.findings import Comparison, Measures
from dpo_ray.evaluating.outcome import Outcome
from dpo_ray.evaluating.sentences import interval, percent
from dpo_ray.evaluating.statistics import Estimate

_NONE = "–"


def comparison_table(outcome: Outcome) -> Table:
    """One line per policy beside the baseline."""
    titles = ("policy", "win rate", "95 % interval", "win/tie/loss %", "at equal length", "reward gain")
    table = Table(
        *titles, box=SIMPLE_HEAD, title=f"against {outcome.measures[0].policy}", title_justify="left"
    )
    for row in outcome.comparisons:
        table.add_row(row.policy, *_comparison_cells(row))
    return table


def measures_table(outcome: Outcome) -> Table:
    """One line per policy."""
    titles = ("policy", "reward", "KL", "sampled", "tokens", "distinct-1", "-2", "self-BLEU", "degenerate")
    table = Table(*titles, box=SIMPLE_HEAD)
    for row in outcome.measures:
        table.add_row(row.policy, *_measure_cells(row))
    return table


def number(value: float | None, form: str = ".3f") -> str:
    return _NONE if value is None or math.isnan(value) else format(value, form)


def _comparison_cells(row: Comparison) -> list[str]:
    shares = "/".join(f"{100 * share:.0f}" for share in (row.wins, row.ties, row.losses))
    controlled = "–" if row.controlled is None else f"{percent(row.controlled.value)}"
    return [
        percent(row.win_rate.value) + ("" if row.is_settled else " (noise)"),
        interval(row.win_rate),
        shares,
        controlled,
        _with_half_width(row.reward_gain),
    ]


def _measure_cells(row: Measures) -> list[str]:
    return [
        _with_half_width(row.reward),
        _with_half_width(row.kl, ".2f"),
        number(row.kl_sampled.value if row.kl_sampled else None, ".2f"),
        number(row.tokens.value if row.tokens else None, ".1f"),
        number(row.distinct_1),
        number(row.distinct_2),
        number(row.self_bleu),
        number(row.degenerate_share),
    ]


def _with_half_width(estimate: Estimate | None, form: str = ".3f") -> str:
    """The value, and half of its 95 % interval."""
    if estimate is None:
        return _NONE
    return f"{estimate.value:{form}} ± {(estimate.high - estimate.low) / 2:{form}}"
