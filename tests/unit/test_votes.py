"""A vote is kept once, can be undone while it waits, and becomes a pair of what was shown."""

import time
from dataclasses import replace

import pytest
from voting import AT_ONCE, ballot, pairs, served, shown, vote

from dpo_ray.buffer import (
    ConflictError,
    ForeignError,
    PreferenceBuffer,
    Released,
    UnknownError,
)
from dpo_ray.config import VotesConfig
from dpo_ray.storage import Storage
from dpo_ray.types import Pair


def test_a_released_vote_is_a_pair_with_all_that_was_shown(
    buffer: PreferenceBuffer, storage: Storage
) -> None:
    receipt = vote(buffer, "ann", "second")
    assert (receipt.state, receipt.versions, receipt.is_new) == (
        "quarantined",
        {"first": 5, "second": 4},
        True,
    )
    assert buffer.release(3, AT_ONCE) == Released(released=1, refused=0, waiting=0)
    assert pairs(buffer, storage, 3) == [
        Pair(
            prompt="the film",
            chosen="is bad",
            rejected="is good",
            prompt_ids=(7, 8),
            chosen_ids=tuple(b"is bad"),
            rejected_ids=tuple(b"is good"),
            chosen_logp=-6.0,
            rejected_logp=-7.0,
            policy_version=4,
            round=3,
            source="human",
            author="ann",
        )
    ]


def test_after_messages_the_answers_are_messages(buffer: PreferenceBuffer, storage: Storage) -> None:
    vote(buffer, "ann", prompt=[{"role": "user", "content": "the film"}])
    buffer.release(0, AT_ONCE)
    (pair,) = pairs(buffer, storage, 0)
    assert pair.chosen == [{"role": "assistant", "content": "is good"}]


def test_a_round_takes_votes_once_and_the_next_round_the_later_ones(
    buffer: PreferenceBuffer, storage: Storage
) -> None:
    vote(buffer, "ann")
    first = buffer.release(0, AT_ONCE)
    vote(buffer, "bob")
    assert buffer.release(0, AT_ONCE) == first
    assert {pair.author for pair in pairs(buffer, storage, 0)} == {"ann"}
    assert buffer.release(1, AT_ONCE).released == 1
    assert {(pair.author, pair.round) for pair in pairs(buffer, storage, 1)} == {("ann", 0), ("bob", 1)}
    assert buffer.tally().rounds == {0: 1, 1: 1}


def test_the_same_vote_again_is_the_same_vote_and_another_choice_is_refused(buffer: PreferenceBuffer) -> None:
    first = vote(buffer, "ann")
    assert vote(buffer, "ann") == replace(first, is_new=False)
    with pytest.raises(ConflictError, match=f"you voted first on this before: undo vote {first.vote_id}"):
        vote(buffer, "ann", "second")
    assert buffer.tally("ann").waiting == 1


def test_a_key_stands_for_one_body(buffer: PreferenceBuffer) -> None:
    once = vote(buffer, "ann", idempotency_key="k", body_sha256="a")
    again = vote(buffer, "ann", idempotency_key="k", body_sha256="a", name="cmp-2")
    assert again == replace(once, is_new=False)
    with pytest.raises(ConflictError, match="Idempotency-Key came with another body"):
        vote(buffer, "ann", idempotency_key="k", body_sha256="b", name="cmp-2")
    assert vote(buffer, "bob", idempotency_key="k", body_sha256="b").is_new  # Keys are a person's own.


def test_an_undone_vote_is_no_pair_and_its_comparison_is_open_again(
    buffer: PreferenceBuffer, storage: Storage
) -> None:
    receipt = vote(buffer, "ann")
    assert buffer.undo_vote(receipt.vote_id, author="ann").state == "withdrawn"
    assert buffer.undo_vote(receipt.vote_id, author="ann").state == "withdrawn"
    assert buffer.release(0, AT_ONCE) == Released(0, 0, 0)
    assert vote(buffer, "ann", "second").is_new
    buffer.release(1, AT_ONCE)
    assert [pair.chosen for pair in pairs(buffer, storage, 1)] == ["is bad"]


def test_who_may_not_undo_hears_why(buffer: PreferenceBuffer) -> None:
    receipt = vote(buffer, "ann")
    with pytest.raises(ForeignError):
        buffer.undo_vote(receipt.vote_id, author="bob")
    with pytest.raises(UnknownError):
        buffer.undo_vote("vote-0", author="ann")
    buffer.release(2, AT_ONCE)
    with pytest.raises(ConflictError, match="was released in round 2"):
        buffer.undo_vote(receipt.vote_id, author="ann")


def test_a_comparison_is_its_owners_and_goes_when_it_has_expired(buffer: PreferenceBuffer) -> None:
    buffer.keep_comparison(shown("cmp-1", "ann"))
    with pytest.raises(ForeignError):
        buffer.vote_on_comparison(ballot("bob"), "cmp-1", "first")
    buffer.keep_comparison(shown("cmp-old", "ann", expires_at=time.time() - 1))
    buffer.keep_comparison(shown("cmp-2", "ann"))
    with pytest.raises(UnknownError):
        buffer.vote_on_comparison(ballot("ann"), "cmp-old", "first")


def test_a_thumb_is_an_unpaired_pair_where_the_loss_takes_one(
    buffer: PreferenceBuffer, storage: Storage
) -> None:
    buffer.keep_served([served(), served(index=1, text="is bad", token_ids=(3,), logp=-2.0)], most=10)
    up = buffer.vote_on_completion(ballot(), "chatcmpl-1", 0, is_good=True)
    buffer.vote_on_completion(ballot(), "chatcmpl-1", 1, is_good=False)
    assert (up.kind, up.choice, up.versions) == ("thumb", "up", {"completion": 6})
    assert buffer.release(0, AT_ONCE) == Released(released=0, refused=0, waiting=2)
    assert buffer.release(1, VotesConfig(min_wait_s=0, take_unpaired=True)).released == 2
    by_side = {(pair.chosen_ids, pair.rejected_ids, pair.rejected_logp) for pair in pairs(buffer, storage, 1)}
    assert by_side == {((1, 2), (), None), ((), (3,), -2.0)}


def test_only_the_latest_completions_are_kept_and_only_their_owners_may_vote(
    buffer: PreferenceBuffer,
) -> None:
    buffer.keep_served([served(f"cmpl-{number}") for number in range(4)], most=2)
    buffer.keep_served([served("cmpl-4", "bob"), served("cmpl-5", "bob")], most=3)
    with pytest.raises(UnknownError):
        buffer.vote_on_completion(ballot(), "cmpl-2", 0, is_good=True)
    assert buffer.vote_on_completion(ballot(), "cmpl-3", 0, is_good=True).is_new
    with pytest.raises(ForeignError):
        buffer.vote_on_completion(ballot(), "cmpl-5", 0, is_good=True)


def test_an_id_that_two_people_chose_stands_for_what_each_got(buffer: PreferenceBuffer) -> None:
    buffer.keep_served(
        [served("cmpl-x", policy_version=1), served("cmpl-x", "bob", policy_version=2)], most=9
    )
    for name, version in (("ann", 1), ("bob", 2)):
        receipt = buffer.vote_on_completion(ballot(name), "cmpl-x", 0, is_good=True)
        assert receipt.versions == {"completion": version}
