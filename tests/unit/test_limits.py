"""How often a caller may ask."""

import asyncio

import pytest

from serve.limits import Admission, RequestRates
from serve.refusal import Refusal


def test_an_allowance_refills_evenly_and_is_each_callers_own() -> None:
    now = [0.0]
    rates = RequestRates(now_s=lambda: now[0])
    for _ in range(2):
        rates.spend("a", per_minute=2)
    with pytest.raises(Refusal, match="more than 2 requests in a minute: try again in 31 s"):
        rates.spend("a", per_minute=2)
    rates.spend("b", per_minute=2)
    now[0] = 30.0
    rates.spend("a", per_minute=2)
    with pytest.raises(Refusal):
        rates.spend("a", per_minute=2)
    now[0] = 3600.0
    for _ in range(2):
        rates.spend("a", per_minute=2)
    with pytest.raises(Refusal):
        rates.spend("a", per_minute=2)


def test_a_comparison_spends_two_requests_and_fits_in_any_allowance() -> None:
    now = [0.0]
    rates = RequestRates(now_s=lambda: now[0])
    rates.spend("a", per_minute=3, weight=2)
    with pytest.raises(Refusal, match="try again in 21 s"):
        rates.spend("a", per_minute=3, weight=2)
    rates.spend("a", per_minute=3)
    rates.spend("b", per_minute=1, weight=2)


def test_a_comparison_takes_two_turns_and_those_behind_it_wait() -> None:
    async def scenario() -> None:
        admission = Admission(running=3, queued=9)
        with admission.turn() as one, admission.turn(2) as two:
            with admission.turn(2) as waits, admission.turn() as behind:
                assert [turn.done() for turn in (one, two, waits, behind)] == [True, True, False, False]
            assert one.done()
        with admission.turn(9) as alone:
            assert alone.done()

    asyncio.run(scenario())
