"""When a run says that something goes wrong, and what it does then."""

from typing import Literal

from pydantic import Field

from dpo_ray.config.section import Section

Action = Literal["log", "pause", "stop", "roll_back"]


class WarningConfig(Section):
    """What a warning leads to."""

    action: Action = "log"
    """log says it; pause also waits, before the next round, until somebody deletes the run's file PAUSED;
    stop ends the job, which goes on when it is started again; roll_back makes live what was live before."""


class DisplacementConfig(WarningConfig):
    """The margin grows while chosen completions become unlikely (arXiv:2410.08847)."""

    max_drop: float | None = Field(default=20.0, gt=0)
    """Most nats that chosen completions may lose against the reference while the margin is positive;
    unset: no warning."""


class LengthDriftConfig(WarningConfig):
    """Completions become longer or shorter, whether or not they get better."""

    max_ratio: float | None = Field(default=1.5, gt=1)
    """Most times that held-out completions may be longer than the start's, or shorter; unset: no warning."""


class SaturationConfig(WarningConfig):
    """Pairs are told apart so well that they teach nothing more."""

    max_margin: float | None = Field(default=8.0, gt=0)
    """Largest mean of rewards/margins: 8 leaves a pair 0.03 % of its weight in the sigmoid loss;
    unset: no warning."""


class DuplicatesConfig(WarningConfig):
    """The policy says the same again and again."""

    max_share: float | None = Field(default=0.5, gt=0, lt=1)
    """Largest share of a round's samples that repeat another one of their prompt; unset: no warning."""


class KLBudgetConfig(WarningConfig):
    """The policy is far from its start, where judges are easily fooled (arXiv:2210.10760)."""

    max_kl: float | None = Field(default=20.0, gt=0)
    """Largest KL to the start, in nats per completion; unset: no warning."""


class WarningsConfig(Section):
    """What is looked at after each round."""

    displacement: DisplacementConfig = DisplacementConfig()
    """The margin grows while chosen completions become unlikely."""
    length_drift: LengthDriftConfig = LengthDriftConfig()
    """Completions become longer or shorter than the start's."""
    saturation: SaturationConfig = SaturationConfig()
    """The pairs teach nothing more."""
    duplicates: DuplicatesConfig = DuplicatesConfig()
    """Samples of a prompt are identical."""
    kl_budget: KLBudgetConfig = KLBudgetConfig()
    """The policy is far from its start."""
