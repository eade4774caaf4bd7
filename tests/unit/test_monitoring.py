"""The dashboard, the alert rules and their README speak of metrics that there are."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

import serve
from serve import metrics

FOLDER = Path(serve.__path__[0]) / "monitoring"
DASHBOARD = json.loads((FOLDER / "grafana.json").read_text())
(GROUP,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
RULES = [rule["expr"] for rule in GROUP["rules"]]
OWN = {
    next(iter(metric.describe())).name: metric
    for metric in vars(metrics).values()
    if isinstance(metric, Counter | Gauge | Histogram)
}


def series_names() -> set[str]:
    """Of our own metrics, as a scrape names them."""
    names = set()
    for name, metric in OWN.items():
        match metric:
            case Counter():
                names.add(f"{name}_total")
            case Histogram():
                names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")}
            case _:
                names.add(name)
    return names


@pytest.mark.parametrize("query", [*QUERIES, *RULES])
def test_every_metric_of_a_query_exists(query: str) -> None:
    own = set(re.findall(r"dpo_ray_\w+", query))
    engines = set(re.findall(r"vllm:\w+", query))
    assert own or engines
    assert own <= series_names()
    assert {re.sub("_(bucket|sum|count|total)$", "", name) for name in engines} <= vllm_names()


def vllm_names() -> set[str]:
    """Read from vLLM's source: to import it takes long, and to have its metrics, an engine."""
    package = find_spec("vllm")
    assert package is not None and package.submodule_search_locations
    source = Path(package.submodule_search_locations[0]) / "v1" / "metrics" / "loggers.py"
    return set(re.findall(r'"(vllm:\w+)"', source.read_text()))


@pytest.mark.parametrize("query", [*QUERIES, *RULES])
def test_every_label_that_a_query_selects_is_one_of_the_metric(query: str) -> None:
    for name, selected in re.findall(r"(dpo_ray_\w+)\{([^}]*)\}", query):
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selected))
        assert labels <= {*OWN[name.removesuffix("_total")]._labelnames, "replica"}


def test_the_readme_explains_each_metric_once() -> None:
    rows = re.findall(r"^\| `(dpo_ray_\w+)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    names = {f"{name}_total" if isinstance(metric, Counter) else name for name, metric in OWN.items()}
    assert sorted(rows) == sorted(names)


def test_each_alert_says_what_is_wrong_and_what_to_do() -> None:
    for rule in GROUP["rules"]:
        assert set(rule["annotations"]) == {"summary", "action"}
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_panels_do_not_overlap() -> None:
    places = [
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in DASHBOARD["panels"]
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert all(x < 24 for x, _ in places)
