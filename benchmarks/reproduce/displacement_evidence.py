"""What became of the chosen answers: claims, tables and plot."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.reproduce.claims import Claim, markdown
from benchmarks.reproduce.results import COLOURS, MARKERS, Results

LOSSES: dict[str, dict[str, Any]] = {
    "DPO": {"type": "sigmoid", "beta": 0.1},
    "MinorDPO": {"type": "minor", "beta": 0.1},
    "DPOP": {"type": "dpop", "beta": 0.1},
    "IPO β 0.5": {"type": "ipo", "beta": 0.5},
}
RATES = (3e-4, 1e-3, 3e-3)
STEPS = (100, 600)
RULES: dict[str, dict[str, Any]] = {
    "accuracy": {"patience": 5},
    "KL": {"max_kl": 2.0},
    "chosen log-prob": {"max_chosen_drop": 3.0},
}
"""What may end a training, of the settings of `early_stopping`."""


def arm_names() -> list[str]:
    """Every loss at every rate to the end, and DPO with every rule that may stop it."""
    whole = [f"{loss}, {rate:g}" for loss in LOSSES for rate in RATES]
    return [*whole, *(f"DPO, {rate:g}, {rule}" for rule in RULES for rate in RATES)]


class State(NamedTuple):
    """A policy after some steps."""

    step: int
    kl: float
    reward: float
    gap: float
    """Reward below the frontier at this KL."""
    chosen_ratio: float
    """Mean log-ratio of the chosen answers to the reference, over the training pairs, in nats."""
    fallen: float
    """Share of the chosen answers that are less likely than under the reference."""
    accuracy: float
    """Of held-out pairs, the share whose chosen has the higher implicit reward."""


class Numbers:
    """What the claims ask of the results."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def trace(self, seed: int, arm: str) -> list[State]:
        return [State(*row) for row in self.results.of(seed, arm)["trace"]]

    def end(self, seed: int, arm: str) -> State:
        return self.trace(seed, arm)[-1]

    def grid(self, seed: int, loss: str) -> list[State]:
        """After each number of steps at each rate."""
        traces = [self.trace(seed, f"{loss}, {rate:g}") for rate in RATES]
        return [next(s for s in trace if s.step == step) for trace in traces for step in STEPS]


def claims(results: Results) -> list[Claim]:
    """Bounds of the first four lie halfway between no effect and the worst of seeds 101, 102, 103."""
    numbers, by_seed = Numbers(results), results.by_seed

    def highest(loss: str, field: str) -> dict[int, float]:
        return by_seed(lambda seed: max(getattr(state, field) for state in numbers.grid(seed, loss)))

    def least(loss: str, field: str) -> dict[int, float]:
        return by_seed(lambda seed: min(getattr(state, field) for state in numbers.grid(seed, loss)))

    def kl_share(seed: int) -> float:
        both = zip(numbers.grid(seed, "MinorDPO"), numbers.grid(seed, "DPO"), strict=True)
        return max(minor.kl / dpo.kl for minor, dpo in both)

    def lost(loss: str) -> dict[int, float]:
        """Reward of the best of the grid less that at the highest rate after most steps."""
        return by_seed(
            lambda seed: max(s.reward for s in numbers.grid(seed, loss)) - numbers.grid(seed, loss)[-1].reward
        )

    def saved(rule: str, field: str) -> dict[int, float]:
        """What stopping DPO at the highest rate changes."""
        arm = f"DPO, {RATES[-1]:g}"
        return by_seed(
            lambda s: getattr(numbers.end(s, f"{arm}, {rule}"), field) - getattr(numbers.end(s, arm), field)
        )

    return [
        Claim("DPO: chosen log-ratio, highest of all settings", "<", -1.2, highest("DPO", "chosen_ratio")),
        Claim("DPO: share of chosen that fell, least", ">", 0.62, least("DPO", "fallen")),
        Claim("MinorDPO: chosen log-ratio, least", ">", 0.17, least("MinorDPO", "chosen_ratio")),
        Claim("MinorDPO: share of chosen that fell, highest", "<", 0.45, highest("MinorDPO", "fallen")),
        Claim("MinorDPO's KL over DPO's, highest", "<", 0.75, by_seed(kl_share)),
        Claim("DPO: reward lost at 3e-3, 600 steps against its best", ">=", 0.3, lost("DPO")),
        Claim("MinorDPO: the same", "<=", 0.05, lost("MinorDPO")),
        *(
            claim
            for rule in RULES
            for claim in (
                Claim(f"stopping DPO at 3e-3 by {rule}: reward", ">", 0, saved(rule, "reward")),
                Claim("the same: distance to the frontier", "<", 0, saved(rule, "gap")),
            )
        ),
    ]


