"""A vote is kept once, can be undone while it waits, and becomes a pair by rules that say why not."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from dpo_ray.buffer import (
    Ballot,
    ConflictError,
    ForeignError,
    PreferenceBuffer,
    Released,
    ServedCompletion,
    ShownAnswer,
    ShownPair,
    SnapshotQuery,
    UnknownError,
    VoteReceipt,
    read_snapshot,
)
from dpo_ray.buffer.opinions import Choice
from dpo_ray.config import VotesConfig
from dpo_ray.storage import Storage
from dpo_ray.types import Pair

AT_ONCE = VotesConfig(min_wait_s=0)


def answer(text: str, version: int = 4) -> ShownAnswer:
    ids = tuple(text.encode())
    return ShownAnswer(text, ids, logp=-float(len(ids)), policy_version=version, finish_reason="stop")


def shown(name: str = "cmp-1", author: str = "ann", **fields: Any) -> ShownPair:
    start = ShownPair(
        comparison_id=name,
        author=author,
        prompt="the film",
        prompt_ids=(7, 8),
        first=answer("is good", 5),
        second=answer("is bad", 4),
        expires_at=time.time() + 60,
    )
    return replace(start, **fields)


def ballot(author: str = "ann", **fields: Any) -> Ballot:
    start = Ballot(author=author, trust=1.0, at=time.time() - 1, body_sha256="0")
    return replace(start, **fields)


def vote(buffer: PreferenceBuffer, author: str, choice: Choice = "first", **fields: Any) -> VoteReceipt:
    """On the same two texts, unless the fields of the comparison say otherwise."""
    by = {
        name: fields.pop(name) for name in ("trust", "at", "idempotency_key", "body_sha256") if name in fields
    }
    name = fields.pop("name", f"cmp-{author}")
    buffer.keep_comparison(shown(name, author, **fields))
    return buffer.vote_on_comparison(ballot(author, **by), name, choice)


def about(number: int) -> dict[str, Any]:
    """A comparison of texts of their own."""
    return {"name": f"cmp-{number}", "prompt": f"prompt {number}", "prompt_ids": (7, number)}


def states(buffer: PreferenceBuffer) -> dict[str, tuple[str, str]]:
    """State of each vote and why, by its author and choice."""
    query = sa.text("select author, choice, state, why from votes order by at, vote_id")
    rows = buffer._open.run(lambda connection: connection.execute(query).all())
    return {f"{row.author} {row.choice}": (row.state, row.why) for row in rows}


def pairs(buffer: PreferenceBuffer, storage: Storage, round_: int) -> list[Pair]:
    query = SnapshotQuery(max_round=round_, min_policy_version=0, limit=10_000, seed=0)
    return read_snapshot(storage, buffer.declare_snapshot(query, live_version=9))


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


def served(completion_id: str = "chatcmpl-1", author: str = "ann", **fields: Any) -> ServedCompletion:
    start = ServedCompletion(
        completion_id=completion_id,
        index=0,
        author=author,
        prompt="the film",
        prompt_ids=(7,),
        text="is good",
        token_ids=(1, 2),
        logp=None,
        policy_version=6,
    )
    return replace(start, **fields)


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


def test_a_tally_is_a_persons_own(buffer: PreferenceBuffer) -> None:
    vote(buffer, "ann", **about(1))
    vote(buffer, "ann", "tie", **about(2))
    buffer.release(0, AT_ONCE)
    undone = vote(buffer, "ann", **about(3))
    buffer.undo_vote(undone.vote_id, author="ann")
    vote(buffer, "bob")
    mine, everybodys = buffer.tally("ann"), buffer.tally()
    assert (mine.waiting, mine.released, mine.refused, mine.rounds) == (0, 1, 1, {0: 1})
    assert (everybodys.waiting, everybodys.released) == (1, 1)


def test_votes_outlive_their_owner_and_a_closed_buffer_opens_again(
    buffer: PreferenceBuffer, buffer_url: str, storage: Storage
) -> None:
    vote(buffer, "ann")
    buffer.close()
    again = PreferenceBuffer(buffer_url, storage)
    assert again.release(0, AT_ONCE).released == 1
    again.close()
    assert buffer.tally().released == 1


def test_who_is_forgotten_leaves_no_vote(buffer: PreferenceBuffer) -> None:
    buffer.keep_served([served()], most=9)
    for name in ("ann", "bob"):
        vote(buffer, name)
    buffer.forget("ann")
    assert [buffer.tally(name).waiting for name in ("ann", "bob")] == [0, 1]
    with pytest.raises(UnknownError):
        buffer.vote_on_comparison(ballot("ann"), "cmp-ann", "first")
    with pytest.raises(UnknownError):
        buffer.vote_on_completion(ballot("ann"), "chatcmpl-1", 0, is_good=True)


def test_others_may_open_the_file_unless_a_job_holds_it(tmp_path: Path, storage: Storage) -> None:
    url = f"sqlite:///{tmp_path}/shared.sqlite?timeout=0"
    served_run = PreferenceBuffer(url, storage, is_held=False)
    with ThreadPoolExecutor(8) as people:
        assert all(
            receipt.is_new for receipt in people.map(lambda n: vote(served_run, "ann", **about(n)), range(40))
        )
    other = PreferenceBuffer(url, storage)
    assert other.tally().waiting == 40
    other.close()
    served_run.hold()
    assert served_run.tally().waiting == 40
    with pytest.raises(ValueError, match="cannot be opened"):
        other.tally()
    served_run.close()
    assert other.tally().waiting == 40


def test_a_prompt_is_drawn_from_the_pairs(buffer: PreferenceBuffer) -> None:
    assert buffer.random_prompt() is None
    for number in range(8):
        vote(buffer, "ann", **about(number))
    buffer.release(0, AT_ONCE)
    drawn = {str(buffer.random_prompt()) for _ in range(200)}
    assert drawn <= {f"prompt {number}" for number in range(8)}
    assert len(drawn) > 2
