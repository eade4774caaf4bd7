"""Online against offline at an equal label budget; newest pairs against all; a reference that moves.

`python benchmarks/reproduce/online.py [--seeds 0 1 2] [--out docs/evidence]` writes a table, numbers and a
plot. Every arm has six rounds of 400 completions of the enumerable language, all six pairs of each four
labelled, and 80 steps; rewards and KLs are exact.
"""

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, assert_never, get_args

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.reproduce.claims import Claim, markdown
from benchmarks.reproduce.language import Language, build
from benchmarks.reproduce.language_rounds import Rounds, improve
from benchmarks.reproduce.results import COLOURS, MARKERS, Results, results_of

BETAS = (0.3, 0.1)
Way = Literal["offline", "online", "online, newest pairs", "online, each round's own reference"]
WAYS: tuple[Way, ...] = get_args(Way)


def rounds_of(way: Way, beta: float) -> Rounds:
    match way:
        case "offline":
            return Rounds(beta, push_every=6)
        case "online":
            return Rounds(beta)
        case "online, newest pairs":
            return Rounds(beta, keep="newest")
        case "online, each round's own reference":
            return Rounds(beta, reference="round_start")
        case _:
            assert_never(way)


def arm_name(way: Way, beta: float) -> str:
    return f"{way}, β {beta:g}"


def measure(results: Results, seed: int) -> None:
    names = [arm_name(way, beta) for way in WAYS for beta in BETAS]
    if not results.lacks(seed, ["optimum", *names]):
        return
    with tempfile.TemporaryDirectory() as folder:
        language = build(seed, Path(folder))
        results.run(seed, "optimum", lambda: {f"{beta:g}": optimal_j(language, beta) for beta in BETAS})
        for way in WAYS:
            for beta in BETAS:
                rounds = rounds_of(way, beta)
                results.run(seed, arm_name(way, beta), lambda rounds=rounds: improve(language, rounds, seed))


def optimal_j(language: Language, beta: float) -> float:
    """The greatest reward - beta KL that there is."""
    point = language.point(language.optimum(beta))
    return point.reward - beta * point.kl


def claims(results: Results) -> list[Claim]:
    newest, own = WAYS[2:]
    late = partial(difference, results, beta=0.3)
    budget = results.by_seed(
        lambda seed: max(difference(results, "labels", "online", "offline", beta=b)[seed] for b in BETAS)
    )
    return [
        *(claim for beta in BETAS for claim in gains(results, beta)),
        Claim("labels of online less those of offline (none more)", "<=", 0, budget),
        Claim("β 0.3: J of newest pairs only, less that of all", "<", 0, late("J", newest, "online")),
        Claim("β 0.3: the same, less that of offline", "<", 0.15, late("J", newest, "offline")),
        Claim(
            "β 0.3: reward with each round's own reference, less fixed", ">", 0, late("reward", own, "online")
        ),
        Claim("β 0.3: KL with each round's own reference, less fixed", ">", 0, late("kl", own, "online")),
    ]


def gains(results: Results, beta: float) -> list[Claim]:
    """What sampling the policy itself is said to bring."""
    objective = difference(results, "J", "online", "offline", beta=beta)
    reward = difference(results, "reward", "online", "offline", beta=beta)
    return [
        Claim(f"β {beta:g}: J of online less that of offline", ">", 0, objective),
        Claim(f"β {beta:g}: the same, mean of the seeds", ">", 0.15, mean_of(objective)),
        Claim(f"β {beta:g}: reward of online less that of offline", ">", 0, reward),
    ]


def difference(results: Results, number: str, one: Way, other: Way, *, beta: float) -> dict[int, float]:
    """Of a number between two ways, by seed."""
    names = arm_name(one, beta), arm_name(other, beta)
    return results.by_seed(
        lambda seed: results.of(seed, names[0])[number] - results.of(seed, names[1])[number]
    )


def mean_of(by_seed: dict[int, float]) -> dict[int, float]:
    """The mean, shown with the first seed."""
    return {min(by_seed): sum(by_seed.values()) / len(by_seed)}


def table(results: Results) -> str:
    """Each number with all seeds."""
    rows = []
    for beta in BETAS:
        for way in WAYS:
            arms = [results.of(seed, arm_name(way, beta)) for seed in results.seeds]
            numbers = (", ".join(f"{arm[name]:.2f}" for arm in arms) for name in ("reward", "kl", "J", "gap"))
            labels = ", ".join(str(arm["labels"]) for arm in arms)
            rows.append([f"{beta:g}", way, *numbers, labels, f"{sum(arm['cpu_s'] for arm in arms):.0f}"])
        best = ", ".join(f"{results.of(seed, 'optimum')[f'{beta:g}']:.2f}" for seed in results.seeds)
        rows.append([f"{beta:g}", "*optimum*", "", "", best, "0", "", ""])
    header = [
        "β",
        "pairs",
        "reward",
        "KL, nats",
        "J = reward − β KL",
        "gap to frontier",
        "labels",
        "time, CPU s",
    ]
    return markdown(header, rows, words=2)


def plot(results: Results) -> Figure:
    """How far J stays below what can be reached, which is another number for each seed."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axes, beta in zip(panels, BETAS, strict=True):
        for place, way in enumerate(WAYS):
            missed = [
                results.of(seed, "optimum")[f"{beta:g}"] - results.of(seed, arm_name(way, beta))["J"]
                for seed in results.seeds
            ]
            places = [place + 0.12 * (number - 1) for number in range(len(missed))]
            axes.plot(places, missed, MARKERS[place], color=COLOURS[place])
            axes.plot([place - 0.25, place + 0.25], [sum(missed) / len(missed)] * 2, color=COLOURS[place])
        axes.set(title=f"β {beta:g}", xticks=range(len(WAYS)))
        axes.set_xticklabels([way.replace(", ", ",\n").replace("round's ", "round's\n") for way in WAYS])
        axes.grid(alpha=0.3, axis="y")
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("J of the optimum less J reached\n(a marker per seed, a line for their mean)")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    results = results_of("online", __doc__, arguments)
    for seed in results.seeds:
        measure(results, seed)
    results.write(claims(results), [table(results)], plot(results))


if __name__ == "__main__":
    main()
