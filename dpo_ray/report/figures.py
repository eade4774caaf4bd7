"""Which figures a report shows of its rounds, steps and pairs, and what each is drawn from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dpo_ray.metrics import number
from dpo_ray.pairing.yields import COMPLETION_LOSSES, MATCH_LOSSES
from dpo_ray.report.charts import Bars, Curve, Level, grouped_bars, line_chart, stacked_bars
from dpo_ray.report.costs import PHASES
from dpo_ray.report.facts import (
    held_out,
    sample_reward,
    series,
    setting,
    thinned,
    win_rate_vs_previous,
    win_rate_vs_start,
)
from dpo_ray.report.record import RunRecord

_OWN_KEYS = {"eval/reward_mean", "eval/reward_std", "eval/length_mean", "judge/cost"}
_ROUNDS, _STEPS, _ROUND = "rounds finished", "optimizer step", "round"


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the page."""

    title: str
    note: str
    svg: Markup


def over_rounds(record: RunRecord) -> list[Figure]:
    """What the rounds did to the policy, and the samples that they learnt from."""
    lengths = Curve("samples", series(record.rounds, "length/mean"))
    return shown(
        [
            by_round(
                "Reward",
                "The judge's, mean.",
                Curve("held-out", held_out(record, "eval/reward_mean")),
                Curve("samples", sample_reward(record)),
            ),
            by_round(
                "Win rate",
                "Held-out.",
                Curve("vs start", win_rate_vs_start(record)),
                Curve("vs version before", win_rate_vs_previous(record)),
                level=Level("even", 0.5),
            ),
            by_round(
                "KL to the start", "Nats per completion.", Curve("held-out", held_out(record, "kl/start"))
            ),
            *[_judge_figure(record, name) for name in judge_metrics(record)],
            by_round(
                "Length",
                "Mean tokens per completion.",
                Curve("held-out", held_out(record, "eval/length_mean")),
                lengths,
            ),
            *[_pairs_figure(record, name) for name in held_out_pair_metrics(record)],
        ]
    )


def over_steps(record: RunRecord) -> list[Figure]:
    """What the optimizer saw."""
    log_two = Level("ln 2", math.log(2)) if _starts_at_log_two(record) else None
    both = ("chosen", "rejected")
    return shown(
        [
            _by_step(record, "Loss", {"loss": "loss"}, level=log_two),
            _by_step(record, "Accuracy", {"accuracy": "rewards/accuracies"}, level=Level("chance", 0.5)),
            _by_step(record, "Implicit reward margin", {"margin": "rewards/margins"}),
            _by_step(record, "Implicit rewards", {side: f"rewards/{side}" for side in both}),
            _by_step(record, "Log-probs, nats", {side: f"logps/{side}" for side in both}),
            _by_step(record, "Gradient norm", {"norm": "grad_norm"}),
        ]
    )


def time_and_pairs(record: RunRecord) -> list[Figure]:
    """What the rounds cost, and the pairs that they gave."""
    xs = [row["round"] for row in record.rounds]
    phases = [Bars(phase, _heights(record, f"time/{phase}_s")) for phase in PHASES]
    spent = [sum(heights) for heights in zip(*(bars.heights for bars in phases), strict=True)]
    whole = _heights(record, "time/round_s")
    other = Bars("other", tuple(max(0.0, w - s) for w, s in zip(whole, spent, strict=True)))
    pairs = [Bars(label, _heights(record, f"pairs/{label}")) for label in ("made", "kept")]
    age = Curve("age", series(record.rounds, "pairs/age_mean"))
    return shown(
        [
            Figure("Time per round", "Seconds.", stacked_bars(xs, [*phases, other], x_label=_ROUND)),
            Figure("Pairs per round", "", grouped_bars(xs, pairs, x_label=_ROUND)),
            _yield_figure(record, "Completions not paired", COMPLETION_LOSSES),
            _yield_figure(
                record, "What the pair rule matched", ("kept", "too_old", "not_drawn", *MATCH_LOSSES)
            ),
            Figure("Age of the pairs", "Versions, mean.", line_chart([age], x_label=_ROUND)),
        ]
    )


def shown(figures: list[Figure]) -> list[Figure]:
    """Those that have something to show."""
    return [figure for figure in figures if figure.svg]


def by_round(title: str, note: str, *curves: Curve, level: Level | None = None) -> Figure:
    return Figure(title, note, line_chart(curves, x_label=_ROUNDS, level=level))


def by_step(title: str, *curves: Curve, level: Level | None = None) -> Figure:
    return Figure(title, "", line_chart(curves, x_label=_STEPS, level=level))


def held_out_pair_metrics(record: RunRecord) -> list[str]:
    """What offline epochs measure on held-out pairs."""
    names = {key.removeprefix("eval/") for row in record.rounds for key in row if key.startswith("eval/")}
    return [] if record.start else sorted(names)


def judge_metrics(record: RunRecord) -> list[str]:
    """What the judge measures beside the reward."""
    rows = (record.start, *record.rounds) if record.start else ()
    keys = {key for row in rows for key in row} - _OWN_KEYS
    return sorted({key.partition("/")[2] for key in keys if key.startswith(("judge/", "eval/"))})


def _judge_figure(record: RunRecord, name: str) -> Figure:
    return by_round(
        name,
        "A measurement by the judge, mean.",
        Curve("held-out", held_out(record, f"eval/{name}")),
        Curve("samples", series(record.rounds, f"judge/{name}")),
    )


def _pairs_figure(record: RunRecord, name: str) -> Figure:
    return by_round(name, "On held-out pairs, mean.", Curve("held-out", held_out(record, f"eval/{name}")))


_LOG_TWO_AT_FIRST = (
    "sigmoid",
    "robust",
    "sigmoid_norm",
    "minor",
    "dpop",
    "tdpo1",
    "tdpo2",
    "aot",
    "aot_unpaired",
)


def _starts_at_log_two(record: RunRecord) -> bool:
    """Whether the loss is ln 2 where the policy is the reference."""
    plain = not setting(record.config, "training.loss.nll_coef") and not setting(
        record.config, "training.loss.plus"
    )
    return plain and setting(record.config, "training.loss.type") in _LOG_TWO_AT_FIRST


def _yield_figure(record: RunRecord, title: str, counts: Sequence[str]) -> Figure:
    xs = [row["round"] for row in record.rounds]
    bars = [Bars(name.replace("_", " "), _heights(record, f"yield/{name}")) for name in counts]
    return Figure(title, "And why.", stacked_bars(xs, bars, x_label=_ROUND))


def _heights(record: RunRecord, key: str) -> tuple[float, ...]:
    return tuple(number(row, key) or 0.0 for row in record.rounds)


def _by_step(record: RunRecord, title: str, keys: dict[str, str], level: Level | None = None) -> Figure:
    curves = [Curve(label, thinned(series(record.steps, key, "step"))) for label, key in keys.items()]
    return by_step(title, *curves, level=level)
