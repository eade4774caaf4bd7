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
from benchmarks.reproduce.language import Language, build, train
from benchmarks.reproduce.preferences import labelled_pairs
from benchmarks.reproduce.results import COLOURS, MARKERS, Arm, Results, results_of
from dpo_ray.rounds import RoundPlan
from dpo_ray.types import Pair

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

    def dpo(self, beta: float, stopping: dict[str, Any]) -> Arm:
        learner = self.start.learner(
            loss={"type": "sigmoid", "beta": beta},
            epochs=EPOCHS,
            early_stopping={"eval_every_steps": EVERY, **stopping},
        )
        held_out = self._pairs[NUM_PAIRS : NUM_PAIRS + HELD_OUT_PAIRS]
        plan = RoundPlan(self._pairs[:NUM_PAIRS], seed=self.seed, held_out=held_out)
        trace = train(self.start, learner, plan, every=EVERY)
        start = self._state(0, self.start.reference)
        return {"trace": [start, *(self._state(measured.step, measured.logps) for measured in trace)]}

    def _state(self, step: int, logps: torch.Tensor) -> State:
        point = self.written.point(logps)
        return State(step, *point, self.written.gap(point), self.start.point(logps).kl)
