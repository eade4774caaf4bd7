"""May this candidate go live?"""

import math
from dataclasses import dataclass

from dpo_ray.config import GateConfig
from dpo_ray.registry import PolicyManifest


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gate's decision, with its reason where it is no."""

    passed: bool
    reason: str = ""


def judge_candidate(candidate: PolicyManifest, config: GateConfig) -> Verdict:
    """Compare the metrics of the candidate's last optimizer step with the configured bounds."""
    broken = [name for name, value in candidate.metrics.items() if not math.isfinite(value)]
    if broken:
        return Verdict(False, f"{', '.join(broken)} not finite")
    drop = -candidate.metrics.get("chosen_log_ratio", 0.0)
    if config.max_chosen_drop is not None and drop > config.max_chosen_drop:
        return Verdict(False, f"chosen log-prob fell {drop:.1f} nats below the reference's")
    return Verdict(True)
