"""A step is the textbook's; what is not finite stops training and names the pair; the start stays known."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import assert_equal, assert_same_update, make_learner, weights_of
from textbook import Weights, dpo_losses, load_plain, logps, make_pairs, pair_logps, token_logps
from torch.nn.functional import logsigmoid

from dpo_ray.batching import PromptGroup
from dpo_ray.learner import TrainingError
from dpo_ray.models import load_model
from dpo_ray.types import Pair, TokenSequence

STEP: dict[str, Any] = {"loss": {"beta": 0.5}, "learning_rate": 1e-4, "weight_decay": 0.01}
PAIRS = make_pairs(5)


def textbook_steps(
    folder: Path, reference: Path, batches: Sequence[Sequence[Pair]], *, max_grad_norm: float
) -> tuple[Weights, list[float]]:
    """Weights after steps of AdamW on Eq. 7 of arXiv:2305.18290, and the norms of their gradients."""
    policy, start = load_plain(folder), load_plain(reference)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0.01)
    norms = []
    for batch in batches:
        optimizer.zero_grad()
        dpo_losses(policy, start, batch, beta=0.5).mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm).item())
        optimizer.step()
    return {name: value.clone() for name, value in policy.state_dict().items()}, norms


@pytest.mark.parametrize("max_grad_norm", [1e9, 0.5])
@pytest.mark.parametrize("tokens_per_pass", [8192, 25])
def test_steps_are_those_of_the_textbook(
    tiny_model: Path, near_model: Path, max_grad_norm: float, tokens_per_pass: int
) -> None:
    batches = [PAIRS, make_pairs(3, seed=1)]
    expected, expected_norms = textbook_steps(near_model, tiny_model, batches, max_grad_norm=max_grad_norm)
    learner = make_learner(
        near_model, tiny_model, **STEP, max_grad_norm=max_grad_norm, tokens_per_pass=tokens_per_pass
    )
    before = weights_of(learner)
    norms = [learner.train_step(batch)["grad_norm"] for batch in batches]
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert min(norms) > 0.5
    assert_same_update(weights_of(learner), expected, before)


def test_a_steps_metrics_are_of_the_weights_before_it(tiny_model: Path, near_model: Path) -> None:
    policy, reference = load_plain(near_model), load_plain(tiny_model)
    with torch.no_grad():
        chosen, rejected = pair_logps(policy, PAIRS)
        ref_chosen, ref_rejected = pair_logps(reference, PAIRS)
    up, down = 0.5 * (chosen - ref_chosen), 0.5 * (rejected - ref_rejected)
    expected = {
        "loss": -logsigmoid(up - down).mean(),
        "rewards/chosen": up.mean(),
        "rewards/rejected": down.mean(),
        "rewards/accuracies": (up > down).float().mean(),
        "rewards/margins": (up - down).mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
        "chosen_log_ratio": (chosen - ref_chosen).mean(),
    }
    learner = make_learner(near_model, tiny_model, **STEP)
    held_out = learner.evaluate(PAIRS)
    metrics = learner.train_step(PAIRS)
    assert 0 < metrics["rewards/accuracies"] < 1
    assert (metrics.pop("step"), metrics.pop("learning_rate")) == (1, 1e-4)
    del metrics["grad_norm"]
    assert metrics == pytest.approx({name: value.item() for name, value in expected.items()}, abs=1e-5)
    assert held_out == pytest.approx(metrics, abs=1e-6)


def test_the_learning_rate_warms_up_over_the_whole_run(tiny_model: Path) -> None:
    learner = make_learner(tiny_model, learning_rate=1e-5, warmup_steps=3)
    rates = [learner.train_step(make_pairs(2))["learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([0.25e-5, 0.5e-5, 0.75e-5, 1e-5, 1e-5])


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_the_rate_of_the_schedule_is_the_one_that_a_step_is_taken_with(
    tiny_model: Path, near_model: Path, optimizer: str
) -> None:
    def moved(progress: float) -> torch.Tensor:
        learner = make_learner(
            near_model, tiny_model, learning_rate=1e-4, schedule="linear", optimizer=optimizer
        )
        before = weights_of(learner)
        learner.train_step(PAIRS, progress=progress)
        after = weights_of(learner)
        return torch.cat([(after[name] - before[name]).flatten() for name in before])

    whole, quarter = moved(0.0), moved(0.75)
    assert (quarter - whole / 4).norm() < 1e-3 * whole.norm()


def test_evaluation_changes_nothing(tiny_model: Path) -> None:
    learner, other = make_learner(tiny_model, **STEP), make_learner(tiny_model, **STEP)
    learner.evaluate(make_pairs(4, seed=2))
    assert learner.train_step(PAIRS) == other.train_step(PAIRS)
    learner.evaluate(make_pairs(4, seed=3))
    assert_equal(weights_of(learner), weights_of(other))


@pytest.mark.parametrize("lora", [{}, {"rank": 4}])
def test_the_start_is_known_as_long_as_training_goes_on(tiny_model: Path, lora: dict[str, Any]) -> None:
    sequences = [TokenSequence(pair.prompt_ids, pair.chosen_ids) for pair in PAIRS]
    groups = [PromptGroup(*sequence[:1], (sequence[1],)) for sequence in sequences]
    with torch.no_grad():
        expected = logps(load_plain(tiny_model), groups).tolist()
    learner = make_learner(tiny_model, learning_rate=1e-2, lora=lora)
    assert learner.logps(sequences) == learner.start_logps(sequences) == pytest.approx(expected, abs=1e-5)
    learner.train_step(PAIRS)
    assert learner.start_logps(sequences) == pytest.approx(expected, abs=1e-5)
    assert learner.logps(sequences) != pytest.approx(expected, abs=0.1)
    # Pairs that come later are compared with the start, too.
    later = make_pairs(3, seed=1)
    with torch.no_grad():
        ours, theirs = pair_logps_of(learner, later), pair_logps(load_plain(tiny_model), later)
    margins = 0.1 * ((ours[0] - theirs[0]) - (ours[1] - theirs[1]))
    assert learner.evaluate(later)["rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-5)


def pair_logps_of(learner: Any, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] and [B] under the learner's policy."""
    chosen = learner.logps([TokenSequence(pair.prompt_ids, pair.chosen_ids) for pair in pairs])
    rejected = learner.logps([TokenSequence(pair.prompt_ids, pair.rejected_ids) for pair in pairs])
    return torch.tensor(chosen), torch.tensor(rejected)


