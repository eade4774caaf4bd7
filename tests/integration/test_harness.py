"""lm-evaluation-harness on versions of a run that nobody serves."""

import os
from pathlib import Path

import pytest
import torch

from dpo_ray.models import load_model, load_tokenizer, save_policy
from dpo_ray.registry import PolicyManifest, PolicyRegistry
from dpo_ray.storage import Storage
from tests.integration.conftest import run_job


@pytest.mark.slow
def test_both_versions_of_a_run_go_live_in_a_copy_of_it(starter: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    registry, model = PolicyRegistry(Storage(str(run_dir))), load_model(starter)
    for version in (0, 1):
        if version == 1:
            torch.manual_seed(0)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter)
        save_policy(model, load_tokenizer(starter), tmp_path / str(version))
        registry.publish(tmp_path / str(version), PolicyManifest(version=version))
    registry.promote(1)
    run_job("jobs/harness.py", [f"--run_dir={run_dir}", "--limit=20"], log, dict(os.environ))
    (line,) = [each for each in log.read_text().splitlines() if "film_grammar acc" in each]
    start, random = float(line.split()[2]), float(line.split()[5])
    assert start > 0.9 > random
    assert registry.live() == 1
