"""Which of many completions to pair: the extremes, all with each other, or the best and mean - 2 sigma.

`python benchmarks/reproduce/pair_rules.py [--seeds 0 1 2] [--out docs/evidence]` writes a table, numbers and
a plot. 400 draws of a prompt of the enumerable language get 4 to 64 completions of the reference each; every
arm has 200 steps of 64 pairs, labelled by the true reward.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.reproduce.claims import Claim, markdown
from benchmarks.reproduce.language import Language, build, exact_logps
from benchmarks.reproduce.language_rounds import BATCH, drawn
from benchmarks.reproduce.preferences import labelled_pairs
from benchmarks.reproduce.results import COLOURS, MARKERS, Arm, Results, results_of
from dpo_ray.config import PairingConfig
from dpo_ray.rounds import RoundPlan, train_round

RULES = ("best_vs_worst", "best_vs_two_sigma", "all_pairs")
SAMPLES = (4, 8, 16, 32, 64)
MOST_OF_ALL = 32
"""Completions of which all pairs are made: those of 64 would be 800,000."""
BETA = 0.1
DRAWS = 400
STEPS = 200


def arms() -> list[tuple[str, int]]:
    return [(rule, num) for rule in RULES for num in SAMPLES if rule != "all_pairs" or num <= MOST_OF_ALL]


def arm_name(rule: str, num: int) -> str:
    return f"{rule}, {num}"


def measure(results: Results, seed: int) -> None:
    if not results.lacks(seed, [arm_name(*arm) for arm in arms()]):
        return
    with tempfile.TemporaryDirectory() as folder:
        language = build(seed, Path(folder))
        for rule, num in arms():
            results.run(
                seed,
                arm_name(rule, num),
                lambda rule=rule, num=num: train_on(language, rule, num, seed),
            )


def train_on(language: Language, rule: str, num: int, seed: int) -> Arm:
    """Where the policy ends that learned from one rule's pairs."""
    scored = language.sample(
        language.reference,
        num_prompts=DRAWS,
        per_prompt=num,
        generator=torch.Generator().manual_seed(seed),
    )
    pairing = PairingConfig(rule=rule)
    pairs = labelled_pairs(scored, "certain", per_prompt=num, seed=seed, pairing=pairing)
    learner = language.learner(loss={"beta": BETA}, batch_size=BATCH)
    plan = RoundPlan(drawn(pairs, STEPS * BATCH, seed=seed), seed=seed)
    train_round(learner, plan, on_step=lambda metrics, num_steps: None)
    point = language.point(exact_logps(learner.model))
    return {
        "reward": point.reward,
        "kl": point.kl,
        "J": point.reward - BETA * point.kl,
        "gap": language.gap(point),
        "pairs": len(pairs),
        "rejected": sum(pair.rejected_reward or 0.0 for pair in pairs) / len(pairs),
    }


def claims(results: Results) -> list[Claim]:
    """The published reading, of a judge that is right; by reward, as there."""

    def reward(rule: str, num: int, seed: int) -> float:
        return results.of(seed, arm_name(rule, num))["reward"]

    few, most = SAMPLES[0], SAMPLES[-1]
    extremes, sigma, every = RULES
    fall = results.by_seed(
        lambda seed: max(reward(extremes, num, seed) for num in SAMPLES[:-1]) - reward(extremes, most, seed)
    )
    rise = results.by_seed(lambda seed: reward(sigma, most, seed) - reward(sigma, few, seed))
    lead = results.by_seed(lambda seed: reward(sigma, most, seed) - reward(extremes, most, seed))
    of_all = results.by_seed(
        lambda seed: reward(every, MOST_OF_ALL, seed) - reward(extremes, MOST_OF_ALL, seed)
    )
    return [
        Claim(
            f"*published:* {extremes} gets worse with samples: reward from its best to {most}", ">", 0, fall
        ),
        Claim(f"{sigma} gets better: reward with {most} samples less that with {few}", ">", 0, rise),
        Claim(f"with {most} samples, {sigma} is above {extremes} by", ">", 0, lead),
        Claim(f"with {MOST_OF_ALL} samples, {every} is above {extremes} by", ">", 0, of_all),
    ]


def table(results: Results) -> str:
    """Each number with all seeds."""
    rows = []
    for rule, num in arms():
        measured = [results.of(seed, arm_name(rule, num)) for seed in results.seeds]
        names = ("rejected", "reward", "kl", "J", "gap")
        numbers = (", ".join(f"{arm[name]:.2f}" for arm in measured) for name in names)
        pairs = ", ".join(str(arm["pairs"]) for arm in measured)
        rows.append([rule, str(num), pairs, *numbers, f"{sum(arm['cpu_s'] for arm in measured):.0f}"])
    header = ["rule", "samples", "pairs", "reward of the rejected", "reward", "KL, nats"]
    return markdown([*header, "J = reward − β KL", "gap to frontier", "time, CPU s"], rows, words=1)


def plot(results: Results) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    labels = {"reward": "mean reward", "gap": "reward below the frontier"}
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        for number, rule in enumerate(RULES):
            counts = [num for each, num in arms() if each == rule]
            measured = [
                [results.of(seed, arm_name(rule, num))[name] for seed in results.seeds] for num in counts
            ]
            means = [sum(values) / len(values) for values in measured]
            style = {"color": COLOURS[number], "marker": MARKERS[number]}
            axes.semilogx(counts, means, base=2, label=rule, **style)
            axes.fill_between(
                counts,
                [min(v) for v in measured],
                [max(v) for v in measured],
                alpha=0.15,
                color=COLOURS[number],
            )
        axes.set(xlabel="completions per prompt", ylabel=label, xticks=SAMPLES, xticklabels=SAMPLES)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle("Means of the seeds, and their range", fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    results = results_of("pair_rules", __doc__, arguments)
    for seed in results.seeds:
        measure(results, seed)
    results.write(claims(results), [table(results)], plot(results))


if __name__ == "__main__":
    main()
