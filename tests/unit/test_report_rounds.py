"""A round's page: its yield, its judges, its histograms, and answers sorted by change."""

from xml.etree import ElementTree

import pytest
from test_report_facts import answers, record_of

from dpo_ray.report.costs import Cost, costs
from dpo_ray.report.histograms import bin_edges, bin_shares, histogram
from dpo_ray.report.record import Row, RunRecord, Samples
from dpo_ray.report.rounds import RoundPage, round_pages

ROW: Row = {
    "kind": "round",
    "round": 1,
    "policy_version": 2,
    "warnings": [{"name": "kl_budget", "action": "log", "message": "far"}],
    "yield/completions": 20,
    "yield/identical": 5,
    "yield/matched": 10,
    "yield/tie": 4,
    "yield/made": 6,
    "yield/kept": 3,
    "judge/flips": 0.25,
    "time/sample_s": 3.0,
    "time/train_s": 6.0,
    "time/round_s": 10.0,
    "judge/cost": 0.5,
}


def record() -> RunRecord:
    empty = record_of([])
    rewards = {1: [1.0, 1.0, 1.0], 2: [0.5, 3.0, 1.0]}
    return RunRecord(
        config_text="",
        config={},
        start={},
        rounds=({**empty.rounds[0], "warnings": []}, ROW),
        steps=tuple(
            {"kind": "step", "round": 1, "step": step, "rewards/accuracies": accuracy}
            for step, accuracy in enumerate([0.0, 0.5, 0.75, 0.85])
        ),
        evaluations={
            version: answers(version, {index: [reward] for index, reward in enumerate(each)})
            for version, each in rewards.items()
        },
        policies={2: {"parent": 1}},
        snapshots={},
        live=2,
    )


def samples(round_: int) -> Samples:
    return Samples(rewards=(0.5, 1.0 + round_), lengths=(3.0, 4.0 + round_))


@pytest.fixture
def page() -> RoundPage:
    return round_pages(record(), samples)[1]


def test_the_yield_falls_from_completions_to_pairs(page: RoundPage) -> None:
    assert [(stage.count, stage.share) for stage in page.stages] == [
        *((20, 1.0), (15, 0.75), (10, 1.0), (6, 0.6), (3, 0.3)),
    ]
    assert "of 10 matches 6 became pairs (4 tie)" in page.what_became


def test_judges_are_compared_with_each_other_and_with_what_was_learnt(page: RoundPage) -> None:
    assert list(page.agreement.values()) == ["25%", "80%"]  # The latter of the last half of the steps.


def test_answers_of_a_round_are_sorted_by_what_it_changed(page: RoundPage) -> None:
    assert [(example.index, example.change) for example in page.examples] == [(1, 2.0), (2, 0.0), (0, -0.5)]


def test_a_page_has_the_warnings_of_its_round(page: RoundPage) -> None:
    assert [(warning.name, warning.message) for warning in page.warnings] == [("kl_budget", "far")]


def test_a_run_that_kept_no_warnings_gets_those_that_would_fire_now() -> None:
    old = {"round": 0, "policy_version": 1, "kl/start": 99.0}
    assert [warning.name for warning in record().warnings(old)] == ["kl_budget"]


def test_a_round_that_sampled_nothing_has_no_histogram() -> None:
    assert round_pages(record(), lambda round_: Samples((), ()))[1].histograms == []


def test_time_is_told_by_phase_with_what_is_left_over() -> None:
    spent = costs(record())
    assert spent is not None
    assert (spent.seconds, spent.money) == (10.0, 0.5)
    assert spent.phases == [
        Cost("sample", 3.0, 0.3, 1.5),
        Cost("train", 6.0, 0.6, 3.0),
        Cost("other", 1.0, 0.1, 0.5),
    ]


@pytest.mark.parametrize(
    ("values", "whole", "edges"),
    [
        ([0.0, 1.0], False, [place * 0.05 for place in range(21)]),
        ([3.0, 5.0], True, [2.5, 3.5, 4.5, 5.5]),
        ([7.0, 7.0], False, [7.0, 8.0]),
        ([7.0, 7.0], True, [6.5, 7.5]),
        ([-0.3, 0.3], False, [round(-0.3 + place * 0.025, 3) for place in range(25)]),
    ],
)
def test_bins_have_round_edges_and_hold_every_value(
    values: list[float], whole: bool, edges: list[float]
) -> None:
    found = bin_edges(min(values), max(values), whole=whole)
    assert found == pytest.approx(edges)
    assert sum(bin_shares(values, found)) == pytest.approx(1.0)


def test_wide_ranges_have_few_bins_around_whole_numbers() -> None:
    edges = bin_edges(1, 1000, whole=True)
    assert len(edges) <= 26
    assert edges[0] < 1 and edges[-1] > 1000


def test_a_bar_is_as_high_as_its_share() -> None:
    svg = ElementTree.fromstring(histogram([1, 1, 1, 2], [1, 2], label="tokens & more"))
    first, second = (float(bar.get("height", "")) for bar in svg.findall("rect"))
    assert first == pytest.approx(3 * second)
    assert svg.get("aria-label") == "tokens & more"
