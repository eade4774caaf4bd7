"""Names, shares and what replicas hold decide who answers a request."""

import json
from dataclasses import replace

import pytest

from dpo_ray.registry import Candidate
from serve.models import asked_version, read_question
from serve.placement import Policy, holder_of, wanted_versions
from serve.refusal import Refusal
from tests.unit.fake_serving import replica


@pytest.mark.parametrize("name", [None, "", "policy", "policy@live"])
def test_these_names_ask_for_what_is_live(name: str | None) -> None:
    assert asked_version(name) is None


@pytest.mark.parametrize(
    "name", ["gpt-4", "policy@12", "policy@v", "policy@v012", "policy@v-1", "POLICY", "policy@v1\n"]
)
def test_there_is_no_other_model(name: str) -> None:
    with pytest.raises(Refusal, match="there is no model"):
        asked_version(name)


def test_a_pinned_name_is_a_version_and_the_routes_see_the_one_name() -> None:
    question = read_question(b'{"model": "policy@v12", "n": 2}')
    assert question.asked == 12
    assert json.loads(question.plain) == {"model": "policy", "n": 2}
    assert question.body == b'{"model": "policy@v12", "n": 2}'


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"model": "policy"}', b'{"n": 1}'])
def test_what_names_nothing_special_goes_down_as_it_came(body: bytes) -> None:
    assert read_question(body).plain == body


def test_a_share_of_the_draws_goes_to_the_candidate() -> None:
    policy = Policy(14, Candidate(version=15, share=0.25))
    assert wanted_versions(None, policy, 0.24) == [15, 14]
    assert wanted_versions(None, policy, 0.25) == [14]
    assert wanted_versions(15, policy, 0.9) == [15]
    assert wanted_versions(None, Policy(14, None), 0.0) == [14]


def test_a_replica_answers_itself_what_it_can_and_never_asks_one_that_refuses() -> None:
    own, peer = replica("own", 14), replica("peer", 14, address="http://peer")
    assert holder_of([14], own, [own, peer]) is own
    refusing = replica("peer", 15, address="http://peer", refuses="stale")
    assert holder_of([15], own, [own, refusing]) is None
    assert holder_of([15, 14], own, [own, refusing]) is own
    assert holder_of([14], replace(own, state="refused"), [own, peer]) is peer
