"""The report states a run's numbers, shows its texts as text, and needs nothing but itself."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.registry import PolicyRegistry
from dpo_ray.report import write_report
from dpo_ray.report.__main__ import main
from dpo_ray.report.charts import Curve, line_chart
from dpo_ray.report.facts import result
from dpo_ray.report.figures import time_and_pairs
from dpo_ray.report.page import format_number, render
from dpo_ray.report.record import RunRecord, Samples, read_run
from dpo_ray.storage import Storage

ATTACK = "<script>alert('x')</script> <img src=\"https://evil.example/x.png\">"
HASH = "ab" * 32
DASH = "\N{EN DASH}"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def answer(index: int, text: str, reward: float) -> dict[str, Any]:
    return {"prompt": f"prompt {index}", "text": text, "reward": reward, "index": index}


def step_row(step: int, loss: float | None) -> dict[str, Any]:
    return {"kind": "step", "round": 0, "step": step, "policy_version": 0, "loss": loss, "grad_norm": 2.0}


ROUND = {
    "kind": "round",
    "round": 0,
    "step": 2,
    "policy_version": 1,
    "sample_version": 0,
    "reward/mean": 0.4321,
    "reward/std": 0.2,
    "judge/grammatical": 0.9,
    "pairs/made": 4,
    "pairs/kept": 3,
    "yield/tie": 2,
    "yield/kept": 3,
    "yield/unjudged": 5,
    "time/train_s": 2.5,
    "time/round_s": 4.0,
    "eval/reward_mean": 0.8765,
    "eval/grammatical": None,
    "win_rate/vs_start": 0.75,
    "kl/start": 1.234,
    "gate/passed": True,
    "gate/reason": "",
}
START = {"kind": "start", "round": -1, "step": 0, "policy_version": 0, "eval/reward_mean": 0.1234}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One finished round: two held-out prompts, of which version 1 wins one and half of the other."""
    (tmp_path / "config.yaml").write_text(
        "model: tiny\ntraining: {loss: {type: sigmoid, beta: 0.25}}\n"
        "buffer: {url: 'postgresql://me:hunter2@host/pairs'}\n"
    )
    write_lines(tmp_path / "metrics.jsonl", [START, step_row(1, math.log(2)), step_row(2, 0.6), ROUND])
    write_lines(tmp_path / "evaluation/v00000.jsonl", [answer(0, "dull", 0.1), answer(1, "fair", 0.5)])
    after = [answer(0, ATTACK, 0.9), answer(1, "fair", 0.5)]
    write_lines(tmp_path / "evaluation/v00001.jsonl", after)
    write_manifest(tmp_path / "policies/v00000", {"version": 0, "parent": None, "snapshot": None})
    snapshot = {"round": 0, "rows": 3, "sha256": HASH}
    write_manifest(tmp_path / "policies/v00001", {"version": 1, "parent": 0, "snapshot": snapshot})
    write_manifest(tmp_path / "rounds/00000", snapshot)
    (tmp_path / "policies/LIVE").write_text("1\n")
    return tmp_path


def page(run: Path) -> str:
    return Path(write_report(str(run))).read_text()


def words(html: str) -> str:
    """The page's text as a reader sees it, spaces made one."""

    class Words(HTMLParser):
        seen = ""

        def handle_data(self, data: str) -> None:
            self.seen += data

    parser = Words()
    parser.feed(html[html.index("<body>") :])
    return re.sub(r"\s+", " ", parser.seen)


def test_headline_tells_the_result(run: Path) -> None:
    # Wilson's interval of 0.75 over two prompts is 0.198 to 0.973.
    assert (
        "After 1 round, held-out reward went from 0.123 to 0.876 with version 1, which is live; "
        "it wins 75 % of comparisons with the start (95 % interval 20 % to 97 %), "
        "1.234 nats of KL away from it."
    ) in words(page(run))


def test_tables_hold_the_recorded_numbers(run: Path) -> None:
    html = page(run)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html[html.index("Steps so far") :])
    assert cells[:13] == [
        *('<a href="#round-0">0</a>', "2", "v0", "v1", "0.432", "0.876", "75\N{NO-BREAK SPACE}%", DASH),
        *("1.234", "4", "3", DASH, "4.000"),
    ]
    assert HASH[:12] in html
    assert '<td class="text">passed</td>' in html
    assert "<dt>Beta</dt><dd>0.25</dd>" in html


