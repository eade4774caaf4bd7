"""What the controlled-sentiment runs show: claims, a table, and their plot under the frontier."""

from itertools import pairwise, product
from statistics import fmean
from typing import NamedTuple, get_args

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.reproduce.claims import Claim, markdown
from benchmarks.reproduce.film_bed import HELD_OUT, PER_PROMPT
from benchmarks.reproduce.film_labels import SCALE
from benchmarks.reproduce.preferences import Labels
from benchmarks.reproduce.results import COLOURS, MARKERS, Results
from benchmarks.reproduce.tilted import Point, most_reward, tilted

BETAS = (0.05, 0.1, 1.0, 5.0)
TITLES = {"sigmoid": "DPO", "ipo": "IPO", "certain": "certain", "bradley_terry": "Bradley-Terry"}


class Trained(NamedTuple):
    """What one training run was told."""

    loss: str
    labels: Labels
    beta: float

    @property
    def name(self) -> str:
        return f"{TITLES[self.loss]}, {TITLES[self.labels]} labels, β {self.beta:g}"


ARMS = [Trained(*each) for each in product(("sigmoid", "ipo"), get_args(Labels), BETAS)]


def trace(results: Results, seed: int, arm: Trained) -> list[Point]:
    """KL and reward after each epoch."""
    measured = results.of(seed, arm.name)
    return [Point(*each) for each in zip(measured["kl"], measured["reward"], strict=True)]


def growth(results: Results, seed: int, arm: Trained) -> float:
    """KL after the last epoch as a multiple of that after the first."""
    first, *_, last = trace(results, seed, arm)
    return last.kl / first.kl


def errors_above(results: Results, seed: int) -> float:
    """How far any point is above the frontier, in standard errors of its mean reward."""
    start = results.of(seed, "start")["rewards"]
    error = float(np.std(start)) / (HELD_OUT * PER_PROMPT) ** 0.5
    points = [point for arm in ARMS for point in trace(results, seed, arm)]
    return max((point.reward - most_reward(start, point.kl)) / error for point in points)


def worst_gap(results: Results, seed: int, *, kl: float) -> float:
    """Of DPO on Bradley-Terry labels, as far as it goes no further than `kl`."""
    start = results.of(seed, "start")["rewards"]
    arms = [arm for arm in ARMS if (arm.loss, arm.labels) == ("sigmoid", "bradley_terry")]
    points = [point for arm in arms for point in trace(results, seed, arm) if point.kl <= kl]
    return max(most_reward(start, point.kl) - point.reward for point in points)


def least_fall(results: Results, seed: int, labels: Labels) -> float:
    """The least factor between the final KLs of DPO at neighbouring betas."""
    kls = [trace(results, seed, Trained("sigmoid", labels, beta))[-1].kl for beta in BETAS]
    return min(lower / higher for lower, higher in pairwise(kls))


def claims(results: Results) -> list[Claim]:
    """Bounds as for the enumerable language; KLs are compared after all steps and after a fifth of them."""
    by_seed = results.by_seed
    above = by_seed(lambda seed: errors_above(results, seed))
    near, far = (by_seed(lambda seed, kl=kl: worst_gap(results, seed, kl=kl)) for kl in (0.5, 1.25))
    certain, erring = (
        by_seed(lambda seed, labels=labels: least_fall(results, seed, labels)) for labels in get_args(Labels)
    )
    factor = by_seed(lambda seed: furthest_factor(results, seed))
    return [
        Claim("points above the frontier, by standard errors", "<=", 3, above),
        Claim("certain labels: β is a dial of DPO's KL, least factor", ">", 1, certain),
        Claim("Bradley-Terry labels: the same", ">", 1, erring),
        Claim("Bradley-Terry labels: DPO's gap to the frontier where KL ≤ 0.5", "<=", 0.1, near),
        Claim("Bradley-Terry labels: DPO's gap to the frontier where KL ≤ 1.25", "<=", 0.2, far),
        Claim("Bradley-Terry labels, β ≥ 1: DPO's KL within a factor of the optimum's", "<=", 2, factor),
        *(claim for beta in (1.0, 5.0) for claim in growths(results, beta)),
        Claim("the two estimates of KL apart, as a share", "<=", 0.1, by_seed(lambda s: apart(results, s))),
    ]


