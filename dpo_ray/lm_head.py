"""The language-model head at completion positions: log-probs and both gradients, tile by tile."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_TILE_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
"""Logits of one tile in fp32. Tiles of a gigabyte keep a GPU busy; on a CPU they only cost memory."""


class CompletionSums(NamedTuple):
    """[R] of each completion, summed over its tokens in float64, in nats.

    In fp32, the rounding of long sums would be larger than all other rounding.
    """

    logp: Tensor
    square: Tensor | None = None
    """log sum_v pi(v)^2, without gradient (WPO, arXiv:2406.11827)."""
    kl: Tensor | None = None
    """The exact KL at every token, to or from a reference."""

    def part(self, completions: slice) -> "CompletionSums":
        return self.map(lambda values: values[completions])

    def map(self, change: Callable[[Tensor], Tensor]) -> "CompletionSums":
        square, kl = (None if values is None else change(values) for values in (self.square, self.kl))
        return CompletionSums(change(self.logp), square, kl)


Objective = Callable[[range, CompletionSums], Tensor]
"""The summed loss of the groups of a range, from the sums of their completions."""

KlDirection = Literal["from_reference", "to_reference"]
"""KL(reference || policy), as TDPO (arXiv:2404.11999) penalises it, or KL(policy || reference)."""


@dataclass(frozen=True, slots=True)
class Head:
    """logits = cap * tanh((hidden @ weight.T + bias) / cap); no cap where the model has none."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    cap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V] in fp32, from [n, H] hidden states."""
        logits = nn.functional.linear(hidden, self.weight, self.bias).float()
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def log_probs(self, hidden: Tensor) -> Tensor:
        return self.logits(hidden).log_softmax(-1)


@dataclass(frozen=True, slots=True)
class Predicted:
    """Which tokens are predicted: N tokens of R completions of consecutive groups."""

    targets: Tensor
    """[N] token ids."""
    completion_of_token: Tensor
    """[N] in 0 … R - 1, ascending."""
    token_weights: Tensor | None
    """[N] what a token's log-prob counts (LD-DPO); None: each counts 1."""
    tokens_of_group: Sequence[int]
    completions_of_group: Sequence[int]

    @property
    def num_completions(self) -> int:
        return sum(self.completions_of_group)

    def weighted(self, per_token: Tensor, tokens: slice) -> Tensor:
        return per_token if self.token_weights is None else per_token * self.token_weights[tokens]


@dataclass(frozen=True, slots=True)
class _Tile:
    """Consecutive groups whose logits are held at the same time."""

    groups: range
    tokens: slice
    completions: slice

    @property
    def num_tokens(self) -> int:
        return self.tokens.stop - self.tokens.start


def completion_sums(head: Head, hidden: Tensor, predicted: Predicted, *, with_square: bool) -> CompletionSums:
    """Sums of every completion from [N, H] hidden states; no gradient flows."""
    sums = _empty_sums(predicted, hidden.device, with_square=with_square)
    for tile in _tiles(predicted, head.weight):
        for tokens in _pieces(tile, head.weight):
            _add_sums(sums, head.log_probs(hidden[tokens]), predicted, tokens)
    return sums


def differentiable_sums(
    head: Head,
    hidden: Tensor,
    predicted: Predicted,
    *,
    with_square: bool,
    reference: tuple[Head, Tensor],
    kl: KlDirection,
) -> CompletionSums:
    """The same and the KL through autograd, each tile computed again in the backward pass.

    `reference`: its head and [N, H'] hidden states.
    """
    sums = _empty_sums(predicted, hidden.device, with_square=with_square)
    logps, kls = [], []
    for tile in _tiles(predicted, head.weight):
        for tokens in _pieces(tile, head.weight):
            other = (reference[0], reference[1][tokens])
            logp, square, token_kl = checkpoint(  # type: ignore[misc]
                _token_values, head, hidden[tokens], predicted.targets[tokens], other, kl, use_reentrant=False
            )
            logps.append(logp)
            kls.append(token_kl)
            if sums.square is not None:
                sums.square.index_add_(0, predicted.completion_of_token[tokens], square.detach().double())
    logp = predicted.weighted(torch.cat(logps), slice(0, len(predicted.targets)))
    zeros = torch.zeros_like(sums.logp)
    return CompletionSums(
        logp=zeros.index_add(0, predicted.completion_of_token, logp.double()),
        square=sums.square,
        kl=zeros.index_add(0, predicted.completion_of_token, torch.cat(kls).double()),
    )


