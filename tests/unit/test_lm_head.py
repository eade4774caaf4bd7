"""The fused head gives the loss and the gradients of plain log-softmax, and never holds all logits."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from textbook import assert_same_gradient
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dpo_ray import lm_head
from dpo_ray.lm_head import (
    CompletionSums,
    Head,
    Predicted,
    completion_sums,
    differentiable_sums,
    fused_loss,
)

HIDDEN, VOCABULARY = 8, 53
LENGTHS = [[3, 2], [3], [8, 4, 8], [1], [2, 6]]
"""Of each completion of each group, in tokens."""
NUM_TOKENS = sum(map(sum, LENGTHS))
COEFFICIENTS = torch.linspace(-2, 2, sum(map(len, LENGTHS)))
STARTS = [0, 2, 3, 6, 7, 9]


@dataclass(frozen=True)
class Problem:
    """Leaves that collect gradients, and what is predicted from them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    cap: float | None
    predicted: Predicted

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, self.cap)

    @property
    def gradients(self) -> list[Tensor]:
        leaves = [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]


def make_problem(*, bias: bool = False, cap: float | None = None, weighted: bool = False) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    lengths = torch.tensor([length for group in LENGTHS for length in group])
    predicted = Predicted(
        targets=torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator),
        completion_of_token=torch.arange(len(lengths)).repeat_interleave(lengths),
        token_weights=torch.rand(NUM_TOKENS, generator=generator) if weighted else None,
        tokens_of_group=[sum(group) for group in LENGTHS],
        completions_of_group=[len(group) for group in LENGTHS],
    )
    bias_leaf = leaf(VOCABULARY) if bias else None
    return Problem(leaf(NUM_TOKENS, HIDDEN), leaf(VOCABULARY, HIDDEN), bias_leaf, cap, predicted)


def objective(groups: range, sums: CompletionSums) -> Tensor:
    """[] a loss whose slope is another one for each completion."""
    coefficients = COEFFICIENTS[STARTS[groups.start] : STARTS[groups.stop]]
    return (coefficients * F.logsigmoid(0.3 * sums.logp)).sum()


def plain_log_probs(problem: Problem) -> Tensor:
    """[N, V] in one piece."""
    logits = problem.hidden @ problem.weight.T
    logits = logits if problem.bias is None else logits + problem.bias
    logits = logits if problem.cap is None else problem.cap * torch.tanh(logits / problem.cap)
    return logits.log_softmax(-1)


def plain_sums(problem: Problem, per_token: Tensor) -> Tensor:
    """[C] of a value of each token, in float64."""
    completions = range(len(COEFFICIENTS))
    return torch.stack(
        [per_token[problem.predicted.completion_of_token == c].double().sum() for c in completions]
    )


def plain_logps(problem: Problem) -> Tensor:
    """[C] by autograd through everything."""
    logps = plain_log_probs(problem)[torch.arange(NUM_TOKENS), problem.predicted.targets]
    weights = problem.predicted.token_weights
    return plain_sums(problem, logps if weights is None else logps * weights)


def plain_loss(problem: Problem) -> Tensor:
    return objective(range(len(LENGTHS)), CompletionSums(plain_logps(problem)))


