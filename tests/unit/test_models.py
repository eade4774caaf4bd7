"""Models that flat rows would get wrong are known by trial and trained on padded ones; errors are clear."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FLAT, PADDED, make_model
from textbook import load_plain, logps, make_groups, token_logps
from torch import Tensor

from dpo_ray.attention import NAME
from dpo_ray.batching import PromptGroup
from dpo_ray.logprobs import CompletionScorer
from dpo_ray.models import (
    checkpoint_activations,
    load_context_length,
    load_model,
    load_tokenizer,
    make_canaries,
    make_scorer,
    save_policy,
)

LONG = make_groups(5, longest=20)
"""Longer than the windows of all families."""


@pytest.mark.parametrize("family", FLAT)
def test_a_family_that_can_runs_on_flat_rows(family: str, tmp_path: Path) -> None:
    make_model(family).save_pretrained(tmp_path)
    scorer = make_scorer(tmp_path)
    assert scorer.flat
    assert scorer.model.config._attn_implementation == NAME


@pytest.mark.parametrize("family", PADDED)
def test_a_family_that_cannot_is_trained_on_padded_rows_and_the_log_says_why(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="dpo_ray"):
        scorer = make_scorer(tmp_path)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "dpo_ray.models"]
    assert message.startswith(f"{tmp_path} is trained on padded rows: {type(model).__name__} ")
    assert PADDED[family][1] in message
    assert not scorer.flat
    with torch.no_grad():
        torch.testing.assert_close(scorer(LONG)[1].logp, logps(model, LONG), atol=1e-4, rtol=1e-6)


def test_capped_attention_is_capped_on_padded_rows_too(tmp_path: Path) -> None:
    model = make_model("Gemma2")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = logps(model, LONG)
        sums = make_scorer(tmp_path, flat=False)(LONG)[1]
    torch.testing.assert_close(sums.logp, expected, atol=1e-4, rtol=1e-6)


def test_nothing_is_said_of_rows_that_are_padded_by_choice(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not make_scorer(tiny_model, flat=False).flat
    assert make_scorer(tiny_model).flat
    assert caplog.records == []


def test_checkpointed_layers_run_again_and_give_the_same_gradient() -> None:
    group = [PromptGroup((5, 6), ((7, 8), (9,)))]

    def run(*, checkpointed: bool) -> tuple[int, list[Tensor]]:
        model = make_model("Llama")
        calls: list[Any] = []
        attention = model.get_submodule("model.layers.0.self_attn")
        attention.register_forward_pre_hook(lambda *_: calls.append(1))
        if checkpointed:
            checkpoint_activations(model)
        loss, _ = CompletionScorer(model, flat=True)(group, lambda _, sums: sums.logp.sum())
        assert loss is not None
        loss.backward()
        return len(calls), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    (once, plain), (twice, again) = run(checkpointed=False), run(checkpointed=True)
    assert (once, twice) == (1, 2)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, again, strict=True))


def test_a_saved_policy_is_what_transformers_loads(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model)
    state = {name: 2 * value for name, value in model.state_dict().items()}
    save_policy(make_scorer(tiny_model).model, load_tokenizer(tiny_model), tmp_path, state)
    loaded = load_plain(tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert NAME not in (tmp_path / "config.json").read_text()
    assert load_tokenizer(tmp_path).get_vocab() == load_tokenizer(tiny_model).get_vocab()


def test_canaries_hold_every_token_but_the_first(tiny_model: Path) -> None:
    sequences = [(5, 9, 14, 20), (7, 8)]
    canaries = make_canaries(make_scorer(tiny_model), sequences)
    assert [tuple(canary.token_ids) for canary in canaries] == sequences
    for canary, ids in zip(canaries, sequences, strict=True):
        with torch.no_grad():
            (expected,) = token_logps(load_plain(tiny_model), [PromptGroup(ids[:1], (ids[1:],))])
        assert canary.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_model_is_loaded_in_float32_for_evaluation(tiny_model: Path, tmp_path: Path) -> None:
    load_plain(tiny_model).bfloat16().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


def test_the_context_length_is_the_configurations(tiny_model: Path, tmp_path: Path) -> None:
    assert load_context_length(tiny_model) == 64
    make_model("GPT2").save_pretrained(tmp_path)
    assert load_context_length(tmp_path) == 64


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    for load in (load_model, load_tokenizer, load_context_length):
        with pytest.raises(ValueError, match=f"--model {tmp_path}"):
            load(tmp_path)
