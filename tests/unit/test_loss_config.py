"""Losses as configured: sums, weights and modifiers add up, and what has no meaning is refused."""

import re
from dataclasses import replace
from math import exp, log
from typing import Any, get_args

import pytest
import torch
from loss_rows import Row, batch, gradients, losses
from pydantic import ValidationError

from dpo_ray.config.loss import LossConfig, LossTerm, LossType
from dpo_ray.losses import (
    PairLogps,
    accepts_unpaired,
    needs_mismatched,
    needs_reference,
    needs_sequential_kl,
    needs_whole_batch,
    preference_loss,
    rewards,
)

TYPES = get_args(LossType)
ROWS = [Row(), Row(lw=-3.0, ll=-4.0, nw=2.0, nl=3.0)]
NAN = float("nan")


def settings(name: str, **more: Any) -> dict[str, Any]:
    """Settings with which a loss has a value."""
    return {"type": name, **({"label_smoothing": 0.2} if name in ("robust", "exo") else {}), **more}


def config(name: str, **more: Any) -> LossConfig:
    return LossConfig.model_validate(settings(name, **more))


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_sum_is_weighted() -> None:
    sigmoid, bco, sft = (losses(ROWS, type=name) for name in ("sigmoid", "bco", "sft"))
    ours = losses(ROWS, weight=0.8, plus=[{"type": "bco", "weight": 0.2}, {"type": "sft", "weight": 3.0}])
    assert ours == pytest.approx(
        [0.8 * a + 0.2 * b + 3 * c for a, b, c in zip(sigmoid, bco, sft, strict=True)]
    )


def test_terms_of_a_sum_have_settings_of_their_own() -> None:
    ours = losses(ROWS, beta=0.7, plus=[{"type": "simpo", "beta": 2.0, "gamma": 1.2}])
    apart = losses(ROWS, type="sigmoid", beta=0.7), losses(ROWS, type="simpo", beta=2.0, gamma=1.2)
    assert ours == pytest.approx([a + b for a, b in zip(*apart, strict=True)])


@pytest.mark.parametrize("name", sorted(set(TYPES) - {"orpo", "cpo", "sft"}))
def test_the_nll_term_is_per_token_and_weighted(name: str) -> None:
    plain, with_nll = losses(ROWS, **settings(name)), losses(ROWS, **settings(name, nll_coef=0.5))
    # 6 nats over 4 tokens and 3 over 2: 1.5 per token.
    assert [b - a for a, b in zip(plain, with_nll, strict=True)] == pytest.approx([0.75, 0.75])


def test_the_nll_of_a_missing_answer_is_nothing() -> None:
    thumb_down = Row(lw=0.0, rw=0.0, nw=0.0)
    assert losses([thumb_down], type="kto", nll_coef=0.5) == losses([thumb_down], type="kto")


def test_sft_is_the_mean_over_tokens_of_the_global_batch() -> None:
    logps = batch(ROWS)
    # -6 and -3 over 4 and 2 tokens: 9 nats over 6 tokens.
    assert preference_loss(logps, config("sft")).mean().item() == pytest.approx(1.5)
    elsewhere_longer = replace(logps, mean_chosen_length=torch.tensor(9.0))
    assert preference_loss(elsewhere_longer, config("sft")).mean().item() == pytest.approx(0.5)
    nothing_chosen = [Row(lw=0.0, rw=0.0, nw=0.0)]
    assert losses(nothing_chosen, type="sft") == [0.0]


@pytest.mark.parametrize("name", sorted(set(TYPES) - {"aot", "aot_unpaired"}))
def test_weights_of_the_data_multiply_losses_and_gradients(name: str) -> None:
    logps = replace(batch(ROWS), weight=tensor(1.0, 0.25))
    loss = preference_loss(logps, config(name))
    first, second = losses(ROWS, **settings(name))
    assert loss.tolist() == pytest.approx([first, 0.25 * second])
    loss.sum().backward()
    assert logps.chosen.grad is not None
    expected = gradients(ROWS, **settings(name))["lw"]
    assert logps.chosen.grad.tolist() == pytest.approx([expected[0], 0.25 * expected[1]])


def weighted(logps: PairLogps, weighting: str) -> torch.Tensor:
    return preference_loss(logps, config("sigmoid", weighting=weighting))


def test_wpo_weighs_by_the_policys_likelihood_against_its_own_sampling() -> None:
    # Chosen: (-6 + 4) / 4 = -0.5; rejected: (-10 + 20) / 5 = 2. No gradient goes through the weight.
    logps = replace(batch([Row()]), chosen_square=tensor(-4.0), rejected_square=tensor(-20.0))
    loss = weighted(logps, "wpo")
    assert loss.tolist() == pytest.approx([exp(-0.5 + 2) * losses([Row()])[0]])
    loss.sum().backward()
    assert logps.chosen.grad is not None
    assert logps.chosen.grad.tolist() == pytest.approx([exp(1.5) * gradients([Row()])["lw"][0]])


