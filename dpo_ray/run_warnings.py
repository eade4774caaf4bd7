"""What goes wrong in a round: the number, its bound, and what to change."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from dpo_ray.config import WarningsConfig
from dpo_ray.config.warnings import Action
from dpo_ray.metrics import number

WarningName = Literal["displacement", "length_drift", "saturation", "duplicates", "kl_budget"]
Row = Mapping[str, Any]
"""Metrics of a round or a step; any may be absent or null."""


@dataclass(frozen=True, slots=True)
class RunWarning:
    """One thing that goes wrong, and what is done about it."""

    name: WarningName
    action: Action
    message: str


class StopError(RuntimeError):
    """A warning fired, and the job is told to stop then."""


def round_warnings(row: Row, steps: Sequence[Row], *, start: Row, config: WarningsConfig) -> list[RunWarning]:
    """What a round's metrics, its optimizer steps and the start's row give cause for."""
    reached = {name: _reached(row, steps, name) for name in ("chosen_log_ratio", "rewards/margins")}
    fired: dict[WarningName, tuple[Action, str | None]] = {
        "displacement": (config.displacement.action, displacement(reached, config.displacement.max_drop)),
        "length_drift": (config.length_drift.action, length_drift(row, start, config.length_drift.max_ratio)),
        "saturation": (config.saturation.action, saturation(reached, config.saturation.max_margin)),
        "duplicates": (config.duplicates.action, duplicates(row, config.duplicates.max_share)),
        "kl_budget": (config.kl_budget.action, kl_budget(row, config.kl_budget.max_kl)),
    }
    return [RunWarning(name, action, message) for name, (action, message) in fired.items() if message]


def displacement(reached: Row, max_drop: float | None) -> str | None:
    """DPO may widen the margin by making both sides unlikely: whatever gains is preferred by nobody."""
    log_ratio, margin = number(reached, "chosen_log_ratio"), number(reached, "rewards/margins")
    if max_drop is None or log_ratio is None or margin is None or log_ratio >= -max_drop or margin <= 0:
        return None
    return (
        f"chosen completions lost {-log_ratio:.1f} nats against the reference, more than {max_drop:g}, while "
        f"rewards/margins is {margin:.2f}: probability leaves both sides. Take training.loss.type dpop or "
        "minor, add training.loss.nll_coef, or lower training.learning_rate"
    )


def length_drift(row: Row, start: Row, max_ratio: float | None) -> str | None:
    """Judges like length: longer answers win without being better."""
    length, at_start = number(row, "eval/length_mean"), number(start, "eval/length_mean")
    if max_ratio is None or length is None or not at_start:
        return None
    ratio = length / at_start
    drift = f"held-out completions are {ratio:.2f} times as long as the start's"
    if ratio > max_ratio:
        return (
            f"{drift}, above {max_ratio:g}: the judge may like length. Take training.loss.type sigmoid_norm, "
            "a judge that ignores length, or bound it with gate.max_length_ratio"
        )
    if ratio * max_ratio < 1:
        return (
            f"{drift}, below {1 / max_ratio:.2f}: read the shortest, and what the judge gives for them. A "
            "higher training.loss.beta keeps the policy nearer to the start"
        )
    return None


def saturation(reached: Row, max_margin: float | None) -> str | None:
    """The gradient of a pair is weighted by sigmoid(-margin)."""
    margin = number(reached, "rewards/margins")
    if max_margin is None or margin is None or margin <= max_margin:
        return None
    weight = math.exp(-margin) / (1 + math.exp(-margin))
    return (
        f"rewards/margins is {margin:.1f}, above {max_margin:g}: the sigmoid loss gives such a pair a weight "
        f"of {100 * weight:.2g}%, so these pairs teach nothing more. End the run here, or "
        "train on newer pairs (buffer.max_age) in fewer training.epochs"
    )


def duplicates(row: Row, max_share: float | None) -> str | None:
    """Identical completions make no pair."""
    identical, completions = number(row, "yield/identical"), number(row, "yield/completions")
    if max_share is None or identical is None or not completions or identical / completions <= max_share:
        return None
    return (
        f"{identical / completions:.0%} of the samples repeat another one of their prompt, more than "
        f"{max_share:.0%}: raise sampling.temperature, or training.loss.beta, which keeps nearer to the start"
    )


def kl_budget(row: Row, max_kl: float | None) -> str | None:
    """Far from the start, a reward is more often the judge's mistake."""
    kl = number(row, "eval/kl/reference" if "eval/kl/reference" in row else "kl/start")
    if max_kl is None or kl is None or kl <= max_kl:
        return None
    return (
        f"the KL to the start is {kl:.1f} nats, above {max_kl:g}: read samples, for the judge may be fooled. "
        "Raise training.loss.beta, lower training.learning_rate, or bound it with gate.max_kl"
    )


def require_no_stop(warnings: Sequence[RunWarning]) -> None:
    """StopError: one of them ends the job."""
    if reasons := reasons_to("stop", warnings):
        raise StopError(
            f"{reasons}. The round is finished: started again, the job goes on; what it warns of, and the "
            "action, may be changed then"
        )


def reasons_to(action: Action, warnings: Sequence[RunWarning]) -> str:
    """What the warnings with this action say; empty where none has it."""
    return "; ".join(f"warning {each.name}: {each.message}" for each in warnings if each.action == action)


def _reached(row: Row, steps: Sequence[Row], name: str) -> float | None:
    """On held-out pairs where there are some, else on those that training ended with."""
    if (measured := number(row, f"eval/{name}")) is not None:
        return measured
    # The policy moves within a round, and a single batch is noise.
    late = [value for step in steps[len(steps) // 2 :] if (value := number(step, name)) is not None]
    return fmean(late) if late else None
