"""DPO's and IPO's optima on a bandit, held against their closed forms on many comparison graphs.

`python benchmarks/reproduce/closed_form.py` takes a few seconds; it leaves closed_form.md, .json and .svg.
"""

import math
import random
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.reproduce.claims import Claim, markdown
from benchmarks.reproduce.results import COLOURS, MARKERS, Arm, Results, results_of
from dpo_ray.config import LossConfig
from dpo_ray.losses import PairLogps, preference_loss

NUM_ANSWERS = 8
BETAS = (0.05, 0.1, 0.5, 1.0, 5.0)
TOLERANCE = 1e-6
Edges = dict[tuple[int, int], float]
"""How often two answers are compared, the smaller number first."""


class Bandit:
    """One prompt with K answers of K lengths: a reference, rewards, and labels by Bradley and Terry."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(2, NUM_ANSWERS, generator=generator, dtype=torch.float64)
        self.reference, self.rewards = normal[0].log_softmax(0), normal[1]
        self.lengths = torch.arange(1, NUM_ANSWERS + 1)

    def wins(self) -> Tensor:
        """[K, K] how often the row's answer is preferred to the column's."""
        return torch.sigmoid(self.rewards[:, None] - self.rewards)

    def loss(self, logps: Tensor, edges: Edges, config: LossConfig) -> Tensor:
        """[] mean loss of a policy with [K] log-probs over all labels of the compared pairs."""
        chosen, rejected = torch.tensor([(*edge, *edge[::-1]) for edge in edges]).view(-1, 2).unbind(1)
        often = torch.tensor([often for often in edges.values() for _ in range(2)], dtype=torch.float64)
        pairs = PairLogps(
            chosen=logps[chosen],
            rejected=logps[rejected],
            ref_chosen=self.reference[chosen],
            ref_rejected=self.reference[rejected],
            chosen_length=self.lengths[chosen],
            rejected_length=self.lengths[rejected],
            weight=often * self.wins()[chosen, rejected],
        )
        return preference_loss(pairs, config).sum() / often.sum()

    def optimum(self, edges: Edges, **loss: Any) -> Tensor:
        """[K] probabilities of the softmax policy at which the loss is least."""
        config = LossConfig.model_validate(loss)
        return minimise(lambda logps: self.loss(logps, edges, config), self.reference)

    def dpo_optimum(self, beta: float) -> Tensor:
        """[K] reference exp(reward / beta) / Z. Eq. 4 of arXiv:2305.18290."""
        return (self.reference + self.rewards / beta).softmax(0)

    def ipo_optimum(self, beta: float, edges: Edges) -> Tensor:
        """[K] of the log-ratios that solve the least-squares problem of IPO, by the graph's Laplacian."""
        often = torch.zeros(NUM_ANSWERS, NUM_ANSWERS, dtype=torch.float64)
        for (one, other), count in edges.items():
            often[one, other] = often[other, one] = count
        laplacian = often.sum(1).diag() - often
        targets = (often * (2 * self.wins() - 1)).sum(1) / (2 * beta)
        return (self.reference + torch.linalg.pinv(laplacian) @ targets).softmax(0)

    def published_ipo_optimum(self, beta: float, mu: Tensor) -> Tensor:
        """[K] reference exp(E_mu P(answer preferred) / beta) / Z, for pairs of mu x mu. arXiv:2310.12036."""
        return (self.reference + self.wins() @ mu / beta).softmax(0)


def graphs(seed: int) -> dict[str, Edges]:
    """Connected ones: complete, ring, star, path, pairs of mu x mu, and five random ones with weights."""
    numbers, complete = range(NUM_ANSWERS), list(combinations(range(NUM_ANSWERS), 2))
    path = [(k, k + 1) for k in numbers[:-1]]
    mu = drawn_by(seed).tolist()
    return {
        "complete": dict.fromkeys(complete, 1.0),
        "drawn by mu x mu": {(i, j): mu[i] * mu[j] for i, j in complete},
        "ring": dict.fromkeys([*path, (0, NUM_ANSWERS - 1)], 1.0),
        "star": dict.fromkeys([(0, k) for k in numbers[1:]], 1.0),
        "path": dict.fromkeys(path, 1.0),
        **{f"random {number}": random_graph(random.Random(f"{seed} {number}")) for number in range(1, 6)},
    }


