"""Which completions make a pair."""

from typing import Literal

from pydantic import Field

from dpo_ray.config.section import Section


class PairingConfig(Section):
    """How scored completions become pairs."""

    rule: Literal["best_vs_worst", "all_pairs"] = "best_vs_worst"
    """Which completions of one prompt are paired."""
    min_margin: float = Field(default=0.0, ge=0.0)
    """Pairs whose rewards differ by this much or less are dropped as ties."""