def test_what_became_of_the_completions_is_drawn_where_it_was_counted(run: Path) -> None:
    unpaired, matched = "Completions not paired", "What the pair rule matched"
    drawn = {figure.title: figure.svg for figure in time_and_pairs(read_run(Storage(str(run))))}
    assert "tie" in drawn[matched] and "length" not in drawn[matched]
    assert unpaired in drawn
    uncounted = {name: count for name, count in ROUND.items() if not name.startswith("yield/")}
    write_lines(run / "metrics.jsonl", [START, uncounted])
    titles = {figure.title for figure in time_and_pairs(read_run(Storage(str(run))))}
    assert titles == drawn.keys() - {unpaired, matched}


def test_model_text_is_shown_as_text(run: Path) -> None:
    html = page(run)
    assert "<script" not in html
    assert "<img" not in html
    assert ATTACK in words(html)


def test_page_asks_nothing_of_any_other_place(run: Path) -> None:
    html = page(run)
    assert re.findall(r"""<[^>]+\s(?:src|href|xlink:href|action)=["'](?!#)""", html) == []
    assert re.findall(r"@import|url\((?!#)", html) == []
    assert "default-src 'none'" in html


def test_passwords_of_the_config_stay_out_of_the_page(run: Path) -> None:
    html = page(run)
    assert "hunter2" not in html
    assert "postgresql://me:***@host/pairs" in html


def test_same_run_gives_the_same_page(run: Path) -> None:
    assert page(run) == page(run)


def test_run_with_only_a_start_says_so(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [START])
    assert "Only the starting policy has been measured so far: its held-out reward is 0.123." in words(
        page(run)
    )


def test_run_without_measurements_still_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: tiny\n")
    assert "Nothing has been measured yet." in words(page(tmp_path))


def test_round_with_nothing_but_its_number_still_gives_a_page(run: Path) -> None:
    write_lines(
        run / "metrics.jsonl", [{"kind": "round", "round": 0, "policy_version": 1}, step_row(1, None)]
    )
    assert "After 1 round" in words(page(run))


def test_row_that_is_still_being_written_is_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "round": 1, "st')
    assert len(read_run(Storage(str(run))).steps) == 2


def test_step_done_again_after_a_crash_counts_once(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [step_row(1, 0.9), step_row(2, 0.8), step_row(1, 0.7)])
    assert [row["loss"] for row in read_run(Storage(str(run))).steps] == [0.7, 0.8]


def no_samples(round_: int) -> Samples:
    return Samples((), ())


REFUSED = ROUND | {"round": 1, "gate/passed": False, "gate/reason": "fell <b>far</b>"}
"""The second round: version 1 stays live."""


def with_refused_version(run: Path, *moves: dict[str, Any]) -> RunRecord:
    record = read_run(Storage(str(run)))
    return replace(
        record,
        rounds=(*record.rounds, REFUSED),
        policies=record.policies | {2: {"version": 2, "parent": 1}},
        moves=moves,
    )


def test_refused_version_is_not_the_result(run: Path) -> None:
    record = with_refused_version(run)
    assert result(record).version == 1
    html = render(record, no_samples)
    assert '<td class="text">refused: fell &lt;b&gt;far&lt;/b&gt;</td>' in html
    assert html.count('<td class="text">passed</td>') == 1


def test_version_that_was_taken_back_says_by_whom_and_why(run: Path) -> None:
    back = {"kind": "rollback", "version": 1, "previous": 2, "by": "job", "reason": "fell <b>far</b>"}
    by_ann = {"kind": "rollback", "version": 0, "previous": 1, "by": "ann", "reason": "too short"}
    text = words(render(with_refused_version(run, back, by_ann), no_samples))
    assert "refused: fell <b>far</b>; rolled back to v1 by job " in text
    assert "passed; rolled back to v0 by ann: too short" in text


def test_moves_of_live_are_read_from_the_registry(run: Path) -> None:
    for version in (0, 1):
        PolicyRegistry(Storage(str(run))).promote(version)
    assert [move["version"] for move in read_run(Storage(str(run))).moves] == [0, 1]


def test_snapshot_that_is_not_the_declared_one_stands_out(run: Path) -> None:
    assert "not what the round declared" not in page(run)
    (run / "rounds/00000/manifest.json").write_text(json.dumps({"sha256": "cd" * 32}))
    assert "not what the round declared" in page(run)


def test_chart_without_points_is_no_chart() -> None:
    assert line_chart([Curve("loss", [])], x_label="step") == ""


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.7461, "0.746"),
        (-0.5, "\N{MINUS SIGN}0.500"),
        (12.34, "12.3"),
        (1024, "1,024"),
        (None, DASH),
        (math.nan, DASH),
    ],
)
def test_numbers_line_up_in_columns(value: float | None, shown: str) -> None:
    assert format_number(value) == shown


def test_command_prints_where_the_page_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"


def test_command_without_a_run_ends_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"no run in {tmp_path}/nowhere" in captured.err
