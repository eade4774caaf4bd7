"""A reward model learns film reviews in seconds, and judges as it was trained."""

import json
import math
from pathlib import Path

import pytest
import torch
from judged import answers, judgements, rewards

from dpo_ray.config import JudgeConfig, RewardModelConfig
from dpo_ray.film_reviews import generate_pairs
from dpo_ray.judges import check_judges, make_judge
from dpo_ray.judges.budget import Spending
from dpo_ray.judges.reward_model import load_reward_model, score_rows
from dpo_ray.judges.reward_training import bradley_terry_loss, make_example
from dpo_ray.models import load_tokenizer
from dpo_ray.terminal import Terminal
from dpo_ray.types import Judgement, Pair
from jobs.reward_model import train


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A trained model's folder, and the accuracy that its training found on held-out pairs."""
    folder = tmp_path_factory.mktemp("reward_model")
    config = RewardModelConfig(
        run_dir=str(folder),
        model=str(tiny_model),
        pairs="film_reviews",
        learning_rate=3e-3,
        max_length=64,
        batch_size=64,
        epochs=2,
    )
    return folder, train(config, Terminal())


def judge(
    folder: Path, texts: tuple[str, ...], prompt: str = "the film", **settings: object
) -> list[Judgement]:
    config = JudgeConfig.model_validate({"kind": "reward_model", "model": str(folder), **settings})
    return judgements(make_judge(config, Spending(config.budget))(answers(*texts, prompt=prompt)))


def test_held_out_pairs_are_told_apart(trained: tuple[Path, float]) -> None:
    folder, accuracy = trained
    assert accuracy >= 0.9
    assert json.loads((folder / "training.json").read_text())["held_out_accuracy"] == accuracy


def test_the_judge_prefers_what_people_would_in_pairs_that_it_never_saw(trained: tuple[Path, float]) -> None:
    judges = JudgeConfig(kind="reward_model", model=str(trained[0]))
    pairs = generate_pairs(200, seed=9)
    completions = [each for pair in pairs for each in answers(pair.chosen, pair.rejected, prompt=pair.prompt)]
    said = judgements(make_judge(judges, Spending(judges.budget))(completions))
    gaps = [(one.reward or 0) - (two.reward or 0) for one, two in zip(said[::2], said[1::2], strict=True)]
    assert sum(gap > 0 for gap in gaps) >= 0.9 * len(pairs)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_rewards_do_not_depend_on_the_batch(trained: tuple[Path, float], batch_size: int) -> None:
    texts = ("is superb .", "was dull and the plot is weak .", "is", "felt great but the jokes are awful .")
    alone = [judge(trained[0], (text,))[0].reward for text in texts]
    assert rewards(judge(trained[0], texts, batch_size=batch_size)) == pytest.approx(alone, abs=1e-4)


def test_of_a_longer_text_the_end_is_read_and_that_is_counted(trained: tuple[Path, float]) -> None:
    long, short = judge(trained[0], ("is so very great .", "."), max_length=4)
    assert (long.metrics["truncated"], short.metrics["truncated"]) == (1.0, 0.0)
    model, tokenizer = load_reward_model(trained[0])
    model.eval()
    ids = list(tokenizer("the film is so very great .").input_ids)[-4:]
    assert long.reward == pytest.approx(score_rows(model, [ids], batch_size=1)[0], abs=1e-5)


def test_a_language_model_is_refused_as_a_judge(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="is Qwen3ForCausalLM, and no sequence classifier: train one"):
        check_judges(JudgeConfig(kind="reward_model", model=str(tiny_model)))


def test_the_loss_of_equal_rewards_is_log_two_and_a_margin_asks_for_more() -> None:
    zero, two = torch.tensor([0.0]), torch.tensor([2.0])
    assert bradley_terry_loss(zero, zero, zero).item() == pytest.approx(math.log(2))
    assert bradley_terry_loss(two, zero, two).item() == pytest.approx(math.log(2))
    assert bradley_terry_loss(two, zero, zero).item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_the_margin_is_a_multiple_of_the_difference_of_the_pairs_rewards(tiny_model: Path) -> None:
    pair = Pair(
        "the film", "is great .", "is dull .", (1,), (2,), (3,), chosen_reward=4.0, rejected_reward=1.0
    )
    tokenizer = load_tokenizer(tiny_model)
    assert make_example(pair, tokenizer, margin=0.5).margin == 1.5
    assert make_example(pair, tokenizer, margin=0.0).margin == 0.0


def test_too_few_pairs_to_hold_some_out_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = RewardModelConfig(
        run_dir=str(tmp_path), model=str(tiny_model), pairs="film_reviews", held_out_pairs=9999
    )
    with pytest.raises(ValueError, match="2048 pairs are too few to hold 9999 out"):
        train(config, Terminal())
