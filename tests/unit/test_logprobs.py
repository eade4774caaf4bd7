"""Padded and tiled log-probs are those of a plain forward pass of each sequence alone."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from dpo_ray import logprobs
from dpo_ray.batching import pad_rows
from dpo_ray.logprobs import CompletionScorer
from dpo_ray.models import load_model, make_canaries
from dpo_ray.types import TokenSequence

SEQUENCES = [
    TokenSequence([5, 9, 14], [20, 31, 2]),
    TokenSequence([7], [8, 0, 44, 45, 46, 2]),  # 0 is the padding id: here it is a token like any other.
    TokenSequence([11, 12, 13, 14, 15, 16, 17], [3]),
]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return load_model(tiny_model)


@torch.no_grad()
def plain_logps(model: PreTrainedModel, sequence: TokenSequence) -> list[float]:
    """Log-prob of each completion token, from one unpadded row through the whole model."""
    ids = [*sequence.prompt_ids, *sequence.completion_ids]
    logps = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [logps[place - 1, ids[place]].item() for place in range(len(sequence.prompt_ids), len(ids))]


@torch.no_grad()
def test_sums_agree_with_a_plain_forward_of_each_sequence(model: PreTrainedModel) -> None:
    sums = CompletionScorer(model)(pad_rows(SEQUENCES))
    expected = [sum(plain_logps(model, sequence)) for sequence in SEQUENCES]
    assert sums.tolist() == pytest.approx(expected, abs=1e-5)
    assert sums.dtype == torch.float32
    assert len(set(expected)) == len(expected)


@torch.no_grad()
def test_token_logps_come_row_by_row_in_the_order_of_the_tokens(model: PreTrainedModel) -> None:
    rows, logps = CompletionScorer(model).token_logps(pad_rows(SEQUENCES))
    assert rows.tolist() == [0] * 3 + [1] * 6 + [2]
    expected = [logp for sequence in SEQUENCES for logp in plain_logps(model, sequence)]
    assert logps.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("tile", [1, 3, 10])
def test_tiles_change_neither_value_nor_gradient(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    def value_and_gradient() -> tuple[list[float], torch.Tensor]:
        model.zero_grad()
        sums = CompletionScorer(model)(pad_rows(SEQUENCES))
        sums.sum().backward()
        weight = model.get_input_embeddings().weight
        assert isinstance(weight.grad, torch.Tensor)
        return sums.tolist(), weight.grad.clone()

    whole, whole_gradient = value_and_gradient()
    monkeypatch.setattr(logprobs, "_POSITIONS_PER_TILE", tile)
    tiled, tiled_gradient = value_and_gradient()
    assert tiled == pytest.approx(whole, abs=1e-5)
    torch.testing.assert_close(tiled_gradient, whole_gradient, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_capped_logits_are_those_of_the_model_that_caps_them(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.config, "final_logit_softcapping", 2.0, raising=False)
    (ids,) = [[*SEQUENCES[0].prompt_ids, *SEQUENCES[0].completion_ids]]
    logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    logps = (2.0 * torch.tanh(logits / 2.0)).log_softmax(-1)
    expected = sum(logps[place - 1, ids[place]].item() for place in range(3, 6))
    assert CompletionScorer(model)(pad_rows(SEQUENCES[:1])).item() == pytest.approx(expected, abs=1e-5)


def test_canaries_hold_every_token_but_the_first(model: PreTrainedModel) -> None:
    sequences = [(5, 9, 14, 20), (7, 8)]
    canaries = make_canaries(model, sequences)
    assert [tuple(canary.token_ids) for canary in canaries] == sequences
    for canary, ids in zip(canaries, sequences, strict=True):
        expected = plain_logps(model, TokenSequence(ids[:1], ids[1:]))
        assert canary.logprobs == pytest.approx(expected, abs=1e-5)