def drawn_by(seed: int) -> Tensor:
    """[K] mu, by which IPO's pairs are drawn in its paper."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(NUM_ANSWERS, generator=generator, dtype=torch.float64).softmax(0)


def random_graph(rng: random.Random) -> Edges:
    """A random tree and a few more edges, compared between 0.1 and 10 times."""
    tree = [(rng.randrange(node), node) for node in range(1, NUM_ANSWERS)]
    more = rng.sample(list(combinations(range(NUM_ANSWERS), 2)), k=rng.randrange(6))
    return {edge: 10 ** rng.uniform(-1, 1) for edge in sorted({*tree, *more})}


def minimise(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """[K] probabilities of the softmax policy at which a function of its [K] log-probs is least."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=5000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(logits.log_softmax(0))
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return logits.detach().softmax(0)


def distance(one: Tensor, other: Tensor) -> float:
    """Total variation between two [K] distributions."""
    return ((one - other).abs().sum() / 2).item()


def measure_graph(bandit: Bandit, edges: Edges) -> Arm:
    """By beta, how far DPO and IPO end from their closed forms."""
    dpo = {b: distance(bandit.optimum(edges, type="sigmoid", beta=b), bandit.dpo_optimum(b)) for b in BETAS}
    ipo = {
        b: distance(bandit.optimum(edges, type="ipo", beta=b), bandit.ipo_optimum(b, edges)) for b in BETAS
    }
    return {"DPO": {f"{b:g}": d for b, d in dpo.items()}, "IPO": {f"{b:g}": d for b, d in ipo.items()}}


def measure_published_ipo(bandit: Bandit, edges: Edges, mu: Tensor) -> Arm:
    """By beta, how far IPO ends from the form of its paper, which wants pairs of mu x mu."""
    found = {b: bandit.optimum(edges, type="ipo", beta=b) for b in BETAS}
    return {f"{b:g}": distance(found[b], bandit.published_ipo_optimum(b, mu)) for b in BETAS}


def measure_controls(bandit: Bandit, complete: Edges) -> Arm:
    """What must not end at the closed form: two halves that are never compared, and means over tokens."""
    half = NUM_ANSWERS // 2
    halves = {(i, j): 1.0 for i, j in complete if (i < half) == (j < half)}
    best = bandit.dpo_optimum(0.5)
    return {
        "two halves": distance(bandit.optimum(halves, type="sigmoid", beta=0.5), best),
        "mean over tokens": distance(bandit.optimum(complete, type="sigmoid_norm", beta=0.5), best),
    }


def of_two(share: float, wins: float, **loss: Any) -> float:
    """The best probability of the first of two answers that the reference gives `share`, by halving.

    The first is preferred with probability `wins`; the loss falls, then rises, in the policy's logit.
    """
    config = LossConfig.model_validate(loss)
    reference = torch.tensor([share, 1 - share], dtype=torch.float64).log()
    low, high = -40.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if _slope(middle, reference, wins, config) > 0 else (middle, high)
    return 1 / (1 + math.exp(-low))


def _slope(logit: float, reference: Tensor, wins: float, config: LossConfig) -> float:
    """Derivative of the mean loss by the logit of the first answer."""
    variable = torch.tensor(logit, dtype=torch.float64, requires_grad=True)
    first, second = (
        torch.stack([variable, torch.zeros_like(variable)]).log_softmax(0)[:, None] - reference[:, None]
    )
    zero, one = torch.zeros_like(first), torch.ones_like(first)
    right = preference_loss(PairLogps(first, second, zero, zero, one, one), config)
    wrong = preference_loss(PairLogps(second, first, zero, zero, one, one), config)
    (wins * right + (1 - wins) * wrong).sum().backward()
    assert variable.grad is not None
    return variable.grad.item()


def measure_two() -> Arm:
    """Two answers, equally likely at first: certain labels, and what MinorDPO makes of uncertain ones."""
    return {
        "DPO, certain": min(of_two(0.5, 1.0, type="sigmoid", beta=beta) for beta in BETAS),
        "IPO, certain": max(
            abs(of_two(0.5, 1.0, type="ipo", beta=beta) - 1 / (1 + math.exp(-1 / (2 * beta))))
            for beta in BETAS
        ),
        "MinorDPO, 0.66": max(abs(of_two(0.5, 0.66, type="minor", beta=beta) - 0.5) for beta in BETAS),
        "MinorDPO, 0.9": of_two(0.5, 0.9, type="minor", beta=0.001),
    }


