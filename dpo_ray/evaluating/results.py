"""The files that an evaluation leaves."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from dpo_ray.config import EvaluateConfig
from dpo_ray.evaluating.outcome import Outcome
from dpo_ray.evaluating.page import render
from dpo_ray.evaluating.sentences import verdict
from dpo_ray.evaluating.statistics import Estimate
from dpo_ray.storage import Storage


def write_results(outcome: Outcome, config: EvaluateConfig) -> str:
    """evaluation.json, completions.jsonl and evaluation.html; the path of the page."""
    storage = Storage(config.run_dir)
    lines = [json.dumps(_jsonable(row), ensure_ascii=False) for row in completion_rows(outcome)]
    storage.write_text("completions.jsonl", "\n".join(lines) + "\n")
    storage.write_text("evaluation.json", json.dumps(_jsonable(findings(outcome, config)), indent=2) + "\n")
    storage.write_text("evaluation.html", render(outcome, config))
    return f"{storage.root}/evaluation.html"


def findings(outcome: Outcome, config: EvaluateConfig) -> dict[str, Any]:
    return {
        "policies": [
            {**asdict(each), "degenerate_share": each.degenerate_share} for each in outcome.measures
        ],
        "comparisons": [{"verdict": verdict(each), **asdict(each)} for each in outcome.comparisons],
        "judge": {"name": outcome.judge, **asdict(outcome.bill)},
        "prompts": len(outcome.prompts),
        "notes": outcome.notes,
        "settings": config.model_dump(mode="json"),
    }


def completion_rows(outcome: Outcome) -> Iterator[dict[str, Any]]:
    """One row per sample; `reward` is of a judge that rates, `win_share` of one that only compares."""
    for policy, samples in outcome.samples.items():
        rewards, shares = outcome.rewards(policy), outcome.win_shares(policy)
        for sample in samples:
            place, completion = (sample.prompt, sample.number), sample.completion
            yield {
                "policy": policy,
                "prompt_index": sample.prompt,
                "prompt": outcome.prompts[sample.prompt].text,
                "text": completion.text if completion else None,
                "reward": rewards.get(place),
                "win_share": shares.get(place),
                "policy_version": completion.policy_version if completion else None,
                "finish_reason": completion.finish_reason if completion else None,
                "tokens": sample.num_tokens,
                "kl": sample.kl,
                "logp_gain": sample.logp_gain,
                "flaw": sample.flaw if completion else None,
                "error": sample.error,
            }


def _jsonable(value: Any) -> Any:
    """JSON has no NaN: what could not be measured is null."""
    if isinstance(value, dict):
        return {name: _jsonable(each) for name, each in value.items()}
    if isinstance(value, Estimate):
        return _jsonable(value._asdict())
    if isinstance(value, list | tuple):
        return [_jsonable(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