def tables(results: Results) -> list[str]:
    return [_grid_table(results), _stopping_table(results)]


def _grid_table(results: Results) -> str:
    """Means over the seeds after each number of steps at each rate."""
    numbers, rows = Numbers(results), []
    for loss in LOSSES:
        grids = [numbers.grid(seed, loss) for seed in results.seeds]
        for place, states in enumerate(zip(*grids, strict=True)):
            rate = RATES[place // len(STEPS)]
            arm = f"{loss}, {rate:g}"
            cpu_s = sum(results.of(seed, arm)["cpu_s"] for seed in results.seeds)
            time = f"{cpu_s:.0f}" if states[0].step == STEPS[-1] else ""
            rows.append([loss, f"{rate:g}, {states[0].step}", *_means(states), time])
    header = ["loss", "rate, steps", *_COLUMNS, "time, CPU s"]
    return markdown(header, rows, words=2)


def _stopping_table(results: Results) -> str:
    """Where DPO's training ended by each rule, beside its end and the best that there was on the way."""
    numbers, rows = Numbers(results), []
    for rate in RATES:
        arm = f"DPO, {rate:g}"
        best = [max(numbers.trace(seed, arm), key=lambda state: state.reward) for seed in results.seeds]
        ends = {rule: [numbers.end(seed, f"{arm}, {rule}") for seed in results.seeds] for rule in RULES}
        last = [numbers.end(seed, arm) for seed in results.seeds]
        for rule, states in {"best reward on the way": best, **ends, "none": last}.items():
            steps = ", ".join(str(state.step) for state in states)
            rows.append([f"{rate:g}", rule, steps, *_means(states)])
    return markdown(["rate", "stopped by", "at steps", *_COLUMNS], rows, words=3)


_COLUMNS = ("KL, nats", "reward", "below the frontier", "chosen log-ratio", "fallen", "accuracy")


def _means(states: Sequence[State]) -> list[str]:
    """Of all that a state has but its step."""
    columns = list(zip(*states, strict=True))[1:]
    return [f"{fmean(column):.2f}" for column in columns]


def plot(results: Results) -> Figure:
    """On the way at the highest rate, mean and range of the seeds; and where all settings ended."""
    figure, (ratio, reward, gap) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    numbers = Numbers(results)
    for number, loss in enumerate(LOSSES):
        style = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 5}
        states = list(zip(*(numbers.trace(s, f"{loss}, {RATES[-1]:g}") for s in results.seeds), strict=True))
        for axes, field in ((ratio, "chosen_ratio"), (reward, "reward")):
            _band(axes, states, field, {**style, "label": loss})
        ends = [state for seed in results.seeds for state in numbers.grid(seed, loss)]
        gap.plot([end.kl for end in ends], [end.gap for end in ends], **style, linestyle="")
    ratio.set(xlabel="step", ylabel="chosen log-ratio to the reference, nats", yscale="symlog")
    reward.set(xlabel="step", ylabel="mean reward", title=f"learning rate {RATES[-1]:g}")
    ratio.set_title(f"learning rate {RATES[-1]:g}")
    gap.set(xlabel="KL to the reference, nats per sentence", ylabel="reward below the frontier")
    gap.set_title("all rates, after 100 and 600 steps")
    figure.legend(*ratio.get_legend_handles_labels(), loc="outside lower center", ncols=len(LOSSES))
    for axes in (ratio, reward, gap):
        axes.grid(alpha=0.3)
    return figure


def _band(axes: Axes, states: Sequence[tuple[State, ...]], field: str, style: dict[str, Any]) -> None:
    """A line through the means of each step's states, in the band between least and greatest."""
    steps = [each[0].step for each in states]
    values = [[getattr(state, field) for state in each] for each in states]
    axes.plot(steps, list(map(fmean, values)), markevery=5, **style)
    axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=style["color"], alpha=0.2)
