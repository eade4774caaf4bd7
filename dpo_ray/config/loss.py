"""The preference loss: which one, with what, and what cannot be combined."""

from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from dpo_ray.config.section import Section

MarginLoss = Literal["sigmoid", "robust", "ipo", "hinge", "exo", "discopop", "sigmoid_norm"]
"""Functions of the margin alone: the difference of the two log-ratios to the reference."""
PairLoss = Literal["minor", "dpop", "nca", "sppo", "apo_zero", "apo_down", "tdpo1", "tdpo2"]
"""Functions of both log-ratios of one pair."""
ReferenceFreeLoss = Literal["slic", "cpo", "simpo", "orpo", "sft"]
"""Functions of the policy's log-probs alone."""
BatchLoss = Literal["kto", "bco", "aot", "aot_unpaired"]
"""A pair's loss depends on the other pairs of the batch."""
UnpairedLoss = Literal["kto", "bco", "sft"]
"""A row may lack its chosen or its rejected completion."""
LossType = Literal[MarginLoss, PairLoss, ReferenceFreeLoss, BatchLoss]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

_DIVERGENCE = ("divergence", "divergence_alpha")
_READ_BY: dict[LossType, tuple[str, ...]] = {
    "sigmoid": ("beta", "label_smoothing", *_DIVERGENCE),
    "robust": ("beta", "label_smoothing", *_DIVERGENCE),
    "ipo": ("beta", "ipo_normalize", *_DIVERGENCE),
    "hinge": ("beta", *_DIVERGENCE),
    "exo": ("beta", "label_smoothing", *_DIVERGENCE),
    "discopop": ("beta", "discopop_tau", *_DIVERGENCE),
    "sigmoid_norm": ("beta",),
    "minor": ("beta",),
    "dpop": ("beta", "dpop_lambda"),
    "nca": ("beta",),
    "sppo": ("beta",),
    "apo_zero": ("beta",),
    "apo_down": ("beta",),
    "tdpo1": ("beta",),
    "tdpo2": ("beta", "tdpo_alpha"),
    "slic": ("beta",),
    "cpo": ("beta", "label_smoothing", "cpo_alpha"),
    "simpo": ("beta", "label_smoothing", "gamma"),
    "orpo": ("beta",),
    "sft": (),
    "kto": ("beta", "desirable_weight", "undesirable_weight"),
    "bco": ("beta",),
    "aot": ("beta", "label_smoothing"),
    "aot_unpaired": ("beta", "label_smoothing"),
}
"""The settings that each loss reads; its type and weight always are."""

_BY_LENGTH = "divides log-probs by the full length"
_ALL_TOKENS = "is also a likelihood of every chosen token"
_ONE_BY_ONE = "takes completions one by one, without another's length"
_KL_OF_ALL = "adds a KL over every token"
_WITHOUT_LD: dict[LossType, str] = {
    "sigmoid_norm": _BY_LENGTH,
    "simpo": _BY_LENGTH,
    "orpo": _BY_LENGTH,
    "cpo": _ALL_TOKENS,
    "sft": _ALL_TOKENS,
    "kto": _ONE_BY_ONE,
    "bco": _ONE_BY_ONE,
    "tdpo1": _KL_OF_ALL,
    "tdpo2": _KL_OF_ALL,
}
"""Losses that have no meaning where the tail of the longer completion is discounted, and why."""


class LossTerm(Section):
    """One loss of a weighted sum."""

    type: LossType
    """Which loss."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of this loss in the sum."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull to the reference; without a reference, the scale of the log-probs (simpo's paper:
    2.0) or, for orpo, the weight of the odds ratio."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of labels taken to be wrong: sigmoid (cDPO), robust, exo, cpo, simpo, aot and aot_unpaired."""
    ipo_normalize: Literal["sum", "mean"] = "sum"
    """ipo: log-probs summed over tokens, or their mean, for which other values of beta fit."""
    dpop_lambda: float = Field(default=5.0, ge=0)
    """dpop: weight of the penalty on a chosen answer below its reference."""
    gamma: float = Field(default=0.5, ge=0)
    """simpo: reward margin that is asked for."""
    cpo_alpha: float = Field(default=1.0, ge=0)
    """cpo: weight of the chosen answers' negative log-likelihood per token."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """kto: weight of the chosen answers."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """kto: weight of the rejected answers."""
    discopop_tau: float = Field(default=0.05, gt=0, le=1)
    """discopop: temperature of the blend between the logistic and the exponential loss."""
    tdpo_alpha: float = Field(default=0.5, ge=0)
    """tdpo2: weight of the difference of the two sequential KLs."""
    divergence: Divergence = "reverse_kl"
    """Divergence from the reference (f-DPO, arXiv:2309.16240): sigmoid, robust, ipo, hinge, exo, discopop."""
    divergence_alpha: float = Field(default=0.5, gt=0, lt=1)
    """The alpha divergence's alpha, between reverse KL (towards 0) and forward KL (towards 1)."""

    @model_validator(mode="after")
    def _check_term(self) -> Self:
        for name, field in LossTerm.model_fields.items():
            if name not in ("type", "weight", *_READ_BY[self.type]) and getattr(self, name) != field.default:
                raise ValueError(_unread(self.type, name, getattr(self, name), default=field.default))
        if self.type in ("robust", "exo") and not self.label_smoothing:
            raise ValueError(
                f"{self.type} needs the share of wrong labels and label_smoothing is 0: "
                "set it (robust's paper: 0.1; exo's: 0.001), or type to sigmoid"
            )
        if self.divergence != "reverse_kl" and self.ipo_normalize == "mean":
            raise ValueError(
                f"divergence={self.divergence} holds for summed log-probs and ipo_normalize is mean: "
                "set ipo_normalize to sum, or divergence to reverse_kl"
            )
        if self.divergence != "alpha" and self.divergence_alpha != 0.5:
            raise ValueError(
                f"divergence_alpha={self.divergence_alpha} is not read by divergence={self.divergence}: "
                "leave it at 0.5, or set divergence to alpha"
            )
        return self


