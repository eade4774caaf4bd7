"""Which votes become pairs of a round, and why the others do not."""

import time

import pytest
from voting import AT_ONCE, about, answer, ballot, pairs, states, vote

from dpo_ray.buffer import (
    PreferenceBuffer,
    Released,
)
from dpo_ray.buffer.opinions import Choice
from dpo_ray.config import VotesConfig
from dpo_ray.storage import Storage
from dpo_ray.types import Pair


@pytest.mark.parametrize("choice", ["tie", "both_bad"])
def test_who_prefers_neither_makes_no_pair(buffer: PreferenceBuffer, choice: Choice) -> None:
    vote(buffer, "ann", choice)
    assert buffer.release(0, AT_ONCE) == Released(released=0, refused=1, waiting=0)
    assert states(buffer) == {f"ann {choice}": ("refused", f"{choice} prefers neither answer")}


def test_equal_texts_make_no_pair(buffer: PreferenceBuffer) -> None:
    vote(buffer, "ann", second=answer("is good"))
    vote(buffer, "bob", second=answer(""))
    buffer.release(0, AT_ONCE)
    assert states(buffer)["ann first"] == ("refused", "both answers have the same text")
    assert states(buffer)["bob first"] == ("refused", "an answer has no tokens")


def test_a_young_vote_waits(buffer: PreferenceBuffer) -> None:
    vote(buffer, "ann", at=time.time() - 5)
    assert buffer.release(0, VotesConfig(min_wait_s=10)) == Released(released=0, refused=0, waiting=1)
    assert buffer.release(1, VotesConfig(min_wait_s=4)) == Released(released=1, refused=0, waiting=0)


def test_trust_bounds_and_weighs(buffer: PreferenceBuffer, storage: Storage) -> None:
    for name, trust in (("ann", 0.75), ("bob", 0.25), ("eve", 0.0)):
        vote(buffer, name, trust=trust)
    config = VotesConfig(min_wait_s=0, min_trust=0.5, weight_by_trust=True)
    assert buffer.release(0, config) == Released(released=1, refused=2, waiting=0)
    assert [(pair.author, pair.weight) for pair in pairs(buffer, storage, 0)] == [("ann", 0.75)]
    assert states(buffer)["bob first"][1] == "the person's trust 0.25 is below votes.min_trust=0.5"


def test_a_person_without_any_trust_is_refused_whatever_the_bound(buffer: PreferenceBuffer) -> None:
    vote(buffer, "eve", trust=0.0)
    assert buffer.release(0, AT_ONCE).refused == 1


def test_contradicting_votes_of_one_person_cancel(buffer: PreferenceBuffer) -> None:
    vote(buffer, "ann", "first", name="cmp-1")
    vote(buffer, "ann", "second", name="cmp-2")
    assert buffer.release(0, AT_ONCE) == Released(released=0, refused=2, waiting=0)


def test_it_is_the_text_that_counts_and_not_the_side_where_it_stood(buffer: PreferenceBuffer) -> None:
    vote(buffer, "ann", "first", name="cmp-1")
    vote(buffer, "ann", "second", name="cmp-2", first=answer("is bad", 4), second=answer("is good", 5))
    assert buffer.release(0, AT_ONCE) == Released(released=1, refused=1, waiting=0)  # It repeats the first.


def test_a_person_says_the_same_once_over_all_rounds(buffer: PreferenceBuffer) -> None:
    vote(buffer, "ann", name="cmp-1")
    buffer.release(0, AT_ONCE)
    vote(buffer, "ann", name="cmp-2")
    vote(buffer, "ann", "second", name="cmp-3", prompt="another")
    assert buffer.release(1, AT_ONCE) == Released(released=1, refused=1, waiting=0)


def test_a_minority_is_refused_and_half_is_none(buffer: PreferenceBuffer) -> None:
    for name, choice in (("ann", "first"), ("bob", "first"), ("eve", "second")):
        vote(buffer, name, choice)  # type: ignore[arg-type]
    for name, choice in (("cal", "first"), ("dan", "second")):
        vote(buffer, name, choice, **{**about(1), "name": f"cmp-{name}"})  # type: ignore[arg-type]
    assert buffer.release(0, AT_ONCE) == Released(released=4, refused=1, waiting=0)
    assert states(buffer)["eve second"] == (
        "refused",
        "a share of 0.33 of 3 people says so of these texts, which is below votes.min_agreement=0.5",
    )


def test_a_tie_speaks_against_both_and_distrusted_people_against_nobody(buffer: PreferenceBuffer) -> None:
    vote(buffer, "ann", "first")
    vote(buffer, "bob", "tie")
    vote(buffer, "eve", "second", trust=0.1)
    all_must_agree = VotesConfig(min_wait_s=0, min_trust=0.5, min_agreement=0.6)
    buffer.release(0, all_must_agree)
    assert "a share of 0.50 of 2 people" in states(buffer)["ann first"][1]


def test_beyond_a_persons_share_of_a_round_votes_wait_for_the_next(buffer: PreferenceBuffer) -> None:
    for number in range(5):
        vote(buffer, "ann", at=time.time() - 10 + number, **about(number))
    config = VotesConfig(min_wait_s=0, max_per_person_per_round=2)
    assert [buffer.release(round_, config).released for round_ in range(4)] == [2, 2, 1, 0]


def test_records_and_comparisons_of_the_same_texts_are_one_opinion(buffer: PreferenceBuffer) -> None:
    record = Pair(
        prompt="the film",
        chosen="is good",
        rejected="is bad",
        prompt_ids=(7, 8),
        chosen_ids=(1,),
        rejected_ids=(2,),
        source="human",
    )
    assert buffer.vote_on_record(ballot(), record).versions == {}
    vote(buffer, "ann", "second")
    assert buffer.release(0, AT_ONCE).refused == 2
