"""A run's folder: what is done, what is left, and what the rounds leave behind."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from dpo_ray.config import IterativeDPOConfig, JobConfig
from dpo_ray.evaluation import read_evaluation, summary, win_rate
from dpo_ray.gate import Verdict
from dpo_ray.judges.function import load_judge
from dpo_ray.metrics import read_steps
from dpo_ray.models import load_context_length, load_model, load_tokenizer, make_canaries, save_policy
from dpo_ray.prompts import load_prompts, round_prompts, split_prompts
from dpo_ray.registry import PolicyManifest, PolicyRegistry
from dpo_ray.report import write_report
from dpo_ray.starter import make_starter
from dpo_ray.storage import Storage
from dpo_ray.terminal import Terminal
from dpo_ray.types import Prompt, ScoredCompletion

_SCORED = TypeAdapter(ScoredCompletion)
_CHANGEABLE = ("rounds", "serving", "tensorboard", "cluster", "run_dir")
"""Settings that a run may go on with when they have changed."""


class Run:
    """Opened again after a crash, it says what is left: every phase leaves a file when it is done."""

    def __init__(self, config: IterativeDPOConfig, prompts: Sequence[Prompt]) -> None:
        self.config = config
        self.storage = Storage(config.run_dir)
        self.registry = PolicyRegistry(self.storage)
        self._training_prompts, held_out = split_prompts(
            prompts, held_out=config.evaluation.prompts, seed=config.seed
        )
        self.held_out = list(held_out)
        self._keep_config()

    def remaining_rounds(self) -> range:
        """The rounds that are not finished."""
        finished = sum(row["kind"] == "round" for row in self.rows())
        return range(finished, self.config.rounds)

    def rows(self) -> list[dict[str, Any]]:
        """All of metrics.jsonl."""
        if not self.storage.exists("metrics.jsonl"):
            return []
        return [json.loads(line) for line in self.storage.read_text("metrics.jsonl").splitlines()]

    def prompts(self, round_: int) -> list[Prompt]:
        """What the policy is sampled with in a round."""
        num = self.config.sampling.prompts_per_round
        return round_prompts(self._training_prompts, round_=round_, num=num, seed=self.config.seed)

    def canary_sequences(self) -> tuple[tuple[int, ...], ...]:
        """Fixed token sequences that every pushed version is proven with."""
        longest = 64
        prompts = [prompt.token_ids[-longest:] for prompt in self.held_out[:4]]
        # A one-token prompt says nothing of the weights: it is read several times over.
        return tuple((ids * 8)[: max(8, len(ids))] for ids in prompts)

    def scored(self, round_: int) -> list[ScoredCompletion] | None:
        """The round's scored completions; None before they are kept."""
        if not self.storage.exists(_samples_file(round_)):
            return None
        # Lines of bytes: those of text also end at separators that JSON allows inside of strings.
        lines = self.storage.read_bytes(_samples_file(round_)).splitlines()
        return [_SCORED.validate_json(line) for line in lines]

    def keep_scored(self, round_: int, scored: list[ScoredCompletion]) -> list[ScoredCompletion]:
        """Keep them: after a crash the round goes on with the same ones."""
        lines = [_SCORED.dump_json(item).decode() for item in scored]
        self.storage.write_text(_samples_file(round_), "\n".join(lines) + "\n")
        return scored

    def start(self) -> None:
        """Write down how version 0 does, once."""
        if not self.rows():
            row = {
                "kind": "start",
                "round": -1,
                "step": 0,
                "policy_version": 0,
                **self._evaluation_metrics(0),
            }
            self._write_rows([row])

    def finish(self, round_: int, metrics: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
        """Write the round's row and the report: from here on, the round is done."""
        live = self.registry.live()
        assert live is not None
        steps = read_steps(self.storage, round_)
        row = {
            "kind": "round",
            "round": round_,
            "step": int(steps[-1]["step"]) if steps else 0,
            "policy_version": live,
            **metrics,
            **self._evaluation_metrics(live),
            "gate/passed": verdict.passed,
            "gate/reason": verdict.reason,
        }
        step_rows = [
            {"kind": "step", "round": round_, "policy_version": row["sample_version"], **s} for s in steps
        ]
        self._write_rows([*self.rows(), *step_rows, row])
        self._log_tensorboard([*step_rows, row])
        write_report(self.config.run_dir)
        return row

    def _evaluation_metrics(self, version: int) -> dict[str, float]:
        evaluation, start = read_evaluation(self.storage, version), read_evaluation(self.storage, 0)
        assert evaluation is not None and start is not None
        parent = self.registry.manifest(version).parent
        previous = read_evaluation(self.storage, parent) if parent is not None else None
        return {
            **summary(evaluation),
            "win_rate/vs_start": win_rate(evaluation, start),
            "win_rate/vs_previous": win_rate(evaluation, previous or start),
        }

    def _write_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        lines = [json.dumps({name: _jsonable(value) for name, value in row.items()}) for row in rows]
        self.storage.write_text("metrics.jsonl", "\n".join(lines) + "\n")

    def _log_tensorboard(self, rows: Sequence[dict[str, Any]]) -> None:
        if not self.config.tensorboard or self.storage.local_root is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.storage.local_root / "tensorboard")) as writer:
            for row in rows:
                for name, value in row.items():
                    if isinstance(value, float):
                        writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def _keep_config(self) -> None:
        """Write the resolved config; ValueError where the folder holds a run with another one."""
        ours = self.config.model_dump(mode="json")
        if self.storage.exists("config.yaml"):
            theirs = yaml.safe_load(self.storage.read_text("config.yaml"))
            changed = [k for k in ours if k not in _CHANGEABLE and ours[k] != theirs.get(k)]
            if changed:
                differences = "; ".join(f"{k}: {theirs.get(k)} there, {ours[k]} now" for k in changed)
                raise ValueError(
                    f"{self.storage.root} holds a run with other settings ({differences}): "
                    "give this run another --run_dir, or the settings of that one"
                )
        self.storage.write_text("config.yaml", yaml.safe_dump(ours, sort_keys=False))


