"""What DPO, MinorDPO, DPOP and IPO make of answers that differ in one letter, at high learning rates.

`python benchmarks/reproduce/displacement.py` takes 3 minutes a seed; stopped, it goes on from its JSON.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.reproduce.displacement_evidence import LOSSES, RATES, RULES, arm_names, claims, plot, tables
from benchmarks.reproduce.language import (
    LETTERS,
    NUM_PROMPTS,
    SENTENCES,
    Language,
    Measured,
    build,
    sentence_number,
    spell,
    train,
)
from benchmarks.reproduce.results import Arm, Results, results_of
from dpo_ray.rounds import RoundPlan
from dpo_ray.types import Pair

NUM_PAIRS = 192
EPOCHS = 200
"""Of three steps each."""
WARMUP_STEPS = 20
"""As the DPO paper's 150: without them, RMSprop's first steps are ten times its rate."""
EVERY = 20
"""Steps between two measurements."""
EVERY_WATCHED = 5
"""The same where something may stop the training: at high rates the damage is done within 20 steps."""
LEAST_FALL = 0.3
"""Reward that the changed letter costs, at least."""


class Bed(NamedTuple):
    """A language, and pairs at an edit distance of one."""

    seed: int
    language: Language
    pairs: list[Pair]
    held_out: list[Pair]

    @classmethod
    def make(cls, seed: int, folder: Path) -> "Bed":
        language = build(seed, folder)
        drawn = edited_pairs(language, torch.Generator().manual_seed(seed))
        return cls(seed, language, *([next(drawn) for _ in range(NUM_PAIRS)] for _ in range(2)))

    def run(self, loss: dict[str, Any], rate: float, stopping: dict[str, Any]) -> Arm:
        """One training, measured on the way; `stopping` may end it."""
        every = EVERY_WATCHED if stopping else EVERY
        early = {"eval_every_steps": every, **stopping}
        learner = self.language.learner(
            loss=loss,
            learning_rate=rate,
            warmup_steps=WARMUP_STEPS,
            epochs=EPOCHS,
            early_stopping=early,
        )
        plan = RoundPlan(self.pairs, seed=self.seed, held_out=self.held_out)
        trace = train(self.language, learner, plan, every=every)
        kept = (
            trace[-1:] if stopping else trace
        )  # Up to where it ends, the way is that of the whole training.
        return {"trace": [self._row(measured) for measured in kept]}

    def _row(self, measured: Measured) -> list[float]:
        """Step, KL, reward, gap, mean log-ratio of the chosen, share below 0, held-out accuracy."""
        ratios = chosen_ratios(self.language, self.pairs, measured.logps)
        fallen = (ratios < 0).double().mean().item()
        accuracy = measured.metrics.get("eval/rewards/accuracies", float("nan"))
        gap = self.language.gap(measured.point)
        return [measured.step, *measured.point, gap, ratios.mean().item(), fallen, accuracy]


def edited_pairs(language: Language, generator: torch.Generator) -> Iterator[Pair]:
    """Different ones; the rejected is the chosen with one of its last three letters changed for the worse."""
    seen: set[tuple[int, ...]] = set()
    while True:
        prompt = int(torch.randint(NUM_PROMPTS, (), generator=generator))
        chosen = int(torch.multinomial(language.reference[prompt].exp(), 1, generator=generator))
        worse = worse_edits(language, prompt, chosen)
        if worse and (prompt, chosen) not in seen:
            seen.add((prompt, chosen))
            rejected = worse[int(torch.randint(len(worse), (), generator=generator))]
            yield pair_of(prompt, chosen, rejected)


def worse_edits(language: Language, prompt: int, chosen: int) -> list[int]:
    """Sentences that differ in one of the last three letters and earn less by more than `LEAST_FALL`."""
    letters = SENTENCES[chosen].tolist()
    edits = [
        sentence_number([*letters[:place], letter, *letters[place + 1 :]])
        for place in range(len(letters) - 3, len(letters))
        for letter in range(len(LETTERS))
    ]
    reward = language.rewards[prompt]
    return [edit for edit in edits if reward[chosen] - reward[edit] > LEAST_FALL]


def pair_of(prompt: int, chosen: int, rejected: int) -> Pair:
    one, other = (tuple(SENTENCES[number].tolist()) for number in (chosen, rejected))
    return Pair(LETTERS[prompt], spell(one), spell(other), (prompt,), one, other)


def chosen_ratios(language: Language, pairs: Sequence[Pair], logps: Tensor) -> Tensor:
    """[B] log-ratios of the chosen to the reference."""
    prompts = [pair.prompt_ids[0] for pair in pairs]
    numbers = [sentence_number(pair.chosen_ids) for pair in pairs]
    return (logps - language.reference)[prompts, numbers]


def arms(bed: Bed) -> dict[str, Callable[[], Arm]]:
    """Those of `arm_names`."""
    whole = [partial(bed.run, loss, rate, {}) for loss in LOSSES.values() for rate in RATES]
    stopped = [partial(bed.run, LOSSES["DPO"], rate, rule) for rule in RULES.values() for rate in RATES]
    return dict(zip(arm_names(), [*whole, *stopped], strict=True))


def measure(results: Results, seed: int) -> None:
    if not results.lacks(seed, arm_names()):
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, arm in arms(Bed.make(seed, Path(folder))).items():
            results.run(seed, name, arm)


def main(arguments: Sequence[str] | None = None) -> None:
    results = results_of("displacement", __doc__, arguments)
    for seed in results.seeds:
        measure(results, seed)
    results.write(claims(results), tables(results), plot(results))


if __name__ == "__main__":
    main()
