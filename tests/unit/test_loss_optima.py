"""What the losses converge to on a bandit, where the optimum is known in closed form."""

import math
from collections.abc import Callable
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_ray.config.loss import LossConfig
from dpo_ray.losses import PairLogps, preference_loss

NUM_ANSWERS = 8
Graph = dict[tuple[int, int], float]
"""Weight of each ordered pair of answers that is compared, (preferred, other)."""


def bandit(seed: int = 0) -> tuple[Tensor, Tensor]:
    """[K] reference log-probs and [K] rewards, float64."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, NUM_ANSWERS, generator=generator, dtype=torch.float64)
    return torch.log_softmax(normal[0], 0), normal[1]


def bradley_terry(rewards: Tensor, pairs: dict[tuple[int, int], float]) -> Graph:
    """Both orders of each unordered pair, by how often it is compared and how often that order wins."""
    return {
        (a, b): weight * torch.sigmoid(rewards[a] - rewards[b]).item()
        for (i, j), weight in pairs.items()
        for a, b in ((i, j), (j, i))
    }


def expected_loss(logps: Tensor, reference: Tensor, graph: Graph, config: LossConfig) -> Tensor:
    """[] mean loss of pairs drawn from the graph under a policy with [K] log-probs."""
    preferred, other = (torch.tensor([pair[side] for pair in graph]) for side in (0, 1))
    one = torch.ones(len(graph), dtype=torch.float64)
    weight = torch.tensor(list(graph.values()), dtype=torch.float64)
    pairs = PairLogps(
        logps[preferred], logps[other], reference[preferred], reference[other], one, one, weight=weight
    )
    return preference_loss(pairs, config).sum() / weight.sum()


def minimise(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """[K] probabilities of the softmax policy at which the objective of its [K] log-probs is least."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=3000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(torch.log_softmax(logits, 0))
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return torch.softmax(logits.detach(), 0)


def optimum(reference: Tensor, graph: Graph, **settings: Any) -> Tensor:
    config = LossConfig.model_validate(settings)
    return minimise(lambda logps: expected_loss(logps, reference, graph, config), reference)


def total_variation(policy: Tensor, other: Tensor) -> float:
    return ((policy - other).abs().sum() / 2).item()


COMPLETE = dict.fromkeys(combinations(range(NUM_ANSWERS), 2), 1.0)
WEIGHTED = {(i, j): 1.0 + 3 * i + j**2 for i, j in COMPLETE}
RING = {(i, (i + 1) % NUM_ANSWERS): 1.0 for i in range(NUM_ANSWERS)}
GRAPHS = {"complete": COMPLETE, "weighted": WEIGHTED, "ring": RING}


@pytest.mark.parametrize("beta", [0.1, 0.5, 5.0])
@pytest.mark.parametrize("graph", GRAPHS)
def test_dpo_ends_at_the_closed_form_of_rlhf(graph: str, beta: float) -> None:
    """pi_ref exp(r / beta) / Z, Eq. 4 of arXiv:2305.18290, whatever is compared how often."""
    reference, rewards = bandit()
    found = optimum(reference, bradley_terry(rewards, GRAPHS[graph]), type="sigmoid", beta=beta)
    assert total_variation(found, torch.softmax(reference + rewards / beta, 0)) < 1e-6


def test_dpo_knows_nothing_of_answers_that_were_never_compared() -> None:
    reference, rewards = bandit()
    two_halves = {(i, j): 1.0 for i, j in COMPLETE if (i < 4) == (j < 4)}
    found = optimum(reference, bradley_terry(rewards, two_halves), type="sigmoid", beta=0.5)
    best = torch.softmax(reference + rewards / 0.5, 0)
    assert total_variation(found, best) > 0.05
    for half in (slice(0, 4), slice(4, 8)):
        assert total_variation(found[half] / found[half].sum(), best[half] / best[half].sum()) < 1e-6


def test_robust_dpo_ends_where_dpo_would_without_the_wrong_labels() -> None:
    reference, rewards = bandit()
    clean = bradley_terry(rewards, COMPLETE)
    flipped = {(a, b): 0.7 * clean[a, b] + 0.3 * clean[b, a] for a, b in clean}
    best = torch.softmax(reference + rewards, 0)
    found = optimum(reference, flipped, type="robust", beta=1.0, label_smoothing=0.3)
    assert total_variation(found, best) < 1e-6
    assert total_variation(optimum(reference, flipped, type="sigmoid", beta=1.0), best) > 0.05


