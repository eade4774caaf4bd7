"""What became of votes: of one person, of all, of a version on trial; and what outlives whom."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from voting import AT_ONCE, about, answer, ballot, served, vote

from dpo_ray.buffer import (
    PreferenceBuffer,
    TrialVotes,
    UnknownError,
)
from dpo_ray.storage import Storage


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


def test_votes_on_a_trial_are_counted_for_who_wrote_what(buffer: PreferenceBuffer) -> None:
    live, candidate, older = answer("is bad", 4), answer("is good", 5), answer("is dull", 3)
    vote(buffer, "ann", "first", **about(1))
    vote(buffer, "bob", "second", **about(2), first=live, second=candidate)
    vote(buffer, "ann", "second", **about(3))
    vote(buffer, "ann", "both_bad", **about(4))
    vote(buffer, "ann", "first", **about(5), second=older)  # Of another trial.
    vote(buffer, "ann", "first", **about(6), first=live)  # Both by one version.
    undone = vote(buffer, "ann", "second", **about(7))
    buffer.undo_vote(undone.vote_id, author="ann")
    buffer.keep_served(
        [served("chatcmpl-1", policy_version=5), served("chatcmpl-2", policy_version=3)], most=9
    )
    for name in ("chatcmpl-1", "chatcmpl-2"):
        buffer.vote_on_completion(ballot(), name, 0, is_good=False)
    assert buffer.trial_votes(5, 4) == TrialVotes(wins=2, losses=1, ties=1, thumbs={"candidate_down": 1})
    assert buffer.trial_votes(9, 4) == TrialVotes()


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
