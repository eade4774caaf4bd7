"""What a run cost: seconds of each phase, and the judge's money."""

import math
from dataclasses import dataclass

from dpo_ray.metrics import number
from dpo_ray.report.record import RunRecord

PHASES = ("sample", "judge", "buffer", "train", "push", "evaluate")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one phase took over all rounds."""

    phase: str
    seconds: float
    share: float
    """Of the time of all rounds."""
    per_round: float


@dataclass(frozen=True, slots=True)
class Costs:
    """Of all finished rounds."""

    phases: list[Cost]
    seconds: float
    money: float
    """In the judge's currency."""


def costs(record: RunRecord) -> Costs | None:
    """None where no round has a time."""
    whole = _total(record, "time/round_s")
    if not whole:
        return None
    spent = {phase: _total(record, f"time/{phase}_s") for phase in PHASES}
    spent["other"] = max(0.0, whole - math.fsum(spent.values()))
    phases = [
        Cost(phase, seconds, seconds / whole, seconds / len(record.rounds))
        for phase, seconds in spent.items()
        if seconds
    ]
    return Costs(phases, whole, _total(record, "judge/cost"))


def _total(record: RunRecord, key: str) -> float:
    return math.fsum(number(row, key) or 0.0 for row in record.rounds)