def fused_loss(
    head: Head, hidden: Tensor, predicted: Predicted, objective: Objective, *, with_square: bool
) -> tuple[Tensor, CompletionSums]:
    """The summed loss, differentiable in hidden states, weight and bias, and the completions' sums.

    Logits, log-probs, the loss's derivatives and both gradients come from one pass over each tile, so that
    the head costs 6 N H V floating-point operations, and no logits outlive their tile.
    """
    loss, logp, square = _FusedLoss.apply(  # type: ignore[misc]
        hidden, head.weight, head.bias, head.cap, predicted, objective, with_square
    )
    return loss, CompletionSums(logp, square)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cap: float | None,
        predicted: Predicted,
        objective: Objective,
        with_square: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        head = Head(weight, bias, cap)
        sums = _empty_sums(predicted, hidden.device, with_square=with_square)
        gradients = _Gradients(hidden, weight if ctx.needs_input_grad[1] else None, bias)
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for tile in _tiles(predicted, weight):
            pieces = _pieces(tile, weight)
            log_probs = torch.empty(0)
            for tokens in pieces:
                log_probs = head.log_probs(hidden[tokens])
                _add_sums(sums, log_probs, predicted, tokens)
            value, slopes = _slopes(objective, tile, sums)
            loss += value
            per_token = slopes[predicted.completion_of_token[tile.tokens] - tile.completions.start]
            per_token = predicted.weighted(per_token, tile.tokens)
            # The logits of a group that fills several tiles are computed again: its loss needs all of them.
            for tokens in pieces:
                if len(pieces) > 1:
                    log_probs = head.log_probs(hidden[tokens])
                begin = tokens.start - tile.tokens.start
                slope = per_token[begin : begin + tokens.stop - tokens.start]
                gradients.add(head, hidden, tokens, log_probs, predicted.targets[tokens], slope)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(*(each for each in (sums.logp, sums.square) if each is not None))
        return loss, sums.logp, sums.square

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return (*ctx.gradients.scaled(grad_outputs[0]), None, None, None, None)


