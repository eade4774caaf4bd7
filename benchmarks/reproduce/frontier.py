"""Reward against KL for preference losses and RL, beside the exact frontier of an enumerable language.

`python benchmarks/reproduce/frontier.py` takes 7 minutes a seed; stopped, it goes on from frontier.json.
"""

import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.reproduce.baselines import Reinforce, best_of, learned_rewards, unlikelihood
from benchmarks.reproduce.frontier_evidence import (
    BETAS,
    CERTAIN,
    FAMILIES,
    MORE_SAMPLES,
    RL_BETAS,
    claims,
    plot,
    table,
)
from benchmarks.reproduce.language import Language, Point, build, exact_logps, train
from benchmarks.reproduce.preferences import Labels, labelled_pairs
from benchmarks.reproduce.results import Arm, Results, results_of
from dpo_ray.rounds import RoundPlan
from dpo_ray.types import Pair

NUM_PAIRS = 6400
HELD_OUT_PAIRS = 1200
EPOCHS = 4
EVERY = 40
"""Steps between two measurements; 100 batches are an epoch."""


class Bed:
    """A language, its pairs, and what is trained on them."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed = seed
        self.language = build(seed, folder)
        generator = torch.Generator().manual_seed(seed)
        self._sample = partial(
            self.language.sample, self.language.reference, per_prompt=4, generator=generator
        )
        self._train, self._held_out = self._sample(num_prompts=1200), self._sample(num_prompts=240)

    def pairs(self, labels: Labels) -> list[Pair]:
        """All six pairs of four completions of the reference."""
        return labelled_pairs(self._train, labels, per_prompt=4, seed=self.seed)[:NUM_PAIRS]

    @cached_property
    def learned(self) -> tuple[Tensor, float]:
        """[P, S] rewards learned from the same pairs, and their accuracy on held-out ones."""
        held_out = labelled_pairs(self._held_out, "bradley_terry", per_prompt=4, seed=1000 + self.seed)
        pairs = self.pairs("bradley_terry")
        return learned_rewards(self.language, pairs, held_out[:HELD_OUT_PAIRS], seed=self.seed)

    def facts(self) -> Arm:
        """The frontier, and where the optimum of each beta lies on it."""
        language = self.language
        best = language.rewards.max(1).values
        kls = numpy.linspace(0, 9, 91).tolist()
        return {
            "frontier": [[kl, language.frontier(kl)] for kl in kls],
            "optima": {f"{beta:g}": language.point(language.optimum(beta)) for beta in BETAS},
            "greatest reward": best.mean().item(),
            "entropy": -(language.reference.exp() * language.reference).sum(1).mean().item(),
        }

    def reward_model(self) -> Arm:
        """How good the learned reward is: on held-out labels, and as the reference meets the sentences."""
        rewards, accuracy = self.learned
        return {"accuracy": accuracy, "correlation": correlation(self.language, rewards)}

    def preference(self, labels: Labels, **loss: Any) -> Arm:
        """The learner's own training."""
        learner = self.language.learner(loss=loss, epochs=EPOCHS)
        plan = RoundPlan(self.pairs(labels), seed=self.seed)
        return self._arm((m.step, m.point) for m in train(self.language, learner, plan, every=EVERY))

    def unlikelihood(self, alpha: float) -> Arm:
        pairs = self.pairs("bradley_terry")
        return self._of_models(unlikelihood(self.language, pairs, alpha=alpha, epochs=EPOCHS, seed=self.seed))

    def reinforce(self, rewards: Tensor, beta: float, **settings: Any) -> Arm:
        return self._of_models(Reinforce(rewards, beta, **settings).train(self.language, seed=self.seed))

    def best_of(self, rewards: Tensor, n: int) -> Arm:
        return self._arm([(0, self.language.point(best_of(self.language.reference, rewards, n)))])

    def _of_models(self, models: Iterable[PreTrainedModel]) -> Arm:
        due = (item for item in enumerate(models, start=1) if item[0] % EVERY == 0)
        return self._arm((step, self.language.point(exact_logps(model))) for step, model in due)

    def _arm(self, trace: Iterable[tuple[int, Point]]) -> Arm:
        return {"trace": [[step, *point, self.language.gap(point)] for step, point in trace]}


def correlation(language: Language, rewards: Tensor) -> float:
    """Of [P, S] rewards with the true ones under the reference, as a mean over the prompts."""
    weights = language.reference.exp()
    ours, true = (each - (weights * each).sum(1, keepdim=True) for each in (rewards, language.rewards))
    spread = (weights * ours**2).sum(1) * (weights * true**2).sum(1)
    return ((weights * ours * true).sum(1) / spread.sqrt()).mean().item()


def arms(bed: Bed) -> dict[str, Callable[[], Arm]]:
    """Everything that is measured, by name."""
    noisy, certain = (partial(bed.preference, labels) for labels in ("bradley_terry", "certain"))
    rewards = {"learned": lambda: bed.learned[0], "true": lambda: bed.language.rewards}
    return {
        "language": bed.facts,
        "reward model": bed.reward_model,
        **{f"DPO β {beta:g}": partial(noisy, type="sigmoid", beta=beta) for beta in BETAS},
        **{f"IPO β {beta:g}": partial(noisy, type="ipo", beta=beta) for beta in (1, 0.5, 0.1)},
        **{f"MinorDPO β {beta:g}": partial(noisy, type="minor", beta=beta) for beta in (1, 0.1, 0.05)},
        "SimPO β 2": partial(noisy, type="simpo", beta=2.0),
        "preferred-FT": partial(noisy, type="sft"),
        **{f"unlikelihood α {alpha:g}": partial(bed.unlikelihood, alpha) for alpha in (0.1, 0.25, 0.5)},
        **{
            f"RL, {name} reward, β {beta:g}": lambda of=of, beta=beta: bed.reinforce(of(), beta)
            for name, of in rewards.items()
            for beta in RL_BETAS[name]
        },
        MORE_SAMPLES: lambda: bed.reinforce(bed.language.rewards, 0.1, num_draws=128),
        **{
            f"best of {n}, {name} reward": lambda of=of, n=n: bed.best_of(of(), n)
            for name, of in rewards.items()
            for n in (2, 4, 16)
        },
        **{f"DPO β {beta:g}, certain": partial(certain, type="sigmoid", beta=beta) for beta in (5, 1)},
        "IPO β 0.5, certain": partial(certain, type="ipo", beta=0.5),
    }


def measure(results: Results, seed: int) -> None:
    names = ["language", "reward model", MORE_SAMPLES, *CERTAIN, *chain(*FAMILIES.values())]
    if not results.lacks(seed, names):
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, arm in arms(Bed(seed, Path(folder))).items():
            results.run(seed, name, arm)


def main(arguments: Sequence[str] | None = None) -> None:
    results = results_of("frontier", __doc__, arguments)
    for seed in results.seeds:
        measure(results, seed)
    results.write(claims(results), [table(results)], plot(results))


if __name__ == "__main__":
    main()
