"""The report of a run, in a browser: on a phone, a tablet, a desk, and on paper."""

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, sync_playwright

from dpo_ray.report import write_report
from tests.integration.chromium import CHROMIUM, FLAGS

LONG = "unbroken" * 40
WIDTHS = (360, 768, 1280)
WARNING = {
    "name": "kl_budget",
    "action": "log",
    "message": f"the KL to the start is 25.0 nats, above 20: {LONG}",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two rounds, the second refused; words that no line can hold."""
    (tmp_path / "config.yaml").write_text(f"model: /models/{LONG}\nsampling: {{prompts_per_round: 2}}\n")
    rows: list[dict[str, Any]] = [measured("start", -1, 0)]
    for round_ in range(2):
        refused = {"gate/passed": round_ == 0, "gate/reason": LONG, "warnings": [WARNING]}
        rows += [{"kind": "step", "round": round_, "step": round_ + 1, "loss": 0.6}]
        rows += [measured("round", round_, 1) | refused]
        write_rows(tmp_path / f"rounds/{round_:05d}/samples.jsonl", [sample(0.5), sample(1.0)])
    write_rows(tmp_path / "metrics.jsonl", rows)
    for version in range(3):
        write_rows(tmp_path / f"evaluation/v{version:05d}.jsonl", [answer(0, version), answer(1, -version)])
        manifest = {"version": version, "parent": min(version, 2) - 1 if version else None}
        write_rows(tmp_path / f"policies/v{version:05d}/manifest.json", [manifest])
    moves = [("promote", 1, 0), ("promote", 2, 1), ("rollback", 1, 2)]
    events = [{"kind": k, "version": v, "previous": p, "by": "job", "reason": LONG} for k, v, p in moves]
    write_rows(tmp_path / "policies/events.jsonl", events)
    (tmp_path / "policies/LIVE").write_text("1\n")
    return tmp_path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


def measured(kind: str, round_: int, version: int) -> dict[str, Any]:
    times = {"time/train_s": 1.0, "time/round_s": 2.0}
    counts = {"yield/completions": 4, "yield/matched": 2, "yield/tie": 1, "yield/made": 1, "yield/kept": 1}
    held_out = {"eval/reward_mean": 0.5, "win_rate/vs_start": 0.5, "kl/start": 25.0, f"eval/{LONG}": 0.5}
    row = {"kind": kind, "round": round_, "step": round_ + 1, "policy_version": version}
    return {**row, **times, **counts, **held_out, "rewards/accuracies": 0.5, "judge/flips": 0.1}


def sample(reward: float) -> dict[str, Any]:
    return {"completion": {"token_ids": [1] * int(reward * 4)}, "judgement": {"reward": reward}}


def answer(index: int, reward: float) -> dict[str, Any]:
    return {"index": index, "prompt": LONG, "text": LONG, "reward": reward, "length": 3}


def overflows(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > innerWidth")


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
def test_the_report_fits_every_width_and_opens_the_round_that_is_linked_to(run: Path) -> None:
    address, troubles = Path(write_report(str(run))).as_uri(), []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 740})
            page.goto(f"{address}?{width}#round-1")
            assert page.locator("#round-1").is_visible()
            assert not page.locator("#round-0").is_visible()
            page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            assert not overflows(page), width
        page.goto(address)
        page.emulate_media(media="print")
        assert page.locator("#round-0").is_visible()
        browser.close()
    assert troubles == []
