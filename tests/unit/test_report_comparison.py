"""Runs side by side: what they are called, where their settings differ, where they ended."""

import re
from pathlib import Path

import pytest
from test_report import DASH, run, write_lines

from dpo_ray.report import write_comparison
from dpo_ray.report.__main__ import main
from dpo_ray.report.comparison import differing_settings, run_names
from dpo_ray.report.record import read_run
from dpo_ray.storage import Storage

__all__ = ["run"]


@pytest.fixture
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An offline run, without evaluations, versions or samples."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "config.yaml").write_text(
        "model: tiny\npairs: mine.jsonl\ntraining: {loss: {type: ipo, beta: 0.25}}\n"
    )
    row = {"kind": "round", "round": 0, "step": 1, "policy_version": 1, "eval/rewards/accuracies": 0.625}
    write_lines(folder / "metrics.jsonl", [row])
    return folder


def test_runs_are_called_by_what_tells_them_apart() -> None:
    assert run_names(["runs/a/", "runs/b"]) == ["a", "b"]
    assert run_names(["s3://x/a/run", "b/run"]) == ["a/run", "b/run"]
    with pytest.raises(ValueError, match="the same run is named twice: give each of a, a once"):
        run_names(["a", "a"])


def test_only_settings_that_differ_are_listed(run: Path, other: Path) -> None:
    runs = {str(path): read_run(Storage(str(path))) for path in (run, other)}
    differing = differing_settings(runs)
    assert differing == {"training.loss.type": ["sigmoid", "ipo"]}


def test_a_comparison_has_the_last_numbers_of_every_run(run: Path, other: Path, tmp_path: Path) -> None:
    path = Path(write_comparison([str(run), str(other)], out=str(tmp_path / "deep/compared.html")))
    html = path.read_text()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html)
    interval = "20\N{NO-BREAK SPACE}% to 97\N{NO-BREAK SPACE}%"
    assert cells[:13] == [
        *(run.name, "1", "v1", "0.123", "0.876", "75\N{NO-BREAK SPACE}%", interval),
        *("1.234", DASH, DASH, "2", "4.000", "0"),
    ]
    offline = [other.name, "1", "v1", *[DASH] * 6, "62\N{NO-BREAK SPACE}%", "0", DASH, "0"]
    assert cells[13:26] == offline
    assert "<code>training.loss.type</code>" in cells
    assert "hunter2" not in html


def test_command_compares_several_runs(
    run: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both.html"
    assert main([str(run), str(other), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.exists()
    assert main([str(run), str(tmp_path / "nowhere"), "--out", str(out)]) == 2
    assert "no run in" in capsys.readouterr().err


def test_a_page_is_written_where_it_is_asked_for(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").exists()
    assert not (run / "report.html").exists()