def test_weights_that_are_put_back_are_not_the_starts(tiny_model: Path) -> None:
    sequences = [TokenSequence(pair.prompt_ids, pair.chosen_ids) for pair in PAIRS]
    trained = make_learner(tiny_model, learning_rate=1e-2)
    expected = trained.start_logps(sequences)
    trained.train_step(PAIRS)
    resumed = make_learner(tiny_model, learning_rate=1e-2)
    resumed.load_weights(trained.weights())
    assert resumed.logps(sequences) == trained.logps(sequences)
    assert resumed.start_logps(sequences) == expected


def test_canaries_are_what_the_policy_says(tiny_model: Path) -> None:
    learner = make_learner(tiny_model, learning_rate=1e-2)
    learner.train_step(PAIRS)
    policy = load_plain(tiny_model)
    policy.load_state_dict(weights_of(learner))
    (canary,) = learner.canaries([(5, 6, 7, 8)])
    with torch.no_grad():
        (expected,) = token_logps(policy, [PromptGroup((5,), ((6, 7, 8),))])
    assert canary.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def with_weight(pairs: Sequence[Pair], index: int, weight: float) -> list[Pair]:
    return [replace(pair, weight=weight) if n == index else pair for n, pair in enumerate(pairs)]


LOSSES = pytest.mark.parametrize("loss", ["sigmoid", "tdpo2", "kto", "bco", "aot", "aot_unpaired"])


# In float32 the first weight's gradient is infinite; of the second, only the gradient's norm is.
@pytest.mark.parametrize("weight", [1e39, 1e30])
@LOSSES
def test_a_pair_that_is_not_finite_stops_training_and_is_named(
    tiny_model: Path, near_model: Path, loss: str, weight: float
) -> None:
    learner = make_learner(near_model, tiny_model, loss={"type": loss}, learning_rate=1e-2)
    other = make_learner(near_model, tiny_model, loss={"type": loss}, learning_rate=1e-2)
    before, bad = weights_of(learner), with_weight(PAIRS, 2, weight)
    named = f"gradient norm (inf|nan) at step 1, from the pairs {bad[2].pair_id}: lower learning_rate"
    with pytest.raises(TrainingError, match=named):
        learner.train_step(bad)
    assert_equal(weights_of(learner), before)
    assert learner.step == 0
    # Nothing of it is left.
    assert learner.train_step(PAIRS) == other.train_step(PAIRS)
    assert_equal(weights_of(learner), weights_of(other))


@LOSSES
def test_a_reference_that_is_not_finite_is_named_by_its_pair(
    tiny_model: Path, near_model: Path, loss: str
) -> None:
    learner = make_learner(near_model, tiny_model, loss={"type": loss})
    learner.evaluate(PAIRS)
    state = learner.state_dict()
    state["reference"]["logps"][PAIRS[3].pair_id] = (math.nan, -1.0)
    learner.load_state_dict(state)
    with pytest.raises(TrainingError, match=rf"from the pairs {PAIRS[3].pair_id}: "):
        learner.train_step(PAIRS)


def test_where_no_pair_alone_is_to_blame_all_are_named(tiny_model: Path) -> None:
    learner = make_learner(tiny_model)
    with torch.no_grad():
        learner.policy.trained[0].fill_(math.nan)
    with pytest.raises(TrainingError, match=", ".join(pair.pair_id for pair in PAIRS)):
        learner.train_step(PAIRS)


def test_a_policy_trains_the_model_that_it_was_given(tiny_model: Path) -> None:
    learner = make_learner(tiny_model)
    assert_equal(weights_of(learner), load_model(tiny_model).state_dict())
    assert learner.tokenizer.eos_token == "<eos>"