class LossConfig(LossTerm):
    """The preference loss: one, or a weighted sum, and what modifies all of it."""

    type: LossType = "sigmoid"
    """With a reference: sigmoid (DPO, arXiv:2305.18290), robust (arXiv:2403.00409), ipo (arXiv:2310.12036),
    hinge (RSO, arXiv:2309.06657), exo (arXiv:2402.00856), discopop (arXiv:2406.08414), sigmoid_norm
    (length-normalised DPO, arXiv:2411.15124), minor (MinorDPO, arXiv:2408.09834), dpop (arXiv:2402.13228),
    nca (arXiv:2402.05369), sppo (arXiv:2405.00675), apo_zero and apo_down (arXiv:2408.06266), tdpo1 and tdpo2
    (arXiv:2404.11999), kto (arXiv:2402.01306), bco (arXiv:2404.04656), aot and aot_unpaired
    (arXiv:2406.05882). Without one: slic (arXiv:2305.10425), cpo (arXiv:2401.08417), simpo
    (arXiv:2405.14734), orpo (arXiv:2403.07691), sft (likelihood of the chosen answer)."""
    nll_coef: float = Field(default=0.0, ge=0)
    """Weight of the chosen completion's negative log-likelihood per token (RPO, arXiv:2404.19733)."""
    ld_alpha: float = Field(default=1.0, ge=0, le=1)
    """Weight of log-probs of tokens beyond the shorter completion's length (LD-DPO, arXiv:2409.06411)."""
    weighting: Literal["none", "wpo", "wpo_sampler"] = "none"
    """Weight of a pair by how likely the policy is to say it: wpo (arXiv:2406.11827), or wpo_sampler, by how
    much less likely than when it was sampled."""
    plus: tuple[LossTerm, ...] = ()
    """Further losses that are added, each with its type, weight and settings: a JSON list."""

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """All losses of the sum."""
        return (self, *self.plus)

    @model_validator(mode="after")
    def _check_sum(self) -> Self:
        for term in self.terms:
            self._check_nll(term)
            self._check_ld(term)
            self._check_weighting(term)
        for term in self.plus:
            self._check_running_reward(term)
        types = [term.type for term in self.terms]
        whole_batch = [name for name in types if name in get_args(BatchLoss)]
        if whole_batch and any(name in ("tdpo1", "tdpo2") for name in types):
            raise ValueError(
                f"{whole_batch[0]} needs all pairs of a batch at once, and tdpo their whole distributions, "
                "which do not fit into memory together: leave one of the two out"
            )
        return self

    def _check_nll(self, term: LossTerm) -> None:
        if self.nll_coef and term.type in ("orpo", "cpo", "sft"):
            own = "cpo_alpha weighs it" if term.type == "cpo" else "it is part of the loss"
            raise ValueError(
                f"nll_coef={self.nll_coef} adds a likelihood that {term.type} has already ({own}): "
                f"set nll_coef to 0, or take another loss than {term.type}"
            )

    def _check_ld(self, term: LossTerm) -> None:
        if self.ld_alpha == 1:
            return
        reason = _BY_LENGTH if term.ipo_normalize == "mean" else _WITHOUT_LD.get(term.type)
        if reason:
            raise ValueError(
                f"ld_alpha={self.ld_alpha} discounts the longer completion, and {term.type} {reason}: "
                f"set ld_alpha to 1, or take another loss than {term.type}"
            )
        if self.nll_coef or self.weighting != "none":
            raise ValueError(
                f"ld_alpha={self.ld_alpha} discounts log-probs that nll_coef={self.nll_coef} and "
                f"weighting={self.weighting} need in full: set ld_alpha to 1, or nll_coef to 0 and "
                "weighting to none"
            )

    def _check_weighting(self, term: LossTerm) -> None:
        if self.weighting != "none" and term.type in ("aot", "aot_unpaired"):
            raise ValueError(
                f"weighting={self.weighting} weighs pairs and {term.type} sorts them apart: "
                f"set weighting to none, or take another loss than {term.type}"
            )

    def _check_running_reward(self, term: LossTerm) -> None:
        has_reference = self.type not in get_args(ReferenceFreeLoss)
        if term.type == "bco" and not (has_reference and term.beta == self.beta):
            raise ValueError(
                f"bco with beta={term.beta} is centred on the running mean of the first loss's rewards, here "
                f"those of {self.type} with beta={self.beta}: put bco first, or add it to a loss with a "
                "reference and the same beta"
            )


def _unread(loss: LossType, name: str, value: Any, *, default: Any) -> str:
    readers = ", ".join(other for other, names in _READ_BY.items() if name in names)
    return f"{name}={value} is not read by the {loss} loss: leave it at {default}, or set type to {readers}"
