"""Which pairs are drawn where there are more than a snapshot holds: by the seed and the rows alone."""

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict


class SnapshotQuery(BaseModel):
    """Which pairs a snapshot holds: run again on the same pairs, it chooses the same."""

    model_config = ConfigDict(frozen=True)

    max_round: int
    min_policy_version: int
    limit: int
    seed: int
    mix: dict[str, float] = {}
    freshness_half_life: float | None = None
    max_pairs_per_prompt: int | None = None
    max_author_share: float = 1.0


class Candidate(NamedTuple):
    """What a draw knows of a pair."""

    pair_id: str
    policy_version: int
    source: str
    author: str
    prompt: str
    """Equal where prompts are equal."""


def draw(candidates: Sequence[Candidate], query: SnapshotQuery) -> list[str]:
    """Ids of the pairs that a snapshot holds, sorted; whatever the order of the candidates."""
    mixed = [pair for pair in candidates if query.mix.get(_stratum(pair, query), 1.0) > 0]
    ordered = sorted(mixed, key=lambda pair: (_arrival(pair, query), pair.pair_id))
    allowed = _within_bounds(ordered, query)
    places = _places(query, Counter(_stratum(pair, query) for pair in allowed))
    drawn: list[str] = []
    for pair in allowed:
        stratum = _stratum(pair, query)
        if places[stratum]:
            places[stratum] -= 1
            drawn.append(pair.pair_id)
    return sorted(drawn)


def _stratum(pair: Candidate, query: SnapshotQuery) -> str:
    """Pairs of one stratum compete for its places: a source, or all where there is no mix."""
    return pair.source if query.mix else ""


def _places(query: SnapshotQuery, supply: Mapping[str, int]) -> Counter[str]:
    return divide(query.limit, {stratum: query.mix.get(stratum, 1.0) for stratum in supply}, supply)


def divide(places: int, weights: Mapping[str, float], supply: Mapping[str, int]) -> Counter[str]:
    """Places for each source, in proportion to its weight (Jefferson's method, one place at a time).

    What a source cannot fill goes to the others.
    """
    given: Counter[str] = Counter()
    queue = [(1 / weights[name], name) for name in supply]
    heapq.heapify(queue)
    while queue and given.total() < places:
        _, name = heapq.heappop(queue)
        given[name] += 1
        if given[name] < supply[name]:
            heapq.heappush(queue, ((given[name] + 1) / weights[name], name))
    return given


def _arrival(pair: Candidate, query: SnapshotQuery) -> float:
    """Log of an exponential arrival time: the first to arrive are a weighted draw without replacement.

    Algorithm A-ES of Efraimidis and Spirakis (2006), u ** (1 / weight), as -log(u) / weight; u is a hash,
    and the weight 2 ** (policy_version / freshness_half_life).
    """
    digest = hashlib.sha256(f"{query.seed} {query.max_round} {pair.pair_id}".encode()).digest()
    uniform = ((int.from_bytes(digest[:8]) >> 12) + 0.5) / 2**52
    log_weight = pair.policy_version / query.freshness_half_life if query.freshness_half_life else 0.0
    return math.log(-math.log(uniform)) - log_weight * math.log(2)


def _within_bounds(ordered: Sequence[Candidate], query: SnapshotQuery) -> list[Candidate]:
    """Without what comes after the last place of its prompt or its person."""
    places = _places(query, dict.fromkeys({_stratum(pair, query) for pair in ordered}, query.limit))
    prompts: Counter[str] = Counter()
    authors: Counter[tuple[str, str]] = Counter()
    allowed: list[Candidate] = []
    for pair in ordered:
        stratum = _stratum(pair, query)
        most = max(1, math.floor(query.max_author_share * places[stratum] + 1e-9))
        if pair.author and authors[stratum, pair.author] >= most:
            continue
        if query.max_pairs_per_prompt is not None and prompts[pair.prompt] >= query.max_pairs_per_prompt:
            continue
        authors[stratum, pair.author] += 1
        prompts[pair.prompt] += 1
        allowed.append(pair)
    return allowed
