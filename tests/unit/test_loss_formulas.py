"""Values and gradients of the losses are those of second formulas, in plain numbers."""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from math import exp, expm1, log
from typing import Any, get_args

import pytest
from loss_rows import Row, cost, gradients, losses, sigma

from dpo_ray.config.loss import LossType

BETA = 0.3


def log_odds(logp: float) -> float:
    return -log(expm1(-logp))


def by_rank(first: Sequence[float], second: Sequence[float], smoothing: float) -> list[float]:
    return [cost(BETA * (a - b), smoothing) for a, b in zip(sorted(first), sorted(second), strict=True)]


def each(loss: Callable[[Row], float]) -> Callable[[Sequence[Row]], list[float]]:
    return lambda rows: [loss(row) for row in rows]


def mean_length(rows: Sequence[Row]) -> float:
    return sum(row.nw for row in rows) / len(rows)


def z0(rows: Sequence[Row]) -> float:
    return max(0.0, sum(row.mismatched for row in rows) / len(rows))


def exo_of(q: float) -> float:
    return q * log(q / 0.8) + (1 - q) * log((1 - q) / 0.2)


def discopop_of(x: float) -> float:
    return cost(x) * (1 - sigma(x / 0.4)) + exp(-x) * sigma(x / 0.4)


SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"label_smoothing": 0.2} for name in ("sigmoid", "robust", "exo", "aot", "aot_unpaired", "cpo")},
    "simpo": {"label_smoothing": 0.2, "gamma": 0.7},
    "discopop": {"discopop_tau": 0.4},
    "dpop": {"dpop_lambda": 2.5},
    "tdpo2": {"tdpo_alpha": 0.6},
    "kto": {"desirable_weight": 1.5, "undesirable_weight": 0.4},
}
FORMULAS: dict[str, Callable[[Sequence[Row]], list[float]]] = {
    "sigmoid": each(lambda r: cost(BETA * r.margin, 0.2)),
    "robust": each(lambda r: (0.8 * cost(BETA * r.margin) - 0.2 * cost(-BETA * r.margin)) / 0.6),
    "ipo": each(lambda r: (r.hw - r.hl - 0.5 / BETA) ** 2),
    "hinge": each(lambda r: max(0.0, 1 - BETA * r.margin)),
    "exo": each(lambda r: exo_of(sigma(BETA * r.margin))),
    "discopop": each(lambda r: discopop_of(BETA * r.margin)),
    "sigmoid_norm": each(lambda r: cost(BETA * (r.hw / r.nw - r.hl / r.nl))),
    "minor": each(lambda r: cost(BETA * r.hw - BETA * max(0.0, r.hl))),
    "dpop": each(lambda r: cost(BETA * (r.margin - 2.5 * max(0.0, r.rw - r.lw)))),
    "nca": each(lambda r: cost(BETA * r.hw) + (cost(-BETA * r.hw) + cost(-BETA * r.hl)) / 2),
    "sppo": each(lambda r: (r.hw - 0.5 / BETA) ** 2 + (r.hl + 0.5 / BETA) ** 2),
    "apo_zero": each(lambda r: 1 - sigma(BETA * r.hw) + sigma(BETA * r.hl)),
    "apo_down": each(lambda r: sigma(BETA * r.hw) + 1 - sigma(BETA * r.margin)),
    "tdpo1": each(lambda r: cost(BETA * ((r.hw + r.kw) - (r.hl + r.kl)))),
    "tdpo2": each(lambda r: cost(BETA * (r.margin - 0.6 * (r.kl - r.kw)))),
    "slic": each(lambda r: max(0.0, 1 - BETA * r.lw + BETA * r.ll)),
    "cpo": lambda rows: [cost(BETA * (r.lw - r.ll), 0.2) - r.lw / mean_length(rows) for r in rows],
    "simpo": each(lambda r: cost(BETA * r.lw / r.nw - BETA * r.ll / r.nl - 0.7, 0.2)),
    "orpo": each(lambda r: -r.lw / r.nw + BETA * cost(log_odds(r.lw / r.nw) - log_odds(r.ll / r.nl))),
    "sft": lambda rows: [-r.lw / mean_length(rows) for r in rows],
    "kto": lambda rows: [
        (1.5 * (1 - sigma(BETA * (r.hw - z0(rows)))) + 0.4 * (1 - sigma(BETA * (z0(rows) - r.hl)))) / 2
        for r in rows
    ],
    "bco": each(lambda r: cost(BETA * r.hw - 1.0) + cost(1.0 - BETA * r.hl)),
    "aot": lambda rows: by_rank([r.lw - r.ll for r in rows], [r.rw - r.rl for r in rows], 0.2),
    "aot_unpaired": lambda rows: by_rank([r.hw for r in rows], [r.hl for r in rows], 0.2),
}


def random_rows(seed: int) -> list[Row]:
    rng = random.Random(seed)
    return [
        Row(
            lw=-rng.uniform(2, 20),
            ll=-rng.uniform(2, 20),
            rw=-rng.uniform(2, 20),
            rl=-rng.uniform(2, 20),
            nw=float(rng.randint(1, 12)),
            nl=float(rng.randint(1, 12)),
            kw=rng.uniform(0, 3),
            kl=rng.uniform(0, 3),
            mismatched=rng.uniform(-1, 2),
        )
        for _ in range(7)
    ]


@pytest.mark.parametrize("name", FORMULAS)
def test_values_are_those_of_a_second_formula(name: str) -> None:
    for seed in range(5):
        rows = random_rows(seed)
        ours = losses(rows, type=name, beta=BETA if name != "sft" else 0.1, **SETTINGS.get(name, {}))
        assert ours == pytest.approx(FORMULAS[name](rows), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_are_the_slopes_of_the_second_formula(name: str) -> None:
    rows, step = random_rows(11), 1e-6
    ours = gradients(rows, type=name, beta=BETA if name != "sft" else 0.1, **SETTINGS.get(name, {}))
    for field, slopes in ours.items():
        for index, slope in enumerate(slopes):

            def moved(by: float, field: str = field, index: int = index) -> float:
                row = replace(rows[index], **{field: asdict(rows[index])[field] + by})
                return sum(FORMULAS[name]([*rows[:index], row, *rows[index + 1 :]]))

            expected = (moved(step) - moved(-step)) / (2 * step)
            if (name, field) == ("tdpo2", "kw"):  # TDPO2 stops this gradient.
                assert (slope, expected < 0) == (0.0, True)
            else:
                assert slope == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_every_type_has_a_second_formula() -> None:
    assert set(FORMULAS) == set(get_args(LossType))
