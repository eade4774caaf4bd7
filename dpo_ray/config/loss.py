"""The preference loss: which one, and with what."""

from typing import Literal

from pydantic import Field

from dpo_ray.config.section import Section


class LossConfig(Section):
    """The preference loss."""

    type: Literal["sigmoid", "ipo", "minor"] = "sigmoid"
    """sigmoid (DPO, arXiv:2305.18290), ipo (arXiv:2310.12036), minor (MinorDPO, arXiv:2408.09834)."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull to the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of labels taken to be wrong (cDPO); sigmoid only."""
    nll_coef: float = Field(default=0.0, ge=0)
    """Weight of the chosen completion's negative log-likelihood per token (RPO, arXiv:2404.19733)."""