@pytest.fixture(params=[10_000, 12, 5, 1])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens of a tile: all; some groups and the longest one in two pieces; one group or less; one token."""
    set_tile(monkeypatch, request.param)
    return request.param


def set_tile(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    monkeypatch.setattr(lm_head, "_TILE_BYTES", {"cpu": 4 * VOCABULARY * num_tokens})


VARIANTS = pytest.mark.parametrize(
    "variant", [{}, {"bias": True}, {"cap": 1.5}, {"weighted": True}, {"bias": True, "cap": 1.5}]
)


@VARIANTS
def test_loss_and_gradients_are_those_of_plain_log_softmax(tile: int, variant: dict[str, Any]) -> None:
    ours, theirs = make_problem(**variant), make_problem(**variant)
    expected = plain_loss(theirs)
    expected.backward()
    loss, sums = fused_loss(ours.head, ours.hidden, ours.predicted, objective, with_square=True)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(sums.logp, plain_logps(theirs).detach(), atol=1e-5, rtol=1e-6)
    squares = plain_sums(theirs, plain_log_probs(theirs).exp().square().sum(-1).log())
    torch.testing.assert_close(sums.square, squares.detach(), atol=1e-5, rtol=1e-5)
    assert len(ours.gradients) == len(theirs.gradients) == (3 if variant.get("bias") else 2)
    for mine, other in zip(ours.gradients, theirs.gradients, strict=True):
        assert_same_gradient(mine, other)


@VARIANTS
def test_sums_alone_are_the_same(tile: int, variant: dict[str, Any]) -> None:
    problem = make_problem(**variant)
    with torch.no_grad():
        sums = completion_sums(problem.head, problem.hidden, problem.predicted, with_square=False)
        torch.testing.assert_close(sums.logp, plain_logps(problem), atol=1e-5, rtol=1e-6)
    assert sums.square is None


def test_a_loss_that_counts_double_has_twice_the_gradient(tile: int) -> None:
    once, twice = make_problem(), make_problem()
    for factor, problem in ((1, once), (2, twice)):
        loss, _ = fused_loss(problem.head, problem.hidden, problem.predicted, objective, with_square=False)
        (factor * loss).backward()
    for one, two in zip(once.gradients, twice.gradients, strict=True):
        torch.testing.assert_close(two, 2 * one)


def test_a_frozen_head_passes_its_gradient_on_and_keeps_none(tile: int) -> None:
    ours, theirs = make_problem(), make_problem()
    ours.weight.requires_grad_(False)
    loss, _ = fused_loss(ours.head, ours.hidden, ours.predicted, objective, with_square=False)
    loss.backward()
    plain_loss(theirs).backward()
    assert ours.weight.grad is None and ours.hidden.grad is not None and theirs.hidden.grad is not None
    assert_same_gradient(ours.hidden.grad, theirs.hidden.grad)


def test_each_group_is_asked_for_its_loss_once_with_its_whole_sums(tile: int) -> None:
    problem = make_problem()
    asked: list[int] = []
    expected = plain_logps(problem).detach()

    def watching(groups: range, sums: CompletionSums) -> Tensor:
        asked.extend(groups)
        own = expected[STARTS[groups.start] : STARTS[groups.stop]]
        torch.testing.assert_close(sums.logp.detach(), own, atol=1e-5, rtol=1e-6)
        return objective(groups, sums)

    fused_loss(problem.head, problem.hidden, problem.predicted, watching, with_square=False)
    assert asked == list(range(len(LENGTHS)))


@VARIANTS
def test_the_kl_and_its_gradient_are_those_of_plain_log_softmax(tile: int, variant: dict[str, Any]) -> None:
    ours, theirs, reference = make_problem(**variant), make_problem(**variant), make_problem()
    their_head, their_hidden = Head(reference.weight, None, None), reference.hidden + 0.3

    def both(sums: CompletionSums) -> Tensor:
        assert sums.kl is not None
        return objective(range(len(LENGTHS)), sums) + (COEFFICIENTS * sums.kl).sum()

    with torch.no_grad():
        other = plain_log_probs(replace(reference, hidden=their_hidden))
    mine = plain_log_probs(theirs)
    expected = plain_sums(theirs, (other.exp() * (other - mine)).sum(-1))
    both(CompletionSums(plain_logps(theirs), kl=expected)).backward()
    sums = differentiable_sums(
        ours.head,
        ours.hidden,
        ours.predicted,
        with_square=True,
        reference=(their_head, their_hidden),
        kl="from_reference",
    )
    both(sums).backward()
    torch.testing.assert_close(sums.kl, expected, atol=1e-5, rtol=1e-5)
    for one, two in zip(ours.gradients, theirs.gradients, strict=True):
        assert_same_gradient(one, two)


class LargestLogits(TorchDispatchMode):
    """Notes the most tokens of which any one tensor holds logits."""

    num_tokens = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor) and VOCABULARY in tensor.shape and HIDDEN not in tensor.shape:
                self.num_tokens = max(self.num_tokens, tensor.numel() // VOCABULARY)
        return out


@pytest.mark.parametrize("num_tokens", [20, 7])
def test_no_more_logits_are_held_than_a_tiles(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    set_tile(monkeypatch, num_tokens)
    problem = make_problem(bias=True, cap=1.5, weighted=True)
    given = (problem.head, problem.hidden, problem.predicted)
    with LargestLogits() as fused:
        fused_loss(*given, objective, with_square=True)[0].backward()
    with LargestLogits() as alone, torch.no_grad():
        completion_sums(*given, with_square=True)
    with LargestLogits() as with_kl:
        reference = (problem.head, problem.hidden)
        sums = differentiable_sums(*given, with_square=True, reference=reference, kl="to_reference")
        objective(range(len(LENGTHS)), sums).backward()
    with LargestLogits() as plain:
        plain_loss(problem).backward()
    assert plain.num_tokens == NUM_TOKENS
    assert 0 < fused.num_tokens <= num_tokens
    assert 0 < alone.num_tokens <= num_tokens
    assert 0 < with_kl.num_tokens <= num_tokens


def _operations_of_addmm(_: Any, left: list[int], right: list[int], **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize(
    ("num_tokens", "frozen", "passes"), [(20, False, 3), (20, True, 2), (7, False, None)]
)
def test_the_head_costs_three_matrix_products_of_two_operations_each(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, frozen: bool, passes: int | None
) -> None:
    set_tile(monkeypatch, num_tokens)
    problem = make_problem()
    problem.weight.requires_grad_(not frozen)
    in_place = {torch.ops.aten.addmm_: _operations_of_addmm}  # The counter would pass over it.
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss, _ = fused_loss(problem.head, problem.hidden, problem.predicted, objective, with_square=False)
        loss.backward()
    product = 2 * HIDDEN * VOCABULARY
    # The logits of groups that are longer than a tile, here of 20 and 8 tokens, are computed twice.
    expected = 3 * NUM_TOKENS + 28 if passes is None else passes * NUM_TOKENS
    assert counter.get_total_flops() == expected * product


def test_in_bfloat16_the_gradients_are_added_up_in_float32_and_the_sums_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_tile(monkeypatch, 5)
    theirs, ours = make_problem(), make_problem()
    plain_loss(theirs).backward()
    head = Head(ours.weight.bfloat16(), None, None)
    loss, sums = fused_loss(head, ours.hidden.bfloat16(), ours.predicted, objective, with_square=False)
    loss.backward()
    assert loss.dtype == sums.logp.dtype == torch.float64
    for mine, other in zip(ours.gradients, theirs.gradients, strict=True):
        assert_same_gradient(mine, other, tolerance=0.02)