class _Gradients:
    """Of hidden states, weight and bias; filled tile by tile, the weight's in fp32."""

    def __init__(self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        self._dtype = hidden.dtype
        self._hidden = torch.empty_like(hidden)
        self._weight = None if weight is None else torch.zeros_like(weight, dtype=torch.float32)
        self._bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)

    def add(
        self, head: Head, hidden: Tensor, tokens: slice, log_probs: Tensor, targets: Tensor, slope: Tensor
    ) -> None:
        """`slope`: [n] derivative of the loss by each token's log-prob. `log_probs` is used up."""
        shrink = None if head.cap is None else _tanh_slope(log_probs, head, hidden[tokens])
        # d log p(target) / d logits = onehot(target) - p; here its negative.
        error = log_probs.exp_()
        error[torch.arange(len(targets), device=targets.device), targets] -= 1
        if shrink is not None:
            error *= shrink
        error = error.to(head.weight.dtype)
        minus_slope = -slope[:, None]
        self._hidden[tokens] = (error @ head.weight).mul_(minus_slope)
        if self._weight is not None:
            scaled = (hidden[tokens] * minus_slope).to(error.dtype)
            if error.dtype == torch.float32:
                self._weight.addmm_(error.T, scaled)
            else:
                self._weight += error.T @ scaled
        if self._bias is not None:
            self._bias += (error.float() * minus_slope).sum(0)

    def scaled(self, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (self._hidden, self._weight, self._bias)
        return tuple(None if each is None else each.mul_(factor).to(self._dtype) for each in gradients)


def _tanh_slope(log_probs: Tensor, head: Head, hidden: Tensor) -> Tensor:
    """[n, V] derivative of the capped logits by the plain ones."""
    assert head.cap is not None
    return 1 - (head.logits(hidden) / head.cap) ** 2


def _slopes(objective: Objective, tile: _Tile, sums: CompletionSums) -> tuple[Tensor, Tensor]:
    """The loss of a tile's groups, and its [r] derivatives by the log-probs of their completions."""
    logp = sums.logp[tile.completions].detach().requires_grad_()
    with torch.enable_grad():
        loss = objective(tile.groups, sums.part(tile.completions)._replace(logp=logp))
    return loss.detach(), torch.autograd.grad(loss, logp)[0].float()


def _token_values(
    head: Head, hidden: Tensor, targets: Tensor, reference: tuple[Head, Tensor], kl: KlDirection
) -> tuple[Tensor, Tensor, Tensor]:
    """[n] log-probs, log sum of squares, and KL of a piece's tokens."""
    log_probs = head.log_probs(hidden)
    with torch.no_grad():
        theirs = reference[0].log_probs(reference[1])
    logp = log_probs.gather(-1, targets[:, None]).squeeze(-1)
    return logp, (2 * log_probs).logsumexp(-1), token_kl(log_probs, theirs, kl)


def token_kl(log_probs: Tensor, reference: Tensor, direction: KlDirection) -> Tensor:
    """[n] from the [n, V] log-probs of policy and reference."""
    if direction == "from_reference":
        return (reference.exp() * (reference - log_probs)).sum(-1)
    return (log_probs.exp() * (log_probs - reference)).sum(-1)


def _empty_sums(predicted: Predicted, device: torch.device, *, with_square: bool) -> CompletionSums:
    zeros = torch.zeros(predicted.num_completions, dtype=torch.float64, device=device)
    return CompletionSums(zeros, zeros.clone() if with_square else None)


def _add_sums(sums: CompletionSums, log_probs: Tensor, predicted: Predicted, tokens: slice) -> None:
    targets, completions = predicted.targets[tokens], predicted.completion_of_token[tokens]
    logp = log_probs.gather(-1, targets[:, None]).squeeze(-1)
    sums.logp.index_add_(0, completions, predicted.weighted(logp, tokens).double())
    if sums.square is not None:
        sums.square.index_add_(0, completions, (2 * log_probs).logsumexp(-1).double())


def _tiles(predicted: Predicted, weight: Tensor) -> Iterator[_Tile]:
    """Whole groups, as many as fit; a group that is too long for one tile has its own."""
    limit = _tokens_per_tile(weight)
    group = token = completion = 0
    while group < len(predicted.tokens_of_group):
        last, tokens = group + 1, predicted.tokens_of_group[group]
        while last < len(predicted.tokens_of_group) and tokens + predicted.tokens_of_group[last] <= limit:
            tokens += predicted.tokens_of_group[last]
            last += 1
        completions = sum(predicted.completions_of_group[group:last])
        yield _Tile(
            range(group, last), slice(token, token + tokens), slice(completion, completion + completions)
        )
        group, token, completion = last, token + tokens, completion + completions


def _pieces(tile: _Tile, weight: Tensor) -> list[slice]:
    """One piece, or equal ones where the tile's only group is too long."""
    num = -(-tile.num_tokens // _tokens_per_tile(weight))
    bounds = [tile.tokens.start + tile.num_tokens * i // num for i in range(num + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def _tokens_per_tile(weight: Tensor) -> int:
    return max(1, _TILE_BYTES[weight.device.type] // (4 * weight.shape[0]))
