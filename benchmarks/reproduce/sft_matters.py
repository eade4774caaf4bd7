"""DPO on the same pairs of written texts, from no, little and enough supervised fine-tuning.

`python benchmarks/reproduce/sft_matters.py` takes 2 minutes a seed; stopped, it goes on from its JSON.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.reproduce.claims import Claim, markdown
from benchmarks.reproduce.language import build, train
from benchmarks.reproduce.preferences import labelled_pairs
from benchmarks.reproduce.results import COLOURS, MARKERS, Arm, Results, results_of
from dpo_ray.rounds import RoundPlan

STARTS = {"none": 0, "weak": 25, "good": 400}
"""Steps of supervised fine-tuning, 64 texts each."""
BETAS = (0.5, 0.1)
RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "accuracy": {"patience": 5},
    "KL": {"max_kl": 2.0},
}
"""What may end DPO, of the settings of `early_stopping`."""
NUM_PAIRS = 1920
HELD_OUT_PAIRS = 640
EPOCHS = 12
EVERY = 10


class State(NamedTuple):
    """A policy after some steps."""

    step: int
    kl: float
    """To the language of the written texts, in nats."""
    reward: float
    gap: float
    """Reward below the best that any policy has at this distance from the written texts."""
    own_kl: float
    """To the policy that DPO started from, in nats."""


class Bed:
    """A start, and pairs of written texts with labels by Bradley and Terry; the same pairs for each start."""

    def __init__(self, seed: int, sft_steps: int, folder: Path) -> None:
        self.seed = seed
        self.start = build(seed, folder, sft_steps=sft_steps)
        self.written = replace(self.start, reference=self.start.corpus)
        generator = torch.Generator().manual_seed(seed)
        scored = self.start.sample(self.start.corpus, num_prompts=480, per_prompt=4, generator=generator)
        self._pairs = labelled_pairs(scored, "bradley_terry", per_prompt=4, seed=seed)

    def best(self) -> Arm:
        """The frontier around the written texts, the same from each start."""
        kls = [each / 10 for each in range(81)]
        return {"frontier": [[kl, self.written.frontier(kl)] for kl in kls]}

    def dpo(self, beta: float, stopping: dict[str, Any]) -> Arm:
        learner = self.start.learner(
            loss={"type": "sigmoid", "beta": beta},
            epochs=EPOCHS,
            early_stopping={"eval_every_steps": EVERY, **stopping},
        )
        held_out = self._pairs[NUM_PAIRS : NUM_PAIRS + HELD_OUT_PAIRS]
        plan = RoundPlan(self._pairs[:NUM_PAIRS], seed=self.seed, held_out=held_out)
        trace = train(self.start, learner, plan, every=EVERY)
        kept = (
            trace[-1:] if stopping else trace
        )  # Up to where it ends, the way is that of the whole training.
        start = self._state(0, self.start.reference)
        return {"trace": [start, *(self._state(measured.step, measured.logps) for measured in kept)]}

    def _state(self, step: int, logps: torch.Tensor) -> State:
        point = self.written.point(logps)
        return State(step, *point, self.written.gap(point), self.start.point(logps).kl)


def arm_name(start: str, beta: float, rule: str) -> str:
    return f"{start} SFT, β {beta:g}, stopped by {rule}"


def arms(bed: Bed, start: str) -> dict[str, Callable[[], Arm]]:
    return {
        arm_name(start, beta, rule): partial(bed.dpo, beta, stopping)
        for beta in BETAS
        for rule, stopping in RULES.items()
    }


def measure(results: Results, seed: int) -> None:
    names = ["best", *(arm_name(s, b, r) for s in STARTS for b in BETAS for r in RULES)]
    if not results.lacks(seed, names):
        return
    for start, sft_steps in STARTS.items():
        with tempfile.TemporaryDirectory() as folder:
            bed = Bed(seed, sft_steps, Path(folder))
            results.run(seed, "best", bed.best)
            for name, arm in arms(bed, start).items():
                results.run(seed, name, arm)


def trace(results: Results, seed: int, name: str) -> list[State]:
    return [State(*row) for row in results.of(seed, name)["trace"]]


def claims(results: Results) -> list[Claim]:
    def end(seed: int, start: str, beta: float, rule: str = "none") -> State:
        return trace(results, seed, arm_name(start, beta, rule))[-1]

    def nearer(start: str, beta: float) -> dict[int, float]:
        """By how much nearer to the best DPO ends from a good start."""
        return results.by_seed(lambda s: end(s, start, beta).gap - end(s, "good", beta).gap)

    def richer(start: str, beta: float) -> dict[int, float]:
        return results.by_seed(lambda s: end(s, "good", beta).reward - end(s, start, beta).reward)

    def saved(rule: str, beta: float) -> dict[int, float]:
        """By how much nearer to the best stopping ends, from a good start."""
        return results.by_seed(lambda s: end(s, "good", beta).gap - end(s, "good", beta, rule).gap)

    found: list[Claim] = []
    for beta in BETAS:
        for start in ("none", "weak"):
            name = f"β {beta:g}: good SFT ends nearer to the best than {start}, by"
            found.append(Claim(name, ">", 0, nearer(start, beta)))
            name = f"β {beta:g}: good SFT ends with more reward than {start}, by"
            found.append(Claim(name, ">", 0, richer(start, beta)))
        for rule in ("accuracy", "KL"):
            name = f"β {beta:g}: stopping by {rule} ends nearer to the best, by"
            found.append(Claim(name, ">", 0, saved(rule, beta)))
    return found


def table(results: Results) -> str:
    """Where each training began and ended; means over the seeds."""
    rows = []
    for start in STARTS:
        begin = [trace(results, seed, arm_name(start, BETAS[0], "none"))[0] for seed in results.seeds]
        rows.append([start, "", "before DPO", "", *_means(begin), ""])
        for beta in BETAS:
            for rule in RULES:
                name = arm_name(start, beta, rule)
                ends = [trace(results, seed, name)[-1] for seed in results.seeds]
                steps = ", ".join(str(state.step) for state in ends)
                cpu_s = sum(results.of(seed, name)["cpu_s"] for seed in results.seeds)
                rows.append([start, f"{beta:g}", rule, steps, *_means(ends), f"{cpu_s:.0f}"])
    columns = ["KL to written texts", "reward", "below the best there", "KL to start"]
    return markdown(["SFT", "β", "stopped by", "at steps", *columns, "time, CPU s"], rows, words=4)


def _means(states: Sequence[State]) -> list[str]:
    return [f"{fmean(column):.2f}" for column in list(zip(*states, strict=True))[1:]]


def plot(results: Results) -> Figure:
    """Reward against the distance to the written texts on the way of DPO, from each start."""
    figure, panels = plt.subplots(1, len(BETAS), figsize=(11, 4.5), sharey=True, layout="constrained")
    seed = results.seeds[0]
    frontier = results.of(seed, "best")["frontier"]
    for axes, beta in zip(panels, BETAS, strict=True):
        axes.plot(*zip(*frontier, strict=True), color="black", label="best (exact)")
        for number, start in enumerate(STARTS):
            states = trace(results, seed, arm_name(start, beta, "none"))
            style = {
                "color": COLOURS[number],
                "marker": MARKERS[number],
                "markevery": 3,
                "markersize": 5,
                "linewidth": 1,
            }
            axes.plot([s.kl for s in states], [s.reward for s in states], label=f"{start} SFT", **style)
        axes.set(xlabel="KL to the written texts, nats per sentence", title=f"β {beta:g}, seed {seed}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean reward")
    panels[0].legend()
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    results = results_of("sft_matters", __doc__, arguments)
    for seed in results.seeds:
        measure(results, seed)
    results.write(claims(results), [table(results)], plot(results))


if __name__ == "__main__":
    main()