def test_wpo_sampler_weighs_by_what_the_sampler_recorded_at_most_1() -> None:
    # Chosen: exp((-6 + 2) / 4) = 1/e; rejected, now likelier than when it was sampled: 1.
    logps = replace(batch([Row()]), chosen_sampled=tensor(-2.0), rejected_sampled=tensor(-30.0))
    loss = weighted(logps, "wpo_sampler")
    assert loss.tolist() == pytest.approx([exp(-1) * losses([Row()])[0]])
    loss.sum().backward()
    assert logps.chosen.grad is not None
    assert logps.chosen.grad.tolist() == pytest.approx([exp(-1) * gradients([Row()])["lw"][0]])


def test_wpo_sampler_refuses_rows_that_were_not_sampled() -> None:
    logps = replace(batch(ROWS), chosen_sampled=tensor(-2.0, -2.0), rejected_sampled=tensor(-3.0, NAN))
    with pytest.raises(
        ValueError, match="1 of 2 completions have none: train on sampled pairs, or set weighting"
    ):
        weighted(logps, "wpo_sampler")


@pytest.mark.parametrize("weighting", ["wpo", "wpo_sampler"])
def test_a_missing_side_does_not_change_the_weight(weighting: str) -> None:
    up = Row(ll=0.0, rl=0.0, nl=0.0)
    logps = replace(
        batch([up]),
        chosen_square=tensor(-2.0),
        rejected_square=tensor(0.0),
        chosen_sampled=tensor(-2.0),
        rejected_sampled=tensor(NAN),
    )
    loss = preference_loss(logps, config("kto", weighting=weighting))
    assert loss.tolist() == pytest.approx([exp(-1) * losses([up], type="kto")[0]])


@pytest.mark.parametrize("name", TYPES)
def test_rewards_are_those_that_trl_logs(name: str) -> None:
    beta = 0.1 if name == "sft" else 0.5
    chosen, rejected = rewards(batch([Row()]), config(name, beta=beta))
    assert not chosen.requires_grad and not rejected.requires_grad
    expected = {"simpo": (-1.5, -2.0), "orpo": (-1.5, -2.0)}  # Per token.
    expected |= dict.fromkeys(("slic", "cpo", "sft"), (-6.0, -10.0))
    assert (chosen.item() / beta, rejected.item() / beta) == pytest.approx(expected.get(name, (1.0, -1.0)))


def test_rewards_of_a_sum_are_those_of_its_first_loss() -> None:
    summed = config("sigmoid", beta=0.5, plus=[{"type": "simpo", "beta": 2.0}])
    assert [reward.item() for reward in rewards(batch([Row()]), summed)] == [0.5, -0.5]


QUESTIONS = {
    needs_whole_batch: {"aot", "aot_unpaired", "kto", "bco"},
    needs_sequential_kl: {"tdpo1", "tdpo2"},
    needs_mismatched: {"kto"},
    needs_reference: set(TYPES) - {"simpo", "orpo", "cpo", "slic", "sft"},
}


@pytest.mark.parametrize("name", TYPES)
def test_what_a_loss_needs_a_sum_with_it_needs(name: str) -> None:
    for question, yes in QUESTIONS.items():
        assert question(config(name)) == (name in yes)
        first = "hinge" if name == "bco" else "simpo"
        assert question(config(first, plus=[settings(name)])) == (bool({name, first} & yes))
    assert accepts_unpaired(config(name)) == (name in {"kto", "bco", "sft"})
    if name not in ("tdpo1", "tdpo2"):  # Refused: see below.
        assert accepts_unpaired(config("kto", plus=[settings(name)])) == (name in {"kto", "bco", "sft"})


@pytest.mark.parametrize("name", TYPES)
def test_a_loss_reads_what_it_accepts_and_nothing_else(name: str) -> None:
    """Of each setting: either another value is refused, or some loss is another for it."""
    others: dict[str, Any] = {
        "beta": 0.37,
        "label_smoothing": 0.3,
        "ipo_normalize": "mean",
        "dpop_lambda": 2.0,
        "gamma": 1.5,
        "cpo_alpha": 0.3,
        "desirable_weight": 2.0,
        "undesirable_weight": 2.0,
        "discopop_tau": 0.7,
        "tdpo_alpha": 0.1,
        "divergence": "js",
    }
    assert others.keys() | {"type", "weight", "divergence_alpha"} == LossTerm.model_fields.keys()
    rows = [*ROWS, Row(lw=-9.0, ll=-8.0), Row(lw=-8.0, rw=-1.0)]
    for setting, value in others.items():
        try:
            other = losses(rows, **{**settings(name), setting: value})
        except ValidationError as error:
            assert f"{setting}={value} is not read by the {name} loss" in str(error)
        else:
            assert other != pytest.approx(losses(rows, **settings(name))), setting


