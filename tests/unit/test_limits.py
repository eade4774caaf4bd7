"""How often a caller may ask."""

import pytest

from serve.limits import RequestRates
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
