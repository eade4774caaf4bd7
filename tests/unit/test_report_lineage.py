"""The graph of versions tells by form and words what became of each."""

from typing import Any
from xml.etree import ElementTree

from dpo_ray.report.lineage import Lineage, graph, lanes_of, lineage
from dpo_ray.report.record import RunRecord

BACK = {"kind": "rollback", "version": 1, "previous": 2, "by": "job", "reason": "worse"}
BY_ANN = {"kind": "rollback", "version": 3, "previous": 4, "by": "ann", "reason": "<b>short</b>"}


def record(*moves: dict[str, Any]) -> RunRecord:
    """Version 2 was refused, 3 made from 1, 4 from 3, and 5 from 3."""
    parents = [None, 0, 1, 1, 3, 3]
    return RunRecord(
        config_text="",
        config={},
        start={},
        rounds=tuple(
            {"round": version - 1, "gate/passed": version != 2, "gate/reason": "worse", "warnings": []}
            for version in range(1, 5)
        ),
        steps=(),
        evaluations={},
        policies={version: {"version": version, "parent": parent} for version, parent in enumerate(parents)},
        snapshots={},
        live=3,
        moves=moves,
    )


def versions(*moves: dict[str, Any]) -> list[Lineage]:
    return lineage(record(*moves))


def test_a_version_is_kept_refused_rolled_back_or_not_tried_yet() -> None:
    fates = [item.fate for item in versions(BACK, BY_ANN)]
    assert fates == ["start", "kept", "refused", "kept", "rolled back", "not tried"]


def test_what_led_to_the_live_version_has_the_first_lane() -> None:
    assert lanes_of(versions()) == {0: 0, 1: 0, 2: 1, 3: 0, 4: 1, 5: 1}


def test_the_graph_has_a_line_for_each_parent_and_an_arrow_for_each_way_back() -> None:
    svg = ElementTree.fromstring(graph(versions(BACK, BY_ANN), [BACK, BY_ANN]))
    paths = [path for path in svg.findall(".//path") if path.get("fill") == "none"]
    arrows = [path for path in paths if path.get("marker-end") == "url(#back)"]
    assert (len(paths) - len(arrows), len(arrows)) == (5, 2)


def test_every_node_says_in_words_what_its_form_means() -> None:
    svg = ElementTree.fromstring(graph(versions(BACK, BY_ANN), [BACK, BY_ANN]))
    said = ["".join(text.itertext()) for text in svg.findall(".//text")]
    assert said == [
        *(
            "v0 · start",
            "v1 · kept",
            "v2 · refused",
            "v3 · kept · live",
            "v4 · rolled back",
            "v5 · not tried",
        ),
    ]
    assert [link.get("href") for link in svg.findall(".//a")] == [f"#round-{number}" for number in range(5)]


def test_a_start_alone_has_no_graph() -> None:
    assert graph(versions()[:1], []) == ""
