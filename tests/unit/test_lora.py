"""Adapters alone are trained; without them the policy is its start; with them merged, a plain model."""

from pathlib import Path

import pytest
import torch
from families import FLAT, make_model
from learners import make_learner
from peft import PeftModel
from textbook import gradient, load_plain, logps, make_groups, make_pairs
from torch import Tensor, nn

from dpo_ray.batching import pair_groups
from dpo_ray.config import LoraConfig
from dpo_ray.learner import Learner
from dpo_ray.logprobs import CompletionScorer
from dpo_ray.lora import AdapterOff, add_adapter, merged, without_adapter
from dpo_ray.models import load_tokenizer
from dpo_ray.registry import ADAPTER

LORA = LoraConfig(rank=4, alpha=6.0)
GROUPS = make_groups(5)
PAIRS = make_pairs(6)


def adapted(family: str) -> CompletionScorer:
    """A model with adapters that do something."""
    model = make_model(family)
    add_adapter(model, LORA, None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return CompletionScorer(model, flat=True)


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if ".lora_" in name}


@pytest.fixture(params=["Qwen3", "GPT2"])
def folder(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    """A start. GPT-2 keeps its linear weights the other way around, one of them square."""
    start = tmp_path / "start"
    model = make_model(request.param)
    model.resize_token_embeddings(len(load_tokenizer(tiny_model)))
    model.save_pretrained(start)
    load_tokenizer(tiny_model).save_pretrained(start)
    return start


def train(folder: Path, start: Path, *, steps: int = 3) -> Learner:
    learner = make_learner(folder, start, lora={"rank": 4, "alpha": 6.0}, learning_rate=1e-2)
    for _ in range(steps):
        learner.train_step(PAIRS)
    return learner


@torch.no_grad()
def test_new_adapters_change_nothing_and_are_the_same_everywhere() -> None:
    plain, first, second = (make_model("Llama") for _ in range(3))
    torch.manual_seed(3)
    add_adapter(first, LORA, None)
    drawn = torch.rand(2)
    add_adapter(second, LORA, None)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))  # Nobody else's random numbers are used up.
    ours, theirs = adapter_weights(first), adapter_weights(second)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert any(value.any() for value in ours.values())
    expected = CompletionScorer(plain, flat=True)(GROUPS)[1].logp
    assert torch.equal(CompletionScorer(first, flat=True)(GROUPS)[1].logp, expected)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX", "Phi"])
def test_only_adapters_of_layers_are_trained(family: str) -> None:
    model = adapted(family).model
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == list(adapter_weights(model))
    layers = {name.partition(".lora_")[0] for name in trained}
    linear = {"Linear", "Conv1D"}
    plain = make_model(family)
    head = plain.get_output_embeddings()
    assert layers == {
        name for name, m in plain.named_modules() if type(m).__name__ in linear and m is not head
    }


@pytest.mark.parametrize("family", ["Qwen3", "GPT2"])
def test_with_the_adapter_off_log_probs_are_exactly_the_starts(family: str) -> None:
    scorer = adapted(family)
    with torch.no_grad():
        expected = CompletionScorer(make_model(family), flat=True)(GROUPS)[1].logp
        on = scorer(GROUPS)[1].logp
        assert torch.equal(AdapterOff(scorer)(GROUPS)[1].logp, expected)
        assert torch.equal(scorer(GROUPS)[1].logp, on)
    assert (on - expected).abs().min() > 1e-3


def test_the_kl_to_the_adapter_switched_off_is_the_one_to_the_start() -> None:
    results = []
    for reference in (None, CompletionScorer(make_model("Qwen3"), flat=True).requires_grad_(False)):
        scorer = adapted("Qwen3")
        other = AdapterOff(scorer) if reference is None else reference
        loss, sums = scorer(GROUPS, lambda _, s: (s.logp + s.kl).sum(), reference=other)  # type: ignore[operator]
        assert loss is not None and sums.kl is not None
        loss.backward()
        results.append((sums.kl, gradient(scorer.model)))
    (ours, our_gradient), (theirs, their_gradient) = results
    assert theirs.min() > 0
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_gradient, their_gradient)


@pytest.mark.parametrize("family", FLAT)
def test_merged_weights_make_a_plain_model_that_says_the_same(family: str) -> None:
    scorer = adapted(family)
    state = merged(scorer.model, scorer.model.state_dict(), LORA)
    plain = make_model(family)
    plain.load_state_dict(state, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(scorer(GROUPS)[1].logp, logps(plain, GROUPS), atol=2e-5, rtol=1e-6)
    empty = without_adapter(scorer.model)
    assert list(empty.state_dict()) == list(plain.state_dict())
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}


def test_a_saved_version_is_a_plain_model_and_beside_it_the_adapter(folder: Path, tmp_path: Path) -> None:
    learner, saved = train(folder, folder), tmp_path / "saved"
    learner.policy.save(saved, learner.policy.state_dict())
    onto_start = PeftModel.from_pretrained(load_plain(folder), str(saved / ADAPTER)).eval()
    groups = pair_groups(PAIRS)
    with torch.no_grad():
        expected = learner.policy.scorer(groups)[1].logp
        assert (expected - logps(load_plain(folder), groups)).abs().min() > 1e-3
        for same in (load_plain(saved), onto_start):
            torch.testing.assert_close(logps(same, groups), expected, atol=1e-5, rtol=1e-6)  # type: ignore[arg-type]
    assert load_tokenizer(saved).eos_token == "<eos>"


def test_training_goes_on_from_a_saved_version(folder: Path, tmp_path: Path) -> None:
    learner, saved = train(folder, folder), tmp_path / "saved"
    learner.policy.save(saved, learner.policy.state_dict())
    later = train(saved, folder, steps=0)
    ours, theirs = adapter_weights(later.model), adapter_weights(learner.model)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    later.load_state_dict(learner.state_dict())
    assert later.train_step(PAIRS) == learner.train_step(PAIRS)