def growths(results: Results, beta: float) -> list[Claim]:
    """On certain labels, KL after all epochs over KL after the first: DPO's grows, IPO's stays."""
    dpo, ipo = (
        results.by_seed(lambda seed, loss=loss: growth(results, seed, Trained(loss, "certain", beta)))
        for loss in ("sigmoid", "ipo")
    )
    return [
        Claim(f"certain labels, β {beta:g}: DPO's KL, last over first epoch", ">", 1.8, dpo),
        Claim(f"certain labels, β {beta:g}: IPO's KL, last over first epoch", ">=", 0.9, ipo),
        Claim("the same, from above", "<=", 1.1, ipo),
    ]


def furthest_factor(results: Results, seed: int) -> float:
    """How far DPO's KL ends from the optimum's at beta 1 and 5, as a factor."""
    start, factors = results.of(seed, "start")["rewards"], []
    for beta in (1.0, 5.0):
        ratio = (
            trace(results, seed, Trained("sigmoid", "bradley_terry", beta))[-1].kl / tilted(start, beta).kl
        )
        factors.append(max(ratio, 1 / ratio))
    return max(factors)


def apart(results: Results, seed: int) -> float:
    """Relative difference of the two means of KL over all arms' ends."""
    ends = [results.of(seed, arm.name) for arm in ARMS]
    whole, tokens = (fmean(end[name][-1] for end in ends) for name in ("kl", "kl_of_tokens"))
    return abs(whole - tokens) / whole


def table(results: Results) -> str:
    """Where each arm ended, with all seeds."""
    rows = []
    for arm in ARMS:
        arms = [results.of(seed, arm.name) for seed in results.seeds]
        cells = [
            ", ".join(f"{measured[name][place]:.2f}" for measured in arms)
            for name, place in (("kl", 0), ("kl", -1), ("reward", -1), ("grammatical", -1))
        ]
        gaps = [
            most_reward(results.of(seed, "start")["rewards"], end.kl) - end.reward
            for seed in results.seeds
            for end in trace(results, seed, arm)[-1:]
        ]
        seconds = sum(measured["wall_s"] for measured in arms)
        rows.append([arm.name, *cells, ", ".join(f"{gap:.2f}" for gap in gaps), f"{seconds:.0f}"])
    header = ["run", "KL, epoch 1", "KL, epoch 5", "reward", "grammatical", "below the frontier", "time, s"]
    return markdown(header, rows, words=1)


def plot(results: Results) -> Figure:
    """The frontier with all points, and KL over the epochs."""
    figure, (frontier, dpo, ipo) = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    seed = results.seeds[0]
    best = [tilted(results.of(seed, "start")["rewards"], beta) for beta in np.geomspace(0.05, 100, 200)]
    frontier.plot([p.kl for p in best], [p.reward for p in best], color="black", label="frontier")
    for number, (loss, labels) in enumerate(product(("sigmoid", "ipo"), get_args(Labels))):
        arms = [arm for arm in ARMS if (arm.loss, arm.labels) == (loss, labels)]
        points = [point for arm in arms for point in trace(results, seed, arm)]
        frontier.plot(
            [point.kl for point in points],
            [point.reward for point in points],
            MARKERS[number],
            color=COLOURS[number],
            markersize=4,
            label=f"{TITLES[loss]}, {TITLES[labels]}",
        )
    frontier.set(
        xlabel="KL to the start, nats per review", ylabel=f"true reward (praise: {SCALE:g}, blame: 0)"
    )
    frontier.set_title(f"Reward against KL after each epoch, seed {seed}")
    frontier.legend(fontsize=8, loc="lower right")
    for axes, loss in ((dpo, "sigmoid"), (ipo, "ipo")):
        draw_kls(axes, results, loss)
    for axes in (frontier, dpo, ipo):
        axes.grid(alpha=0.3)
    dpo.legend(fontsize=8)
    return figure


def draw_kls(axes: Axes, results: Results, loss: str) -> None:
    """KL over the epochs, mean of the seeds: a colour and marker per beta, dashed with labels that err."""
    for (number, beta), (labels, line) in product(enumerate(BETAS), zip(get_args(Labels), "-:", strict=True)):
        traces = [trace(results, seed, Trained(loss, labels, beta)) for seed in results.seeds]
        means = [fmean(point.kl for point in points) for points in zip(*traces, strict=True)]
        axes.semilogy(
            range(1, len(means) + 1),
            means,
            line,
            color=COLOURS[number],
            marker=MARKERS[number],
            label=f"β {beta:g}, {TITLES[labels]}",
        )
    axes.set(
        xlabel="epoch (40 steps)",
        ylabel="KL to the start, nats per review",
        title=f"{TITLES[loss]}, mean of the seeds",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
