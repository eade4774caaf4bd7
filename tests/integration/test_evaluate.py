"""Two tiny policies compared as a user does it, and the page that a person sees."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from playwright.sync_api import sync_playwright

from dpo_ray.models import load_model, load_tokenizer, save_policy
from tests.integration.conftest import ACTIVATED, ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


def test_a_trained_policy_is_found_better_than_random_weights(starter: Path, tmp_path: Path) -> None:
    model = load_model(starter)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    save_policy(model, load_tokenizer(starter), tmp_path / "random")
    out = tmp_path / "out"
    names = ["--policies", str(tmp_path / "random"), str(starter)]
    more = ["--prompts=film_reviews", "--max_prompts=24", "--max_new_tokens=32", "--resamples=500"]
    more += ["--judge.function=tests.integration.judges:whole_reviews"]
    command = [sys.executable, "jobs/evaluate.py", f"--run_dir={out}", *names, *more]
    ended = subprocess.run(command, cwd=ROOT, env=ACTIVATED, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert f"{starter} against {tmp_path}/random: better, wins" in ended.stdout
    found = json.loads((out / "evaluation.json").read_text())
    (comparison,) = found["comparisons"]
    assert comparison["is_settled"]
    assert comparison["win_rate"]["low"] > 0.5
    random, trained = found["policies"]
    assert random["degenerate_share"] > trained["degenerate_share"]
    assert random["self_bleu"] < trained["self_bleu"]
    assert trained["kl"]["low"] > 0
    check_page(out / "evaluation.html")


def check_page(page: Path) -> None:
    """On a phone and on a desk, nothing is wider than the screen, and the browser has no complaint."""
    if not CHROMIUM:
        pytest.skip("no chromium on this machine")
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for width in (400, 1200):
            tab = browser.new_page(viewport={"width": width, "height": 900})
            tab.on("console", lambda message: complaints.append(message.text))
            tab.goto(page.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.locator("article.example").count() >= 8
        browser.close()
    assert complaints == []
