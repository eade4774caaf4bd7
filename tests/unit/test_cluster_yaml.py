"""`cluster.yaml` is what Ray's cluster launcher accepts."""

import copy
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
COMMAND_LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def launch_checks(cluster: dict[str, Any]) -> None:
    """What `ray up` checks before it talks to the cloud."""
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    launch_checks(cluster)


def test_ray_refuses_an_unknown_setting(cluster: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_hours"):
        launch_checks(cluster | {"idle_timeout_hours": 1})


def test_ray_refuses_an_unknown_setting_of_a_node_type(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["gpu_worker"]["gpus"] = 1
    with pytest.raises(jsonschema.ValidationError, match="gpus"):
        launch_checks(cluster)


def test_head_is_one_of_the_node_types_and_workers_fit_below_the_limit(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    workers = [spec for name, spec in types.items() if name != cluster["head_node_type"]]
    assert workers
    for spec in workers:
        assert spec["min_workers"] <= spec["max_workers"] <= cluster["max_workers"]


def test_the_virtual_environment_and_the_runs_stay_behind(cluster: dict[str, Any]) -> None:
    assert "." in cluster["file_mounts"].values()
    assert {".venv", "runs"} <= set(cluster["rsync_exclude"])


def test_gpu_nodes_install_the_cuda_lock_and_the_head_does_not(cluster: dict[str, Any]) -> None:
    assert any("DPO_RAY_ACCELERATOR=cuda make setup" in line for line in cluster["worker_setup_commands"])
    assert any(line.endswith("&& make setup") for line in cluster["head_setup_commands"])


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_starts_from_the_virtual_environment_with_the_settings(
    cluster: dict[str, Any], key: str, tmp_path: Path
) -> None:
    start = cluster[key][-1]
    assert start.startswith(". ~/dpo_ray.env;")
    assert "/.venv/bin/ray start" in start
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", "-c", cluster["setup_commands"][0]], env=home, check=True)
    seen = subprocess.run(
        ["bash", "-c", ". ~/dpo_ray.env; env"], env=home, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert {
        "RAY_AUTH_MODE=token",
        "RAY_worker_niceness=0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.2",
        f"PATH={tmp_path}/dpo_ray/.venv/bin:/usr/bin:/bin",
    } <= set(seen)


def test_every_command_is_a_shell_command(cluster: dict[str, Any]) -> None:
    for line in (line for key in COMMAND_LISTS for line in cluster[key]):
        subprocess.run(["bash", "-n", "-c", line], check=True)