def test_the_alpha_divergence_reads_its_alpha() -> None:
    first, second = (losses(ROWS, divergence="alpha", divergence_alpha=alpha) for alpha in (0.3, 0.7))
    assert first != pytest.approx(second)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"type": "aot", "plus": [{"type": "tdpo2"}]},
        "aot needs all pairs of a batch at once, and tdpo their whole distributions",
    ),
    ({"gamma": 0.9}, "gamma=0.9 is not read by the sigmoid loss: leave it at 0.5, or set type to simpo"),
    ({"type": "ipo", "label_smoothing": 0.1}, "is not read by the ipo loss: leave it at 0.0, or set type to"),
    ({"plus": [{"type": "sft", "beta": 0.5}]}, "beta=0.5 is not read by the sft loss"),
    ({"type": "robust"}, "robust needs the share of wrong labels and label_smoothing is 0: set it"),
    ({"type": "exo"}, "exo needs the share of wrong labels and label_smoothing is 0: set it"),
    ({"type": "robust", "label_smoothing": 0.5}, "less than 0.5"),
    ({"type": "kto", "divergence": "js"}, "divergence=js is not read by the kto loss"),
    ({"type": "simpo", "divergence": "js"}, "divergence=js is not read by the simpo loss"),
    ({"type": "tdpo2", "divergence": "js"}, "divergence=js is not read by the tdpo2 loss"),
    (
        {"type": "ipo", "ipo_normalize": "mean", "divergence": "js"},
        "divergence=js holds for summed log-probs and ipo_normalize is mean: set ipo_normalize to sum",
    ),
    ({"divergence_alpha": 0.3}, "divergence_alpha=0.3 is not read by divergence=reverse_kl"),
    ({"type": "orpo", "nll_coef": 1.0}, "nll_coef=1.0 adds a likelihood that orpo has already"),
    ({"nll_coef": 1.0, "plus": [{"type": "sft"}]}, "nll_coef=1.0 adds a likelihood that sft has already"),
    ({"type": "cpo", "nll_coef": 1.0}, "that cpo has already (cpo_alpha weighs it)"),
    ({"type": "aot", "weighting": "wpo"}, "weighting=wpo weighs pairs and aot sorts them apart"),
    ({"plus": [{"type": "aot_unpaired"}], "weighting": "wpo_sampler"}, "aot_unpaired sorts them apart"),
    ({"type": "simpo", "ld_alpha": 0.5}, "simpo divides log-probs by the full length: set ld_alpha to 1"),
    ({"type": "sigmoid_norm", "ld_alpha": 0.5}, "sigmoid_norm divides log-probs by the full length"),
    ({"type": "ipo", "ipo_normalize": "mean", "ld_alpha": 0.5}, "ipo divides log-probs by the full length"),
    ({"type": "kto", "ld_alpha": 0.5}, "kto takes completions one by one"),
    ({"ld_alpha": 0.5, "plus": [{"type": "sft"}]}, "sft is also a likelihood of every chosen token"),
    ({"type": "tdpo1", "ld_alpha": 0.0}, "tdpo1 adds a KL over every token"),
    ({"ld_alpha": 0.5, "nll_coef": 1.0}, "nll_coef=1.0 and weighting=none need in full: set ld_alpha to 1"),
    ({"ld_alpha": 0.5, "weighting": "wpo"}, "nll_coef=0.0 and weighting=wpo need in full"),
    ({"beta": 0.2, "plus": [{"type": "bco"}]}, "here those of sigmoid with beta=0.2: put bco first"),
    ({"type": "simpo", "plus": [{"type": "bco"}]}, "here those of simpo with beta=0.1: put bco first"),
    ({"plus": [{"weight": 2.0}]}, "Field required"),
    ({"plus": [{"type": "sft", "nll_coef": 1.0}]}, "Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_has_no_meaning_is_refused_with_a_remedy(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        LossConfig.model_validate(given)


ACCEPTED: list[dict[str, Any]] = [
    {"type": "ipo", "ld_alpha": 0.5},
    {"type": "sigmoid", "divergence": "js", "plus": [{"type": "sft"}]},
    {"type": "kto", "weighting": "wpo_sampler", "nll_coef": 0.1},
    {"type": "sigmoid", "weight": 0.8, "plus": [{"type": "bco", "weight": 0.2}, {"type": "sft"}]},  # MPO
    {"type": "cpo", "plus": [{"type": "simpo", "gamma": 1.0}]},
]


@pytest.mark.parametrize("given", ACCEPTED, ids=str)
def test_what_was_resolved_can_be_read_again(given: dict[str, Any]) -> None:
    resolved = LossConfig.model_validate(given)
    assert LossConfig.model_validate(resolved.model_dump()) == resolved
    assert LossConfig.model_validate_json(resolved.model_dump_json()) == resolved


def test_the_default_is_dpo() -> None:
    assert losses([Row()], beta=0.1) == losses([Row()]) == pytest.approx([log(1 + exp(-0.2))])


def test_every_type_is_described() -> None:
    description = LossConfig.model_fields["type"].description or ""
    assert set(TYPES) <= set(re.findall(r"\w+", description))
