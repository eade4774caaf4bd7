"""Weights by how likely the policy is to say a pair (WPO), on stale pairs and on fresh ones.

`python benchmarks/reproduce/wpo.py [--seeds 0 1 2] [--out docs/evidence]` writes a table, numbers and a plot.
The rounds are those of online.py, beta 0.1: stale pairs all come from the reference, fresh ones from the
policy of each round.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.reproduce.claims import Claim, markdown
from benchmarks.reproduce.language import build
from benchmarks.reproduce.language_rounds import Rounds, improve
from benchmarks.reproduce.results import COLOURS, MARKERS, Results, results_of

BETA = 0.1
Weighting = Literal["none", "wpo", "wpo_sampler"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
PUSHES = {"stale pairs": 6, "fresh pairs": 1}
"""Rounds from one push to the next, of six."""


def arm_name(pairs: str, weighting: Weighting) -> str:
    return f"{pairs}, {weighting}"


def measure(results: Results, seed: int) -> None:
    names = [arm_name(pairs, weighting) for pairs in PUSHES for weighting in WEIGHTINGS]
    if not results.lacks(seed, names):
        return
    with tempfile.TemporaryDirectory() as folder:
        language = build(seed, Path(folder))
        for pairs, push_every in PUSHES.items():
            for weighting in WEIGHTINGS:
                rounds = Rounds(BETA, push_every=push_every, loss={"weighting": weighting})
                results.run(
                    seed, arm_name(pairs, weighting), lambda rounds=rounds: improve(language, rounds, seed)
                )


def claims(results: Results) -> list[Claim]:
    def gain(pairs: str, weighting: Weighting) -> dict[int, float]:
        return results.by_seed(
            lambda seed: (
                results.of(seed, arm_name(pairs, weighting))["J"]
                - results.of(seed, arm_name(pairs, "none"))["J"]
            )
        )

    stale, fresh = gain("stale pairs", "wpo"), gain("fresh pairs", "wpo")
    return [
        Claim("stale pairs: J with wpo less that without weights", ">", 0, stale),
        Claim("fresh pairs: J with wpo less that without weights", ">", 0, fresh),
        Claim(
            "wpo gains more on stale pairs than on fresh ones, by",
            ">",
            0,
            {seed: stale[seed] - fresh[seed] for seed in stale},
        ),
        Claim(
            "stale pairs: J with wpo_sampler less that without weights",
            ">",
            0,
            gain("stale pairs", "wpo_sampler"),
        ),
    ]


def table(results: Results) -> str:
    """Each number with all seeds."""
    rows = []
    for pairs in PUSHES:
        for weighting in WEIGHTINGS:
            arms = [results.of(seed, arm_name(pairs, weighting)) for seed in results.seeds]
            numbers = (", ".join(f"{arm[name]:.2f}" for arm in arms) for name in ("reward", "kl", "J", "gap"))
            rows.append([pairs, weighting, *numbers, f"{sum(arm['cpu_s'] for arm in arms):.0f}"])
    header = [
        "pairs",
        "weighting",
        "reward",
        "KL, nats",
        "J = reward − β KL",
        "gap to frontier",
        "time, CPU s",
    ]
    return markdown(header, rows, words=2)


def plot(results: Results) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axes, pairs in zip(panels, PUSHES, strict=True):
        for number, seed in enumerate(results.seeds):
            reached = [results.of(seed, arm_name(pairs, weighting))["J"] for weighting in WEIGHTINGS]
            style = {"color": COLOURS[number], "marker": MARKERS[number]}
            axes.plot(range(len(WEIGHTINGS)), reached, label=f"seed {seed}", **style)
        axes.set(title=pairs, xlabel="training.loss.weighting", xticks=range(len(WEIGHTINGS)))
        axes.set_xticklabels(WEIGHTINGS)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"J = reward − {BETA:g} KL at the end")
    panels[0].legend(fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    results = results_of("wpo", __doc__, arguments)
    for seed in results.seeds:
        measure(results, seed)
    results.write(claims(results), [table(results)], plot(results))


if __name__ == "__main__":
    main()
