"""Completion log-probs under a causal language model, on flat rows or on padded ones."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_ray.attention import NAME, FlatAttention
from dpo_ray.batching import FlatRow, PromptGroup, flatten, pad
from dpo_ray.lm_head import (
    CompletionSums,
    Head,
    KlDirection,
    Objective,
    Predicted,
    completion_sums,
    differentiable_sums,
    fused_loss,
    token_kl,
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be computed beside the summed log-probs, and how these are summed."""

    square: bool = False
    """log sum_v pi(v)^2 of every token (WPO)."""
    ld_alpha: float = 1.0
    """What a token counts that lies beyond the end of its group's shortest completion (LD-DPO)."""
    kl: KlDirection = "from_reference"
    """Direction of the KL, where a reference is given."""


_LOGP_ONLY = Wanted()


class CompletionScorer(nn.Module):
    """Scores groups of completions; wrapped for data-parallel training, it is the module that is trained."""

    def __init__(self, model: PreTrainedModel, *, flat: bool) -> None:
        super().__init__()
        self.model = model
        self.flat = flat
        if flat:
            model.set_attn_implementation(NAME)

    def forward(
        self,
        groups: Sequence[PromptGroup],
        objective: Objective | None = None,
        *,
        wanted: Wanted = _LOGP_ONLY,
        reference: "CompletionScorer | None" = None,
    ) -> tuple[Tensor | None, CompletionSums]:
        """The summed loss where there is an objective, and the sums of all completions, groups in order.

        With a `reference`, another policy, the KL between the two is among them.
        """
        scores = self._flat if self.flat else self._padded
        return scores(groups, objective, wanted, reference)

    def _flat(
        self,
        groups: Sequence[PromptGroup],
        objective: Objective | None,
        wanted: Wanted,
        reference: "CompletionScorer | None",
    ) -> tuple[Tensor | None, CompletionSums]:
        row = flatten(groups, self._device)
        head, hidden = self._states(row)
        predicted = Predicted(
            targets=row.targets,
            completion_of_token=row.completion_of_token,
            token_weights=_token_weights(groups, wanted.ld_alpha, self._device),
            tokens_of_group=row.tokens_of_group,
            completions_of_group=row.completions_of_group,
        )
        with self._without_autocast():
            if reference is not None:
                with torch.no_grad():
                    other = reference.hidden_states(row)
                sums = differentiable_sums(
                    head, hidden, predicted, with_square=wanted.square, reference=other, kl=wanted.kl
                )
                return _loss_of(objective, groups, sums)
            if objective is None:
                with torch.no_grad():
                    return None, completion_sums(head, hidden, predicted, with_square=wanted.square)
            return fused_loss(head, hidden, predicted, objective, with_square=wanted.square)

    def token_logps(self, group: PromptGroup) -> Tensor:
        """[N] log-probs of the completion tokens of one group, without gradient."""
        with torch.no_grad():
            if not self.flat:
                targets = torch.tensor([token for ids in group.completions for token in ids])
                return self._all_log_probs([group]).gather(-1, targets.to(self._device)[:, None]).squeeze(-1)
            row = flatten([group], self._device)
            head, hidden = self._states(row)
            with self._without_autocast():
                return head.logits(hidden).log_softmax(-1).gather(-1, row.targets[:, None]).squeeze(-1)

    def hidden_states(self, row: FlatRow) -> tuple[Head, Tensor]:
        """The head, and [N, H] last hidden states at the places that predict a completion token."""
        return self._states(row)

    def padded_log_probs(self, groups: Sequence[PromptGroup]) -> Tensor:
        """[N, V] log-probs, on padded rows, at the places that predict a completion token."""
        return self._all_log_probs(groups)

    def _states(self, row: FlatRow) -> tuple[Head, Tensor]:
        decoder = self.model.get_decoder()
        assert decoder is not None
        states = decoder(
            input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False, flat=FlatAttention(row)
        ).last_hidden_state[0, row.sources]
        output = self.model.get_output_embeddings()
        assert isinstance(output, nn.Linear)
        dtype = _compute_dtype(output.weight)
        bias = None if output.bias is None else output.bias.to(dtype)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return Head(output.weight.to(dtype), bias, cap), states.to(dtype)

    def _padded(
        self,
        groups: Sequence[PromptGroup],
        objective: Objective | None,
        wanted: Wanted,
        reference: "CompletionScorer | None",
    ) -> tuple[Tensor | None, CompletionSums]:
        """The same by the model's own forward pass, with all logits of the rows at once."""
        rows = pad(groups, self._device)
        log_probs = self._all_log_probs(groups)
        completion, position = rows.completion_mask.nonzero(as_tuple=True)
        targets = rows.input_ids[completion, position]
        logp = log_probs.gather(-1, targets[:, None]).squeeze(-1)
        weights = _token_weights(groups, wanted.ld_alpha, self._device)
        zeros = torch.zeros(len(rows.input_ids), dtype=torch.float64, device=self._device)
        square = kl = None
        if wanted.square:
            square = zeros.index_add(0, completion, (2 * log_probs.detach()).logsumexp(-1).double())
        if reference is not None:
            with torch.no_grad():
                theirs = reference.padded_log_probs(groups)
            kl = zeros.index_add(0, completion, token_kl(log_probs, theirs, wanted.kl).double())
        logp = zeros.index_add(0, completion, (logp if weights is None else logp * weights).double())
        return _loss_of(objective, groups, CompletionSums(logp, square, kl))

    def _all_log_probs(self, groups: Sequence[PromptGroup]) -> Tensor:
        """[N, V] log-probs at the places that predict a completion token."""
        rows = pad(groups, self._device)
        completion, position = rows.completion_mask.nonzero(as_tuple=True)
        logits = self.model(
            input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False
        ).logits
        return logits[completion, position - 1].float().log_softmax(-1)  # Position t predicts token t + 1.

    @property
    def _device(self) -> torch.device:
        return self.model.device

    def _without_autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, enabled=False)


def _loss_of(
    objective: Objective | None, groups: Sequence[PromptGroup], sums: CompletionSums
) -> tuple[Tensor | None, CompletionSums]:
    loss = None if objective is None else objective(range(len(groups)), sums)
    return loss, sums.map(Tensor.detach)


def _token_weights(groups: Sequence[PromptGroup], ld_alpha: float, device: torch.device) -> Tensor | None:
    """[N] 1 up to the length of the group's shortest completion, `ld_alpha` after it (arXiv:2409.06411)."""
    if ld_alpha == 1.0:
        return None
    weights: list[float] = []
    for group in groups:
        shared = min(map(len, group.completions))
        for ids in group.completions:
            weights += [1.0] * shared + [ld_alpha] * (len(ids) - shared)
    return torch.tensor(weights, device=device)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
