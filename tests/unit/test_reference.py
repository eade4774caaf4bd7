"""Each kind of reference says what its weights say, at the time that they are its weights."""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import make_learner, weights_of
from textbook import load_plain, log_probs, logps, make_pairs, pair_logps
from transformers import PreTrainedModel, Qwen3ForCausalLM

from dpo_ray.batching import PromptGroup
from dpo_ray.learner import Learner
from dpo_ray.types import Pair

PAIRS, LATER = make_pairs(5), make_pairs(4, seed=1)


def plain(folder: Path, learner: Learner) -> PreTrainedModel:
    """The learner's policy, as it is now."""
    model = load_plain(folder)
    model.load_state_dict(weights_of(learner))
    return model


@torch.no_grad()
def assert_known(learner: Learner, pairs: Sequence[Pair], model: PreTrainedModel) -> None:
    """The reference's log-probs are those of a model."""
    chosen, rejected = pair_logps(model, pairs)
    known = torch.tensor(learner.reference.logps(pairs), dtype=torch.float64)
    torch.testing.assert_close(known, torch.stack([chosen, rejected], dim=1), atol=1e-5, rtol=1e-6)


def test_the_start_stays_what_it_was(tiny_model: Path, near_model: Path) -> None:
    learner = make_learner(near_model, tiny_model, learning_rate=1e-2)
    learner.reference.begin_round([PAIRS])
    for _ in range(2):
        assert_known(learner, PAIRS, load_plain(tiny_model))
        learner.train_step(PAIRS)
    assert_known(learner, [*LATER, *PAIRS], load_plain(tiny_model))


def test_round_start_is_what_each_round_began_with(tiny_model: Path, near_model: Path) -> None:
    learner = make_learner(
        near_model, tiny_model, learning_rate=1e-2, **{"reference": {"kind": "round_start"}}
    )
    for batch in (PAIRS, LATER):
        began = plain(tiny_model, learner)
        learner.reference.begin_round([batch])
        learner.train_step(batch)
        assert_known(learner, batch, began)


def test_ema_follows_the_policy_every_few_steps(tiny_model: Path) -> None:
    """reference = 0.75 policy + 0.25 reference after steps 2 and 4."""
    ema = {"kind": "ema", "ema_alpha": 0.75, "ema_every_steps": 2}
    learner = make_learner(tiny_model, learning_rate=1e-2, reference=ema)
    expected = load_plain(tiny_model)
    learner.reference.begin_round([PAIRS])
    for step in range(1, 5):
        assert_known(learner, PAIRS, expected)
        learner.train_step(PAIRS)
        if step % 2 == 0:
            ours = plain(tiny_model, learner)
            with torch.no_grad():
                for theirs, mine in zip(expected.parameters(), ours.parameters(), strict=True):
                    theirs.copy_(0.75 * mine + 0.25 * theirs)
    assert_known(learner, LATER, expected)


@torch.no_grad()
def kl_of_chosen(policy: PreTrainedModel, reference: PreTrainedModel, pairs: Sequence[Pair]) -> float:
    """Mean nats per chosen completion of KL(policy || reference), at each of its tokens."""
    groups = [PromptGroup(pair.prompt_ids, (pair.chosen_ids,)) for pair in pairs if pair.chosen_ids]
    both = zip(log_probs(policy, groups), log_probs(reference, groups), strict=True)
    return torch.stack([(ours.exp() * (ours - theirs)).sum() for ours, theirs in both]).mean().item()


