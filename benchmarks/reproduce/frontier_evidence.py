"""What the frontier's points say: claims, table and plot."""

from itertools import chain, pairwise

import matplotlib.pyplot as plt
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.reproduce.claims import Claim, markdown
from benchmarks.reproduce.language import Point
from benchmarks.reproduce.results import COLOURS, MARKERS, Results

BETAS = (5.0, 2.0, 1.0, 0.5, 0.1, 0.05)
MATCHED = (0.3, 1.2)
"""Nats of KL between which methods are compared at the same KL."""
RL_BETAS = {"learned": (1, 0.5, 0.25, 0.1), "true": (1, 0.5, 0.1)}
"""A learned reward is flatter than the true one: for the same KL it takes a smaller beta."""
FAMILIES = {
    "DPO": [f"DPO β {beta:g}" for beta in BETAS],
    "IPO": ["IPO β 1", "IPO β 0.5", "IPO β 0.1"],
    "MinorDPO": ["MinorDPO β 1", "MinorDPO β 0.1", "MinorDPO β 0.05"],
    "SimPO": ["SimPO β 2"],
    "preferred-FT": ["preferred-FT"],
    "unlikelihood": [f"unlikelihood α {alpha:g}" for alpha in (0.1, 0.25, 0.5)],
    **{
        f"RL, {name} reward": [f"RL, {name} reward, β {b:g}" for b in betas]
        for name, betas in RL_BETAS.items()
    },
    **{f"best of n, {name} reward": [f"best of {n}, {name} reward" for n in (2, 4, 16)] for name in RL_BETAS},
}
"""Methods, and their arms with labels by Bradley and Terry."""
MORE_SAMPLES = "RL, true reward, β 0.1, four times the samples"
"""Beside the families: whether RL's gap at the smallest β is one of optimisation."""
CERTAIN = ("DPO β 5, certain", "DPO β 1, certain", "IPO β 0.5, certain")
"""Arms with certain labels."""


class Numbers:
    """What the claims ask of the results."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.by_seed = results.by_seed

    def trace(self, seed: int, name: str) -> list[tuple[int, Point, float]]:
        """Step, point and gap of each measurement."""
        rows = self.results.of(seed, name)["trace"]
        return [(step, Point(kl, reward), gap) for step, kl, reward, gap in rows]

    def kl(self, seed: int, name: str) -> float:
        return self.trace(seed, name)[-1][1].kl

    def gap(self, seed: int, name: str) -> float:
        return self.trace(seed, name)[-1][2]

    def best_kl(self, seed: int, beta: float) -> float:
        return self.results.of(seed, "language")["optima"][f"{beta:g}"][0]

    def highest_above(self, seed: int) -> float:
        """How far the best of all points lies above the frontier."""
        names = [*chain(*FAMILIES.values()), MORE_SAMPLES, *CERTAIN]
        return max(-gap for name in names for _, _, gap in self.trace(seed, name))

    def worst_gap_up_to(self, seed: int, kl: float) -> float:
        gaps = [self.gap(seed, name) for name in FAMILIES["DPO"] if self.kl(seed, name) <= kl]
        return max(gaps, default=float("nan"))

    def least_fall(self, seed: int) -> float:
        """Least ratio of the KLs of two neighbouring betas."""
        kls = [self.kl(seed, f"DPO β {beta:g}") for beta in (5, 1, 0.5, 0.1)]
        return min(below / above for above, below in pairwise(kls))

    def furthest_factor(self, seed: int) -> float:
        """Factor between the final KL and that of the optimum, furthest from 1, of betas from 0.5."""
        ratios = [self.kl(seed, f"DPO β {b:g}") / self.best_kl(seed, b) for b in BETAS if b >= 0.5]
        return max(max(ratio, 1 / ratio) for ratio in ratios)

    def slope(self, seed: int) -> float:
        """Of log KL against log beta, over the betas of the paper."""
        betas = (5, 1, 0.1, 0.05)
        kls = [self.kl(seed, f"DPO β {beta:g}") for beta in betas]
        return float(numpy.polyfit(numpy.log(betas), numpy.log(kls), 1)[0])

    def dpo_gap_at(self, seed: int, kl: float) -> float:
        """DPO's gap at some KL, between its two neighbouring betas."""
        ends = sorted((self.kl(seed, name), self.gap(seed, name)) for name in FAMILIES["DPO"])
        kls, gaps = zip(*ends, strict=True)
        return float(numpy.interp(kl, kls, gaps))

    def lead_over(self, family: str, seed: int) -> float:
        """By how much DPO is nearer to the frontier at the same KL, where that is least."""
        names = [name for name in FAMILIES[family] if MATCHED[0] <= self.kl(seed, name) <= MATCHED[1]]
        leads = [self.gap(seed, name) - self.dpo_gap_at(seed, self.kl(seed, name)) for name in names]
        return min(leads, default=float("nan"))

    def growth(self, seed: int, name: str) -> float:
        """KL after 400 steps over that after 80."""
        kls = {step: point.kl for step, point, _ in self.trace(seed, name)}
        return kls[400] / kls[80]


