"""At the first step policy and reference are the same: the loss is ln 2, and no reward is above another."""

import math
from pathlib import Path
from typing import Any

import pytest
from families import make_model
from learners import make_learner
from textbook import load_plain, make_pairs

from dpo_ray.metrics import StepMetrics
from dpo_ray.models import load_tokenizer
from dpo_ray.rounds import RoundPlan, train_round

ZERO = (
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "chosen_log_ratio",
)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "many passes": {"tokens_per_pass": 30},
    "bfloat16": {"precision": "bfloat16"},
    "LoRA": {"lora": {"rank": 4}},
    "LoRA in bfloat16": {"lora": {"rank": 4}, "precision": "bfloat16"},
    "checkpointing": {"activation_checkpointing": True},
    "padded": {"packing": False},
    "padded in bfloat16": {"packing": False, "precision": "bfloat16"},
    "round_start": {"reference": {"kind": "round_start"}},
    "ema": {"reference": {"kind": "ema"}},
    "ema in bfloat16": {"reference": {"kind": "ema"}, "precision": "bfloat16"},
    "no cache": {"reference": {"keep_logps": False}},
    "max_kl": {"early_stopping": {"eval_every_steps": 1, "max_kl": 100}},
}


def assert_at_the_start(metrics: StepMetrics) -> None:
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert {name: metrics[name] for name in ZERO} == dict.fromkeys(ZERO, 0.0)
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("way", WAYS)
def test_the_first_step_costs_log_two(tiny_model: Path, way: str, seed: int) -> None:
    learner = make_learner(tiny_model, **WAYS[way])
    assert_at_the_start(learner.train_step(make_pairs(9, seed=seed)))


@pytest.mark.parametrize("way", WAYS)
def test_so_it_is_in_a_round_and_not_afterwards(tiny_model: Path, way: str) -> None:
    learner = make_learner(tiny_model, **WAYS[way], batch_size=4, learning_rate=1e-3)
    plan = RoundPlan(make_pairs(10), seed=0, held_out=make_pairs(3, seed=1))
    first, *later = train_round(learner, plan, on_step=lambda metrics, num_steps: None).history
    assert_at_the_start(first)
    assert 0.0 not in [metrics["rewards/margins"] for metrics in later]


def test_so_it_is_where_another_run_has_left_log_probs_of_the_same_pairs(tiny_model: Path) -> None:
    """It computed them with other neighbours, so that their rounding is another one."""
    for seed in range(3):
        learner = make_learner(tiny_model, precision="bfloat16", batch_size=5, tokens_per_pass=60)
        plan = RoundPlan(make_pairs(15), seed=seed)
        assert_at_the_start(train_round(learner, plan, on_step=lambda metrics, num_steps: None).history[0])


@pytest.mark.parametrize("kind", ["start", "round_start", "ema"])
def test_a_second_round_starts_from_log_two_where_the_reference_is_its_start(
    tiny_model: Path, kind: str
) -> None:
    learner = make_learner(tiny_model, reference={"kind": kind}, learning_rate=1e-3, tokens_per_pass=40)
    for number in range(2):
        plan = RoundPlan(make_pairs(6, seed=number), seed=0, round=number, rounds=2)
        (metrics,) = train_round(learner, plan, on_step=lambda metrics, num_steps: None).history
        if number == 0 or kind == "round_start":
            assert_at_the_start(metrics)
        else:
            assert metrics["rewards/margins"] != 0.0


@pytest.mark.parametrize("family", ["Gemma2", "GPT2", "Bloom"])
def test_so_it_is_in_families_with_windows_absolute_positions_and_padded_rows(
    tiny_model: Path, tmp_path: Path, family: str
) -> None:
    model = make_model(family)
    model.resize_token_embeddings(len(load_tokenizer(tiny_model)))
    model.save_pretrained(tmp_path)
    load_tokenizer(tiny_model).save_pretrained(tmp_path)
    assert load_plain(tmp_path).config.vocab_size >= 80
    for settings in (WAYS["plain"], WAYS["LoRA"], WAYS["bfloat16"]):
        assert_at_the_start(make_learner(tmp_path, **settings).train_step(make_pairs(5)))