@pytest.mark.parametrize("beta", [0.1, 0.5, 5.0])
def test_ipo_ends_at_its_closed_form(beta: float) -> None:
    """pi_ref exp(E_b P(a > b) / beta) / Z of arXiv:2310.12036, where pairs are drawn from mu x mu."""
    reference, rewards = bandit()
    mu = torch.softmax(torch.linspace(-1, 1, NUM_ANSWERS, dtype=torch.float64), 0)
    wins = torch.sigmoid(rewards[:, None] - rewards[None, :])
    graph = {(a, b): (mu[a] * mu[b] * wins[a, b]).item() for a, b in permutations(range(NUM_ANSWERS), 2)}
    best = torch.softmax(reference + wins @ mu / beta, 0)
    assert total_variation(optimum(reference, graph, type="ipo", beta=beta), best) < 1e-6


DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "forward_kl": lambda u: -torch.log(u),
    "js": lambda u: u * torch.log(u) - (u + 1) * torch.log((u + 1) / 2),
    "alpha": lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * -0.7),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_f_dpo_ends_where_reward_less_divergence_is_greatest(divergence: str) -> None:
    """max E_pi r - beta sum pi_ref f(pi / pi_ref), the objective of arXiv:2309.16240, maximised directly."""
    reference, rewards = bandit()

    def objective(logps: Tensor) -> Tensor:
        penalty = (reference.exp() * DIVERGENCES[divergence](torch.exp(logps - reference))).sum()
        return penalty - (logps.exp() * rewards).sum()

    graph = bradley_terry(rewards, COMPLETE)
    alpha = {"divergence_alpha": 0.3} if divergence == "alpha" else {}
    found = optimum(reference, graph, type="sigmoid", beta=1.0, divergence=divergence, **alpha)
    assert total_variation(found, minimise(objective, reference)) < 1e-6
    assert total_variation(found, optimum(reference, graph, type="sigmoid", beta=1.0)) > 0.01


def best_of_two(q: float, p: float, **settings: Any) -> float:
    """pi(first) where the expected loss is least: the reference has q, and the first wins with probability p.

    A bracket that shrinks around the least of 200 logits, reference included: losses may have a kink there.
    """
    config = LossConfig.model_validate(settings)
    reference = torch.tensor([q, 1 - q], dtype=torch.float64).log()
    centre, width = math.log(q / (1 - q)), 30.0
    for _ in range(12):
        steps = centre + width * torch.linspace(-1, 1, 201, dtype=torch.float64)
        logps = torch.log_softmax(torch.stack([steps, torch.zeros_like(steps)]), 0)
        first, second = logps - reference[:, None]
        one, zero = torch.ones_like(first), torch.zeros_like(first)
        wins = preference_loss(PairLogps(first, second, zero, zero, one, one), config)
        defeats = preference_loss(PairLogps(second, first, zero, zero, one, one), config)
        centre = steps[(p * wins + (1 - p) * defeats).argmin()].item()
        width /= 10
    return 1 / (1 + math.exp(-centre))


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("q", [0.3, 0.5, 0.8])
def test_minor_does_not_move_within_its_dead_zone(q: float, beta: float) -> None:
    """The optimum is the reference, for every beta, iff q / (1 + q) <= p <= 1 / (2 - q)."""
    low, high = q / (1 + q), 1 / (2 - q)
    for p in (low + 0.005, (low + high) / 2, high - 0.005):
        assert best_of_two(q, p, type="minor", beta=beta) == pytest.approx(q, abs=1e-9)
    assert best_of_two(q, low - 0.02, type="minor", beta=beta) < q - 1e-4
    assert best_of_two(q, high + 0.02, type="minor", beta=beta) > q + 1e-4


@pytest.mark.parametrize(("q", "p"), [(0.5, 0.9), (0.3, 0.7)])
def test_minor_of_noisy_labels_has_a_limit_below_one(q: float, p: float) -> None:
    """As beta falls, pi(first) rises to (2 p - 1) / p, where DPO's rises to 1."""
    limit = (2 * p - 1) / p
    found = [best_of_two(q, p, type="minor", beta=beta) for beta in (0.1, 0.01, 0.001)]
    assert found == sorted(found)
    assert limit - 1e-3 < found[-1] < limit
    assert best_of_two(q, p, type="sigmoid", beta=0.1) > 0.999


@pytest.mark.parametrize("beta", [0.2, 0.5, 2.0])
def test_certain_labels_stop_ipo_and_do_not_stop_dpo(beta: float) -> None:
    """From a uniform reference, IPO ends at sigma(1 / (2 beta)) and DPO goes to 1."""
    assert best_of_two(0.5, 1.0, type="ipo", beta=beta) == pytest.approx(
        1 / (1 + math.exp(-1 / (2 * beta))), abs=1e-6
    )
    assert best_of_two(0.5, 1.0, type="sigmoid", beta=beta) > 1 - 1e-9