def open_run(config: IterativeDPOConfig, terminal: Terminal) -> Run:
    """The run of `config.run_dir`, with version 0 published and live.

    ValueError: model, prompts or judge cannot be used, or the folder holds another run.
    """
    load_judge(config.judge.function)
    registry = PolicyRegistry(Storage(config.run_dir))
    folder = registry.fetch(0) if registry.has(0) else starting_model(config, terminal)
    run = Run(config, _load_prompts(config, folder, terminal))
    if not registry.has(0):
        with terminal.phase("start", "publish version 0"), tempfile.TemporaryDirectory() as copy:
            model = load_model(folder)
            save_policy(model, load_tokenizer(folder), Path(copy))
            canaries = make_canaries(model, run.canary_sequences())
            registry.publish(Path(copy), PolicyManifest(version=0, canaries=canaries))
    if registry.live() is None:
        registry.promote(0)
    return run


def starting_model(config: JobConfig, terminal: Terminal) -> Path | str:
    """The folder or hub name of the policy that a job starts from."""
    if config.model != "film_reviews":
        return config.model
    with terminal.phase("start", "make the tiny starting model (once, then cached)") as on_progress:
        return make_starter(config.seed, lambda step, total, loss: on_progress(step, total))


def _load_prompts(config: IterativeDPOConfig, folder: Path | str, terminal: Terminal) -> Sequence[Prompt]:
    tokenizer, longest = load_tokenizer(folder), load_context_length(folder)
    context = min(longest, config.sampling.max_model_len or longest)
    room = context - config.sampling.max_new_tokens
    if room < 1:
        raise ValueError(
            f"sampling.max_new_tokens={config.sampling.max_new_tokens} leaves no room for a prompt "
            f"in a context of {context} tokens: lower it"
        )
    prompt_set = load_prompts(
        config.prompts,
        split=config.prompts_split,
        column=config.prompts_column,
        tokenizer=tokenizer,
        max_tokens=min(room, config.max_prompt_tokens or room),
    )
    dropped = {"too long": prompt_set.dropped_too_long, "empty": prompt_set.dropped_empty}
    for reason, count in dropped.items():
        if count:
            terminal.say(f"{count} prompts were dropped: {reason}")
    return prompt_set.prompts


def _jsonable(value: Any) -> Any:
    """JSON has no NaN: what could not be measured is null."""
    return None if isinstance(value, float) and value != value else value


def _samples_file(round_: int) -> str:
    return f"rounds/{round_:05d}/samples.jsonl"
