"""A run's folder: its settings, and the metrics of its finished rounds."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from dpo_ray.config import JobConfig
from dpo_ray.metrics import read_steps
from dpo_ray.registry import PolicyRegistry
from dpo_ray.run_warnings import RunWarning, reasons_to
from dpo_ray.storage import Storage

PAUSED = "PAUSED"
"""While it is there, no round begins; it says why."""
_CHANGEABLE = (
    *("rounds", "gate", "warnings", "serving", "votes", "tensorboard", "cluster", "run_dir", "judge.budget"),
)
"""Settings that may change when a run goes on."""


class RunFolder:
    """Opening it writes the resolved settings; ValueError where it holds a run with other ones."""

    def __init__(self, config: JobConfig) -> None:
        self.storage = Storage(config.run_dir)
        self.registry = PolicyRegistry(self.storage)
        self._config = config
        self._keep_config()

    def rows(self) -> list[dict[str, Any]]:
        """All of metrics.jsonl."""
        if not self.storage.exists("metrics.jsonl"):
            return []
        return [json.loads(line) for line in self.storage.read_text("metrics.jsonl").splitlines()]

    def write_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replace metrics.jsonl: object stores cannot append."""
        lines = [json.dumps({name: _jsonable(value) for name, value in row.items()}) for row in rows]
        self.storage.write_text("metrics.jsonl", "\n".join(lines) + "\n")

    def finished_rounds(self) -> int:
        return sum(row["kind"] == "round" for row in self.rows())

    def finish_round(
        self, round_: int, version: int, metrics: dict[str, Any], warnings: Sequence[RunWarning] = ()
    ) -> dict[str, Any]:
        """Write the rows of the round's steps and of the round itself, which is done by that."""
        steps = read_steps(self.storage, round_)
        last = int(steps[-1]["step"]) if steps else 0
        row = {"kind": "round", "round": round_, "step": last, "policy_version": version, **metrics}
        row["warnings"] = [asdict(warning) for warning in warnings]
        parent = self.registry.manifest(round_ + 1).parent
        step_rows = [{"kind": "step", "round": round_, "policy_version": parent, **step} for step in steps]
        if reasons := reasons_to("pause", warnings):
            self.storage.write_text(PAUSED, f"{reasons}\n")
        self.write_rows([*self.rows(), *step_rows, row])
        self._log_tensorboard([*step_rows, row])
        return row

    def wait_while_paused(self, say: Callable[[str], None], *, poll_s: float = 2.0) -> None:
        """Return when nobody wants the run to wait; a job that is started again waits too."""
        if not self.storage.exists(PAUSED):
            return
        reasons, root = self.storage.read_text(PAUSED).strip(), self.storage.root
        say(f"paused: {reasons}")
        say(f"python -m dpo_ray.report {root} shows the run so far; delete {root}/{PAUSED} to go on")
        while self.storage.exists(PAUSED):
            time.sleep(poll_s)

    def _log_tensorboard(self, rows: Sequence[dict[str, Any]]) -> None:
        if not self._config.tensorboard or self.storage.local_root is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.storage.local_root / "tensorboard")) as writer:
            for row in rows:
                for name, value in row.items():
                    if isinstance(value, float):
                        writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])
                for warning in row.get("warnings", []):
                    writer.add_text(f"warnings/{warning['name']}", warning["message"], row["step"])

    def _keep_config(self) -> None:
        ours = self._config.model_dump(mode="json")
        if self.storage.exists("config.yaml"):
            theirs = yaml.safe_load(self.storage.read_text("config.yaml"))
            changed = _changes(theirs, ours)
            if changed:
                differences = "; ".join(changed)
                raise ValueError(
                    f"{self.storage.root} holds a run with other settings ({differences}): "
                    "give this run another --run_dir, or the settings of that one"
                )
        self.storage.write_text("config.yaml", yaml.safe_dump(ours, sort_keys=False))


def _changes(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> list[str]:
    """`name: value there, value now` of each setting that differs and may not."""
    changes = []
    for name, value in ours.items():
        there = theirs.get(name)
        if f"{prefix}{name}" in _CHANGEABLE:
            continue
        if isinstance(value, dict) and isinstance(there, dict):
            changes += _changes(there, value, f"{prefix}{name}.")
        elif value != there:
            changes.append(f"{prefix}{name}: {there} there, {value} now")
    return changes


def _jsonable(value: Any) -> Any:
    """JSON has no NaN: what could not be measured is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