def claims(results: Results) -> list[Claim]:
    """PASS is what the publications and the mathematics lead one to expect, but for the last claim."""
    numbers, by_seed = Numbers(results), results.by_seed

    def growth(name: str) -> dict[int, float]:
        return by_seed(lambda seed: numbers.growth(seed, name))

    def lead(family: str) -> dict[int, float]:
        return by_seed(lambda seed: numbers.lead_over(family, seed))

    def dpo_gap_up_to(kl: float) -> dict[int, float]:
        return by_seed(lambda seed: numbers.worst_gap_up_to(seed, kl))

    def true_gap(seed: int) -> float:
        return max(numbers.gap(seed, name) for name in FAMILIES["RL, true reward"])

    above = by_seed(numbers.highest_above)
    factor = by_seed(numbers.furthest_factor)
    five, one, ipo = map(growth, CERTAIN)
    return [
        Claim("no point of any method lies above the frontier (by)", "<=", 1e-6, above),
        Claim("DPO's gap to the frontier where KL ≤ 0.5", "<=", 0.1, dpo_gap_up_to(0.5)),
        Claim("DPO's gap to the frontier where KL ≤ 1.25", "<=", 0.2, dpo_gap_up_to(1.25)),
        Claim("β is a dial of KL: least growth over β 5, 1, 0.5, 0.1", ">", 1, by_seed(numbers.least_fall)),
        Claim("KL within a factor of the optimum's, β ≥ 0.5", "<=", 2, factor),
        Claim("at equal KL, DPO is above RL on a learned reward by", ">", 0, lead("RL, learned reward")),
        Claim("at equal KL, DPO is above unlikelihood by", ">", 0, lead("unlikelihood")),
        Claim("RL on the true reward: gap to the frontier", "<=", 0.05, by_seed(true_gap)),
        Claim("certain labels, β 5: DPO's KL after 400 steps / 80", ">", 1.8, five),
        Claim("certain labels, β 1: DPO's KL after 400 steps / 80", ">", 1.8, one),
        Claim("certain labels, β 0.5: IPO's KL after 400 steps / 80", ">=", 0.9, ipo),
        Claim("the same, from above", "<=", 1.1, ipo),
        Claim(
            "*published:* at equal KL, DPO is above RL on the true reward by", ">", 0, lead("RL, true reward")
        ),
    ]


def table(results: Results) -> str:
    """Where each method ended: means over the seeds, and of the gap its range."""
    numbers, seeds = Numbers(results), results.seeds
    rows = []
    for name in [*chain(*FAMILIES.values()), MORE_SAMPLES, *CERTAIN]:
        ends = [numbers.trace(seed, name)[-1] for seed in seeds]
        gaps = [gap for _, _, gap in ends]
        kl, reward = (float(numpy.mean([point[place] for _, point, _ in ends])) for place in (0, 1))
        gap_range = f"{numpy.mean(gaps):.3f} ({min(gaps):.3f} to {max(gaps):.3f})"
        cpu_s = sum(results.of(seed, name)["cpu_s"] for seed in seeds)
        rows.append([name, f"{kl:.3f}", f"{reward:.3f}", gap_range, f"{cpu_s:.0f}"])
    return markdown(["method", "KL, nats", "reward", "below the frontier", "time, CPU s"], rows, words=1)


def plot(results: Results) -> Figure:
    """One seed's points under its frontier, and the gaps of all seeds."""
    figure, (reward, gap) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    numbers, seed = Numbers(results), results.seeds[0]
    reward.plot(
        *zip(*results.of(seed, "language")["frontier"], strict=True), color="black", label="frontier (exact)"
    )
    for number, family in enumerate(FAMILIES):
        hollow = number >= len(COLOURS)
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": "",
        }
        style |= {"markerfacecolor": "none"} if hollow else {}
        _scatter(reward, [numbers.trace(seed, name)[-1][1] for name in FAMILIES[family]], family, style)
        ends = [numbers.trace(s, name)[-1] for s in results.seeds for name in FAMILIES[family]]
        _scatter(gap, [Point(point.kl, below) for _, point, below in ends], family, style)
    reward.set(xlabel="KL to the reference, nats per sentence (root scale)", ylabel="mean reward")
    reward.set_title(f"Reward against KL, seed {seed}")
    gap.axhline(0, color="black")
    gap.set(xlabel="KL to the reference, nats per sentence (root scale)", ylabel="reward below the frontier")
    gap.set_title("Distance to the frontier, all seeds")
    for axes in (reward, gap):
        axes.grid(alpha=0.3)
        axes.set_xscale("function", functions=(numpy.sqrt, numpy.square))
        axes.set_xlim(0, 8.5)
    reward.legend(fontsize=8, loc="upper left")
    return figure


def _scatter(axes: Axes, points: list[Point], label: str, style: dict[str, str]) -> None:
    axes.plot([p.kl for p in points], [p.reward for p in points], label=label, **style)  # pyright: ignore[reportArgumentType]