def measure(results: Results, seed: int) -> None:
    bandit, all_graphs = Bandit(seed), graphs(seed)
    for name, edges in all_graphs.items():
        results.run(seed, name, lambda edges=edges: measure_graph(bandit, edges))
    drawn = all_graphs["drawn by mu x mu"]
    results.run(seed, "published IPO", lambda: measure_published_ipo(bandit, drawn, drawn_by(seed)))
    results.run(seed, "controls", lambda: measure_controls(bandit, all_graphs["complete"]))
    results.run(seed, "two answers", measure_two)


def claims(results: Results) -> list[Claim]:
    def worst(loss: str) -> dict[int, float]:
        return results.by_seed(
            lambda seed: max(max(results.of(seed, name)[loss].values()) for name in graphs(seed))
        )

    def control(name: str) -> dict[int, float]:
        return results.by_seed(lambda seed: results.of(seed, "controls")[name])

    def of_two(name: str) -> dict[int, float]:
        return results.by_seed(lambda seed: results.of(seed, "two answers")[name])

    published = results.by_seed(
        lambda seed: max(results.of(seed, "published IPO")[f"{beta:g}"] for beta in BETAS)
    )
    limit = 0.8 / 0.9
    return [
        Claim(
            "DPO ends at its closed form (distance, worst of all graphs and β)", "<", TOLERANCE, worst("DPO")
        ),
        Claim("IPO ends at its least-squares solution (the same)", "<", TOLERANCE, worst("IPO")),
        Claim("IPO on pairs of μ × μ ends at its published form", "<", TOLERANCE, published),
        Claim("control: halves never compared, DPO's distance", ">", 0.01, control("two halves")),
        Claim("control: means over tokens, DPO's distance", ">", 0.01, control("mean over tokens")),
        Claim("certain labels: DPO's π(better), least of all β", ">", 0.9999, of_two("DPO, certain")),
        Claim("certain labels: IPO's distance from σ(1 / 2β)", "<", 1e-5, of_two("IPO, certain")),
        Claim("66 % prefer one: how far MinorDPO moves, any β", "<", 1e-9, of_two("MinorDPO, 0.66")),
        Claim("90 %, β 0.001: MinorDPO's π(better)", "<", limit, of_two("MinorDPO, 0.9")),
    ]


def table(results: Results) -> str:
    """The worst distance of all seeds, by graph and loss, and its time."""
    seeds, rows = results.seeds, []
    for name in graphs(seeds[0]):
        arms = [results.of(seed, name) for seed in seeds]
        worst = (f"{max(max(arm[loss].values()) for arm in arms):.1e}" for loss in ("DPO", "IPO"))
        rows.append([name, *worst, f"{sum(arm['cpu_s'] for arm in arms):.1f}"])
    return markdown(["graph", "DPO", "IPO", "time, CPU s"], rows, words=1)


def plot(results: Results) -> Figure:
    """The distances over beta; of the random graphs the worst."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    names = list(graphs(results.seeds[0]))
    groups = {**{name: [name] for name in names[:5]}, "random, worst of 5": names[5:]}
    for axes, loss in zip(panels, ("DPO", "IPO"), strict=True):
        for number, (label, group) in enumerate(groups.items()):
            arms = [results.of(seed, name)[loss] for seed in results.seeds for name in group]
            distances = [max(arm[f"{beta:g}"] for arm in arms) for beta in BETAS]
            axes.loglog(BETAS, distances, label=label, color=COLOURS[number], marker=MARKERS[number])
        axes.axhline(TOLERANCE, color="black", linestyle="--", label="bound of the claim")
        axes.set(title=f"{loss}, worst seed", xlabel="β")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("total variation to the closed form")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    results = results_of("closed_form", __doc__, arguments)
    for seed in results.seeds:
        measure(results, seed)
    results.write(claims(results), [table(results)], plot(results))


if __name__ == "__main__":
    main()
