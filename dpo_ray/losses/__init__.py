"""Preference losses: pure functions of summed log-probs, one value per pair."""

from dpo_ray.losses.batch import aot_loss, aot_unpaired_loss, bco_loss, kto_loss
from dpo_ray.losses.configured import (
    accepts_unpaired,
    accepts_weights,
    needs_mismatched,
    needs_reference,
    needs_sequential_kl,
    needs_whole_batch,
    preference_loss,
    rewards,
)
from dpo_ray.losses.logps import PairLogps
from dpo_ray.losses.margin import (
    discopop_loss,
    divergence_score,
    exo_loss,
    hinge_loss,
    ipo_loss,
    robust_loss,
    sigmoid_loss,
)
from dpo_ray.losses.pair import (
    apo_down_loss,
    apo_zero_loss,
    dpop_loss,
    minor_loss,
    nca_loss,
    sppo_loss,
    tdpo1_loss,
    tdpo2_loss,
)
from dpo_ray.losses.reference_free import (
    chosen_nll,
    cpo_loss,
    orpo_loss,
    sft_loss,
    simpo_loss,
    slic_loss,
)
from dpo_ray.losses.weighting import sampler_weight, wpo_weight

__all__ = [
    "PairLogps",
    "accepts_unpaired",
    "accepts_weights",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "chosen_nll",
    "cpo_loss",
    "discopop_loss",
    "divergence_score",
    "dpop_loss",
    "exo_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "minor_loss",
    "nca_loss",
    "needs_mismatched",
    "needs_reference",
    "needs_sequential_kl",
    "needs_whole_batch",
    "orpo_loss",
    "preference_loss",
    "rewards",
    "robust_loss",
    "sampler_weight",
    "sft_loss",
    "sigmoid_loss",
    "simpo_loss",
    "slic_loss",
    "sppo_loss",
    "tdpo1_loss",
    "tdpo2_loss",
    "wpo_weight",
]
