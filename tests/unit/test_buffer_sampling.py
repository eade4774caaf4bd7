"""What is drawn depends on the seed and the rows alone, and keeps every bound."""

import random
from collections import Counter

import pytest

from dpo_ray.buffer import SnapshotQuery
from dpo_ray.buffer.sampling import Candidate, divide, draw


def query(limit: int, *, seed: int = 0, **settings: object) -> SnapshotQuery:
    fixed = {"max_round": 0, "min_policy_version": 0, "limit": limit, "seed": seed}
    return SnapshotQuery.model_validate({**fixed, **settings})


def candidates(number: int, *, source: str = "judge", version: int = 0, author: str = "") -> list[Candidate]:
    ids = [f"{source} {version} {author} {place}" for place in range(number)]
    return [Candidate(each, version, source, author, f"prompt {place % 7}") for place, each in enumerate(ids)]


def sources(drawn: list[str]) -> Counter[str]:
    return Counter(pair_id.split()[0] for pair_id in drawn)


def test_the_order_of_the_rows_changes_nothing_and_the_seed_does() -> None:
    pairs = candidates(500) + candidates(40, source="human", author="ada")
    shuffled = random.Random(0).sample(pairs, len(pairs))
    asked = query(100, mix={"human": 1, "judge": 3}, freshness_half_life=2.0, max_pairs_per_prompt=20)
    assert draw(shuffled, asked) == draw(pairs, asked)
    assert draw(pairs, asked.model_copy(update={"seed": 1})) != draw(pairs, asked)


def test_all_are_taken_where_they_fit() -> None:
    pairs = candidates(30) + candidates(5, source="human")
    everything = sorted(pair.pair_id for pair in pairs)
    assert draw(pairs, query(35)) == everything
    assert draw(pairs, query(99, mix={"human": 5}, freshness_half_life=0.001)) == everything
    assert draw([], query(3, mix={"human": 1})) == []


def test_a_mix_gives_each_source_its_share_and_the_rest_fills_what_one_lacks() -> None:
    pairs = candidates(1000) + candidates(1000, source="human") + candidates(10, source="rule")
    assert sources(draw(pairs, query(90, mix={"human": 2, "judge": 1, "rule": 0}))) == {
        "human": 60,
        "judge": 30,
    }
    assert sources(draw(pairs, query(90, mix={"rule": 8}))) == {"rule": 10, "human": 40, "judge": 40}
    # What is left out takes no prompt's place, and what hardly counts is not left out.
    one_each = query(90, mix={"rule": 0}, max_pairs_per_prompt=1)
    assert sources(draw(candidates(7) + candidates(7, source="rule"), one_each)) == {"judge": 7}
    rare = candidates(3, source="human", author="ada")
    assert sources(draw(rare, query(9, mix={"human": 0.001, "judge": 1}))) == {"human": 3}
    assert draw(candidates(5, source="rule"), query(9, mix={"human": 1, "rule": 0})) == []


def test_places_are_divided_as_jefferson_divides_seats() -> None:
    # 100 votes to 80 to 30 to 20, 8 seats: the textbook's answer.
    votes = {"a": 100.0, "b": 80.0, "c": 30.0, "d": 20.0}
    assert divide(8, votes, dict.fromkeys(votes, 8)) == {"a": 4, "b": 3, "c": 1}
    assert divide(2, {"a": 3.0, "b": 2.0}, {"a": 2, "b": 2}) == {"a": 1, "b": 1}
    assert divide(8, votes, {"a": 2, "b": 1, "c": 9, "d": 9}) == {"a": 2, "b": 1, "c": 3, "d": 2}


def test_with_each_half_life_of_age_a_pair_is_half_as_likely_to_be_drawn() -> None:
    pairs = [pair for version in (0, 2, 4) for pair in candidates(3000, version=version)]
    drawn = draw(pairs, query(350, freshness_half_life=2.0))
    by_version = Counter(int(pair_id.split()[1]) for pair_id in drawn)
    # 1 to 2 to 4 of 350; what is drawn is not put back, which with 3,000 each matters little.
    assert [by_version[version] for version in (0, 2, 4)] == pytest.approx([50, 100, 200], abs=25)


def test_half_lives_far_below_the_ages_are_no_overflow() -> None:
    old, new = candidates(3, version=0), candidates(3, version=100_000)
    assert draw(old + new, query(3, freshness_half_life=0.001)) == sorted(pair.pair_id for pair in new)


def test_no_prompt_has_more_pairs_than_it_may() -> None:
    drawn = draw(candidates(70), query(100, max_pairs_per_prompt=4))
    assert len(drawn) == 7 * 4
    assert Counter(int(pair_id.split()[-1]) % 7 for pair_id in drawn) == dict.fromkeys(range(7), 4)


def test_one_person_fills_at_most_a_share_of_the_places() -> None:
    flood = candidates(5000, source="human", author="mallory")
    others = [pair for name in "abcdefghij" for pair in candidates(20, source="human", author=name)]
    drawn = draw(flood + others + candidates(500), query(100, max_author_share=0.25))
    assert sum("mallory" in pair_id for pair_id in drawn) <= 25
    # Of the 60 places that the mix gives to people, a quarter.
    mixed = query(100, max_author_share=0.25, mix={"human": 3, "judge": 2})
    by_person = Counter(pair_id.split()[2] for pair_id in draw(flood + others + candidates(500), mixed))
    assert by_person["mallory"] <= 15
    assert len(draw(flood, query(3, max_author_share=0.01))) == 1


def test_each_pair_is_as_likely_as_the_next() -> None:
    pairs = candidates(20)
    drawn = Counter(pair_id for seed in range(2000) for pair_id in draw(pairs, query(5, seed=seed)))
    assert min(drawn.values()) > 500 - 5 * 20 and max(drawn.values()) < 500 + 5 * 20  # 5 sigma.


def test_the_query_of_an_older_manifest_still_loads() -> None:
    old = '{"max_round": 3, "min_policy_version": 1, "limit": 30, "seed": 7}'
    loaded = SnapshotQuery.model_validate_json(old)
    assert (loaded.mix, loaded.max_author_share, loaded.freshness_half_life) == ({}, 1.0, None)
