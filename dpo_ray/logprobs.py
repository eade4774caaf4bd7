"""Completion log-probs, without ever holding the logits of all tokens."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dpo_ray.batching import Rows

_POSITIONS_PER_TILE = 1024


class CompletionScorer(nn.Module):
    """Log-probs of completions under a causal language model: the module that is trained."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Rows) -> Tensor:
        """[R] log-probs of the rows' completions, summed in fp32, in nats."""
        row_of_token, logps = self.token_logps(rows)
        sums = torch.zeros(len(rows.input_ids), dtype=torch.float32, device=logps.device)
        return sums.index_add(0, row_of_token, logps)

    def token_logps(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """[N] row index and [N] log-prob of every completion token, rows in order."""
        decoder = self.model.get_decoder()
        assert decoder is not None
        hidden = decoder(input_ids=rows.input_ids, attention_mask=rows.attention_mask).last_hidden_state
        row_of_token, position = rows.completion_mask.nonzero(as_tuple=True)
        targets = rows.input_ids[row_of_token, position]
        before = hidden[row_of_token, position - 1]  # Position t predicts token t + 1.
        tiles = zip(before.split(_POSITIONS_PER_TILE), targets.split(_POSITIONS_PER_TILE), strict=True)
        logps = [checkpoint(self._tile_logps, *tile, use_reentrant=False) for tile in tiles]
        return row_of_token, torch.cat(logps)

    def _tile_logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()  # type: ignore[misc]
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        if cap:
            logits = cap * torch.tanh(logits / cap)
        return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
