"""Single completions: praised above the threshold, blamed below it."""

from pathlib import Path

import pytest
from scored import config, pairs_of, scored

from dpo_ray.buffer import PreferenceBuffer
from dpo_ray.config import IterativeDPOConfig
from dpo_ray.pairing import make_pairs
from dpo_ray.types import Pair

FOUR = [scored("a", 4.0, cost=2), scored("b", 1.0, version=2), scored("c", 3.0), scored("d", 2.0)]


def sides(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(str(pair.chosen), str(pair.rejected)) for pair in pairs]


def test_without_a_threshold_the_prompts_mean_divides() -> None:
    """2.5; the other prompt's is 11."""
    other = [scored("e", 10, prompt="P"), scored("f", 12, prompt="P")]
    assert sides(pairs_of([*FOUR, *other], config("unpaired"))) == [
        *(("a", ""), ("", "b"), ("c", ""), ("", "d")),
        *(("", "e"), ("f", "")),
    ]


@pytest.mark.parametrize(("margin", "ties"), [(0.0, 1), (1.0, 3), (0.9, 1)])
def test_a_reward_within_the_margin_of_the_threshold_says_nothing(margin: float, ties: int) -> None:
    made = make_pairs(FOUR, config("unpaired", threshold=3.0, min_margin=margin), round_=0, seed=0)
    assert sides(made.pairs)[-1] == ("", "b") if ties == 3 else ("", "d")
    assert made.counts.tie == ties
    assert len(made.pairs) == 4 - ties


def test_a_row_has_all_that_is_known_of_its_one_completion() -> None:
    praised, blamed, *_ = pairs_of(FOUR, config("unpaired"), round_=7)
    assert praised == Pair(
        *("Q", "a", "", (81,), (97,), ()),
        chosen_reward=4.0,
        chosen_logp=-1,
        policy_version=3,
        round=7,
        judge="taste",
        cost=2.0,
    )
    assert blamed == Pair(
        *("Q", "", "b", (81,), (), (98,)),
        rejected_reward=1.0,
        rejected_logp=-1,
        policy_version=2,
        round=7,
        judge="taste",
    )
    assert praised.is_unpaired and blamed.is_unpaired


def test_the_buffer_keeps_them(buffer: PreferenceBuffer) -> None:
    pairs = pairs_of(FOUR, config("unpaired"))
    assert (buffer.put(pairs).added, buffer.put(pairs).known) == (4, 4)


def test_a_degenerate_completion_may_be_blamed_and_not_praised() -> None:
    candidates = [scored("good", 2), scored("cut", 4, end="length"), scored("off", 1, end="length")]
    made = make_pairs(candidates, config("unpaired", threshold=3, degenerate="reject_only"), round_=0, seed=0)
    assert sides(made.pairs) == [("", "good"), ("", "off")]
    assert made.counts.degenerate_chosen == 1


@pytest.mark.parametrize(("loss", "refused"), [("kto", False), ("bco", False), ("sigmoid", True)])
def test_only_losses_of_single_completions_take_them(tmp_path: Path, loss: str, refused: bool) -> None:
    settings = {"pairing": {"rule": "unpaired"}, "training": {"loss": {"type": loss}}}
    if not refused:
        assert IterativeDPOConfig(run_dir=str(tmp_path), **settings).pairing.rule == "unpaired"  # type: ignore[arg-type]
        return
    with pytest.raises(ValueError, match=r"the loss sigmoid compares two: set training.loss.type to kto"):
        IterativeDPOConfig(run_dir=str(tmp_path), **settings)  # type: ignore[arg-type]
