"""An assignment stays on the desk until somebody finished it."""

import asyncio

import pytest

from dpo_ray import desk
from dpo_ray.desk import Finished, Outcome, ScoreWithStart, TrainerDesk, TrainRound
from dpo_ray.types import TokenSequence

ROUND = TrainRound(round=0, parent=0, candidate=1, seed=0, canaries=((1, 2),))
SCORE = ScoreWithStart((TokenSequence((1,), (2, 3)),))


async def submitted(board: TrainerDesk, assignment: desk.Assignment) -> asyncio.Task[Outcome]:
    task = asyncio.create_task(board.submit(assignment))
    await asyncio.sleep(0)
    return task


def test_a_second_worker_finds_what_the_first_did_not_finish() -> None:
    async def scenario() -> None:
        board = TrainerDesk()
        waiting = await submitted(board, ROUND)
        assert await board.take() == (1, ROUND)
        assert await board.take() == (1, ROUND)  # The first worker died.
        assert not waiting.done()
        await board.finish(1, Outcome(value=7))
        assert await waiting == Outcome(value=7)

    asyncio.run(scenario())


def test_an_idle_desk_answers_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "_POLL_S", 0.01)

    async def scenario() -> None:
        board = TrainerDesk()
        assert await board.take() is None
        waiting = await submitted(board, ROUND)
        await board.take()
        await board.finish(1, Outcome())
        await waiting
        assert await board.take() is None  # What is finished is not handed out again.

    asyncio.run(scenario())


def test_a_waiting_worker_is_woken_by_the_next_assignment() -> None:
    async def scenario() -> None:
        board = TrainerDesk()
        worker = asyncio.create_task(board.take())
        await asyncio.sleep(0)
        assert not worker.done()
        await submitted(board, SCORE)
        assert await asyncio.wait_for(worker, timeout=1) == (1, SCORE)

    asyncio.run(scenario())


def test_each_submission_gets_its_own_outcome() -> None:
    async def scenario() -> None:
        board = TrainerDesk()
        outcomes = [Outcome(value=[1.5]), Outcome(error="no number"), Outcome()]
        assignments = (ROUND, SCORE, Finished())
        for number, (assignment, outcome) in enumerate(zip(assignments, outcomes, strict=True), start=1):
            waiting = await submitted(board, assignment)
            assert await board.take() == (number, assignment)
            await board.finish(number, outcome)
            assert await waiting == outcome

    asyncio.run(scenario())


def test_progress_is_that_of_the_open_assignment() -> None:
    async def scenario() -> None:
        board = TrainerDesk()
        await submitted(board, ROUND)
        assert await board.progress() == (0, 1)
        await board.report(3, 8)
        assert await board.progress() == (3, 8)
        await board.finish(1, Outcome())
        await submitted(board, SCORE)
        assert await board.progress() == (0, 1)

    asyncio.run(scenario())


def test_what_a_replaced_worker_says_late_is_not_heard() -> None:
    async def scenario() -> None:
        board = TrainerDesk()
        first = await submitted(board, ROUND)
        await board.finish(1, Outcome())
        await first
        second = await submitted(board, SCORE)
        await board.finish(1, Outcome(error="of the first assignment"))
        await asyncio.sleep(0)
        assert not second.done()
        await board.finish(2, Outcome(value=2))
        assert await second == Outcome(value=2)

    asyncio.run(scenario())
