"""Log-probs and gradients on flat rows are those of the textbook, for every family of models."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from families import FLAT, make_model
from textbook import assert_same_gradient, gradient, log_probs, logps, make_groups, token_logps
from torch import Tensor
from transformers import PreTrainedModel

from dpo_ray.batching import PromptGroup, offsets
from dpo_ray.lm_head import CompletionSums, KlDirection
from dpo_ray.logprobs import CompletionScorer, Wanted

GROUPS = [*make_groups(6), PromptGroup((5,), ((0,), (7, 0, 9))), PromptGroup((0, 8), ((4, 4, 4), (6,)))]
"""0 is the padding id: here it is a token like any other."""
STARTS = offsets([len(group.completions) for group in GROUPS])
COEFFICIENTS = torch.linspace(-2, 2, STARTS[-1])


def test_the_groups_have_one_token_completions_one_token_prompts_and_three_completions() -> None:
    assert min(len(group.prompt_ids) for group in GROUPS) == 1
    assert min(len(ids) for group in GROUPS for ids in group.completions) == 1
    assert max(len(group.completions) for group in GROUPS) == 3
    assert max(len(group.prompt_ids) + max(map(len, group.completions)) for group in GROUPS) > 12


def curved(values: Tensor, coefficients: Tensor) -> Tensor:
    """[] a loss whose slope is another one for each completion."""
    return (coefficients * F.logsigmoid(0.1 * values)).sum()


def objective(groups: range, sums: CompletionSums) -> Tensor:
    return curved(sums.logp, COEFFICIENTS[STARTS[groups.start] : STARTS[groups.stop]])


@pytest.mark.parametrize("family", FLAT)
def test_every_family_scores_and_learns_as_on_padded_rows(family: str) -> None:
    plain, model = make_model(family), make_model(family)
    expected = logps(plain, GROUPS)
    loss = curved(expected, COEFFICIENTS)
    loss.backward()
    scorer = CompletionScorer(model, flat=True)
    our_loss, sums = scorer(GROUPS, objective)
    assert our_loss is not None
    our_loss.backward()
    torch.testing.assert_close(sums.logp, expected.detach(), atol=1e-5, rtol=1e-6)
    assert our_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert_same_gradient(gradient(model), gradient(plain))
    with torch.no_grad():  # Without an objective, the head goes another way.
        torch.testing.assert_close(scorer(GROUPS)[1].logp, expected.detach(), atol=1e-5, rtol=1e-6)


@pytest.fixture
def model() -> PreTrainedModel:
    """Windows, softcaps, and fewer key heads than query heads."""
    return make_model("Gemma2")


@pytest.fixture
def other() -> PreTrainedModel:
    model = make_model("Gemma2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


FLAT_OR_NOT = pytest.mark.parametrize("flat", [True, False])


@FLAT_OR_NOT
@torch.no_grad()
def test_token_logps_are_those_of_each_token_in_order(model: PreTrainedModel, flat: bool) -> None:
    expected = [torch.cat(token_logps(model, [group])) for group in GROUPS]
    scorer = CompletionScorer(copy.deepcopy(model), flat=flat)
    for group, values in zip(GROUPS, expected, strict=True):
        torch.testing.assert_close(scorer.token_logps(group).double(), values, atol=1e-5, rtol=0)


@FLAT_OR_NOT
@torch.no_grad()
def test_squares_are_of_the_whole_distribution_at_each_token(model: PreTrainedModel, flat: bool) -> None:
    expected = [values.exp().square().sum(-1).log().double().sum() for values in log_probs(model, GROUPS)]
    scorer = CompletionScorer(copy.deepcopy(model), flat=flat)
    for goal in (None, objective):
        square = scorer(GROUPS, goal, wanted=Wanted(square=True))[1].square
        torch.testing.assert_close(square, torch.stack(expected), atol=1e-5, rtol=1e-6)


@FLAT_OR_NOT
def test_tokens_beyond_the_shortest_completion_count_less(model: PreTrainedModel, flat: bool) -> None:
    group = PromptGroup((5, 6), ((7, 8, 9, 10), (11, 12)))
    plain = copy.deepcopy(model)
    long, short = token_logps(plain, [group])
    expected = torch.stack([long[:2].sum() + 0.25 * long[2:].sum(), short.sum()])
    expected.square().sum().backward()
    wanted = Wanted(ld_alpha=0.25)
    loss, sums = CompletionScorer(model, flat=flat)(
        [group], lambda _, s: s.logp.square().sum(), wanted=wanted
    )
    assert loss is not None
    loss.backward()
    torch.testing.assert_close(sums.logp, expected.detach(), atol=1e-5, rtol=1e-6)
    assert_same_gradient(gradient(model), gradient(plain))


KL: dict[KlDirection, Callable[[Tensor, Tensor], Tensor]] = {
    "from_reference": lambda ours, theirs: (theirs.exp() * (theirs - ours)).sum(-1).double().sum(),
    "to_reference": lambda ours, theirs: (ours.exp() * (ours - theirs)).sum(-1).double().sum(),
}


@FLAT_OR_NOT
@pytest.mark.parametrize("direction", KL)
def test_the_kl_is_exact_and_has_a_gradient(
    model: PreTrainedModel, other: PreTrainedModel, direction: KlDirection, flat: bool
) -> None:
    plain = copy.deepcopy(model)
    with torch.no_grad():
        theirs = log_probs(other, GROUPS)
    kls = [KL[direction](*both) for both in zip(log_probs(plain, GROUPS), theirs, strict=True)]
    expected, expected_logps = torch.stack(kls), logps(plain, GROUPS)
    (curved(expected_logps, COEFFICIENTS) + (COEFFICIENTS * expected).sum()).backward()

    def with_kl(groups: range, sums: CompletionSums) -> Tensor:
        assert sums.kl is not None
        return objective(groups, sums) + (COEFFICIENTS * sums.kl).sum()

    reference = CompletionScorer(other, flat=flat).requires_grad_(False)
    scorer, wanted = CompletionScorer(model, flat=flat), Wanted(kl=direction, square=True)
    loss, sums = scorer(GROUPS, with_kl, wanted=wanted, reference=reference)
    assert loss is not None and sums.kl is not None and sums.square is not None
    loss.backward()
    assert expected.min() > 0
    torch.testing.assert_close(sums.kl, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums.logp, expected_logps.detach(), atol=1e-5, rtol=1e-6)
    assert not sums.kl.requires_grad and not sums.square.requires_grad
    assert_same_gradient(gradient(model), gradient(plain))


def test_padded_rows_learn_the_same(model: PreTrainedModel) -> None:
    plain = copy.deepcopy(model)
    curved(logps(plain, GROUPS), COEFFICIENTS).backward()
    loss, _ = CompletionScorer(model, flat=False)(GROUPS, objective)
    assert loss is not None
    loss.backward()
    assert_same_gradient(gradient(model), gradient(plain))


def test_under_autocast_the_head_computes_in_bfloat16_and_adds_in_float64(model: PreTrainedModel) -> None:
    plain = copy.deepcopy(model)
    expected = logps(plain, GROUPS)
    curved(expected, COEFFICIENTS).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, sums = CompletionScorer(model, flat=True)(GROUPS, objective)
    assert loss is not None
    loss.backward()
    assert sums.logp.dtype == loss.dtype == torch.float64
    assert 1e-4 < (sums.logp - expected).abs().max() < 0.02 * expected.abs().max()
    assert_same_gradient(gradient(model), gradient(plain), tolerance=0.1)
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {
        torch.float32
    }