BOUNDED = {"early_stopping": {"eval_every_steps": 1, "max_kl": 1e9}, "learning_rate": 1e-2}


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
@pytest.mark.parametrize("way", [{}, {"packing": False}, {"lora": {"rank": 4}}], ids=str)
def test_the_kl_to_the_start_is_exact_at_every_token(
    tiny_model: Path, loss: str, way: dict[str, Any], tmp_path: Path
) -> None:
    learner = make_learner(tiny_model, **BOUNDED, **way, loss={"type": loss})
    learner.reference.begin_round([PAIRS, LATER])
    assert learner.evaluate(LATER)["kl/reference"] == pytest.approx(0, abs=1e-6)
    learner.train_step(PAIRS)
    learner.train_step(PAIRS)
    learner.policy.save(tmp_path, learner.policy.state_dict())
    expected = kl_of_chosen(load_plain(tmp_path), load_plain(tiny_model), LATER)
    assert expected > 0.01
    assert learner.evaluate(LATER)["kl/reference"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("lora", [{}, {"rank": 4}], ids=str)
@pytest.mark.parametrize("loss", ["sigmoid", "tdpo2"])
def test_the_kl_to_a_rounds_start_begins_at_0_in_each(
    tiny_model: Path, loss: str, lora: dict[str, int], tmp_path: Path
) -> None:
    settings = {**BOUNDED, "lora": lora, "loss": {"type": loss}}
    learner = make_learner(tiny_model, **{"reference": {"kind": "round_start"}}, **settings)
    for number in range(2):
        learner.reference.begin_round([PAIRS, LATER])
        assert learner.evaluate(LATER)["kl/reference"] == pytest.approx(0, abs=1e-5)
        began, ended = tmp_path / f"{number} began", tmp_path / f"{number} ended"
        learner.policy.save(began, learner.policy.state_dict())
        learner.train_step(PAIRS)
        learner.train_step(PAIRS)
        learner.policy.save(ended, learner.policy.state_dict())
        expected = kl_of_chosen(load_plain(ended), load_plain(began), LATER)
        assert learner.evaluate(LATER)["kl/reference"] == pytest.approx(expected, rel=1e-3)


def test_thumbs_down_alone_have_no_kl(tiny_model: Path) -> None:
    learner = make_learner(tiny_model, **BOUNDED, loss={"type": "kto"})
    down = [replace(pair, chosen_ids=()) for pair in LATER]
    assert "kl/reference" not in learner.evaluate(down)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet[Qwen3ForCausalLM]:
    """Those that are in memory, of all that are made from now on."""
    alive: weakref.WeakSet[Qwen3ForCausalLM] = weakref.WeakSet()
    make = Qwen3ForCausalLM.__init__

    def made(self: Qwen3ForCausalLM, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        alive.add(self)

    monkeypatch.setattr(Qwen3ForCausalLM, "__init__", made)
    return alive


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({}, 1),
        ({"reference": {"kind": "round_start"}}, 1),
        ({"lora": {"rank": 2}}, 1),
        ({"lora": {"rank": 2}, "loss": {"type": "tdpo1"}}, 1),
        ({"loss": {"type": "simpo"}}, 1),
        ({"reference": {"kind": "ema"}}, 2),
        ({"loss": {"type": "tdpo1"}}, 2),
    ],
    ids=str,
)
def test_a_reference_is_in_memory_only_where_its_weights_are_needed_in_each_step(
    tiny_model: Path, models: weakref.WeakSet[Qwen3ForCausalLM], settings: dict[str, Any], number: int
) -> None:
    learner = make_learner(tiny_model, **settings)
    learner.train_step(PAIRS)
    learner.evaluate(LATER)  # The start is loaded once more for these.
    assert len(models) == number
    assert learner.step == 1


def test_a_loss_without_reference_has_none(tiny_model: Path) -> None:
    learner = make_learner(tiny_model, loss={"type": "simpo"})
    assert not learner.reference.is_needed
    assert learner.reference.logps(PAIRS) == [(0.0, 0.0)] * 5
    stopping = {"eval_every_steps": 1, "max_chosen_drop": 1.0}
    bounded = make_learner(tiny_model, loss={"type": "simpo"}, early_stopping=stopping)
    assert bounded.reference.is_needed
    assert_known(bounded, PAIRS, load_plain(tiny_model))


@torch.no_grad()
def assert_mismatched(learner: Learner, pairs: Sequence[Pair], start: Path) -> None:
    """Each prompt has the completion of the next pair of its batch, the last that of the first."""
    groups, known = learner.reference.mismatched(pairs)
    others = [pair.chosen_ids or pair.rejected_ids for pair in (*pairs[1:], pairs[0])]
    assert groups == [(pair.prompt_ids, (ids,)) for pair, ids in zip(pairs, others, strict=True)]
    torch.testing.assert_close(known, logps(load_plain(start), groups), atol=1e-5, rtol=1e-6)


def test_mismatched_completions_are_other_pairs_of_the_batch(tiny_model: Path) -> None:
    batch = [*PAIRS[:3], replace(PAIRS[3], chosen_ids=()), replace(PAIRS[4], rejected_ids=())]
    learner = make_learner(tiny_model, loss={"type": "kto"})
    learner.reference.begin_round([batch, LATER])
    assert_mismatched(learner, batch, tiny_model)
    assert_mismatched(learner, LATER, tiny_model)


def test_a_new_pair_among_known_ones_is_not_mismatched_with_itself(tiny_model: Path) -> None:
    learner = make_learner(tiny_model, loss={"type": "kto"})
    learner.reference.begin_round([PAIRS])
    held_out = [*PAIRS[:2], LATER[0], PAIRS[2]]
    learner.evaluate(held_out)
    assert_mismatched(learner, held_out, tiny_model)


def test_a_process_that_takes_over_mismatches_as_the_one_that_went_on(tiny_model: Path) -> None:
    first = make_learner(tiny_model, loss={"type": "kto"})
    first.reference.begin_round([PAIRS])
    second = make_learner(tiny_model, loss={"type": "kto"})
    second.load_state_dict(first.state_dict())
    mixed = [PAIRS[2], LATER[0], PAIRS[0], LATER[1]]
    for learner in (first, second):
        learner.reference.begin_round([mixed])
        assert_mismatched(learner, mixed, tiny_model)
