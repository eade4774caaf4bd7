"""Rounds on the enumerable language: who is sampled, which pairs are kept, and what is trained on them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

import torch

from benchmarks.reproduce.language import Language, exact_logps
from benchmarks.reproduce.preferences import labelled_pairs
from benchmarks.reproduce.results import Arm
from dpo_ray.rounds import RoundPlan, train_round
from dpo_ray.types import Pair

PER_PROMPT = 4
BATCH = 64


@dataclass(frozen=True, slots=True)
class Rounds:
    """How a policy is improved round by round."""

    beta: float
    num: int = 6
    steps: int = 80
    """Optimizer steps in each round."""
    prompts: int = 100
    """Of each round, with four completions each."""
    push_every: int = 1
    """Rounds from one push to the next; with `num`, the reference alone is sampled: offline training."""
    keep: Literal["all", "newest"] = "all"
    """Rounds whose pairs are trained on."""
    reference: Literal["start", "round_start"] = "start"
    loss: dict[str, Any] = field(default_factory=dict)
    """Settings beside beta."""


def improve(language: Language, rounds: Rounds, seed: int) -> Arm:
    """Where the policy ends, and how many labels that took."""
    learner = language.learner(
        loss={"beta": rounds.beta, **rounds.loss},
        reference={"kind": rounds.reference, "keep_logps": False},
        batch_size=BATCH,
    )
    generator = torch.Generator().manual_seed(seed)
    sampled, pairs, num_labels = language.reference, [], 0
    for round_ in range(rounds.num):
        if round_ and round_ % rounds.push_every == 0:
            sampled = exact_logps(learner.model)
        scored = language.sample(
            sampled, num_prompts=rounds.prompts, per_prompt=PER_PROMPT, generator=generator
        )
        label_seed = 1000 * seed + round_
        new = labelled_pairs(scored, "bradley_terry", per_prompt=PER_PROMPT, seed=label_seed)
        num_labels += len(new)
        pairs = new if rounds.keep == "newest" else [*pairs, *new]
        plan = RoundPlan(drawn(pairs, rounds.steps * BATCH, seed=label_seed), seed=seed, round=round_)
        train_round(learner, plan, on_step=lambda metrics, num_steps: None)
    point = language.point(exact_logps(learner.model))
    return {
        "reward": point.reward,
        "kl": point.kl,
        "J": point.reward - rounds.beta * point.kl,
        "gap": language.gap(point),
        "labels": num_labels,
    }


def drawn(pairs: Sequence[Pair], num: int, *, seed: int) -> list[Pair]:
    """So many pairs, each as often as the others or once more."""
    random, cycled = Random(seed), []
    while len(cycled) < num:
        cycled += random.sample(pairs, len(pairs))
    return cycled[:num]
