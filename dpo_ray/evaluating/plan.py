"""What all policies are asked, and who judges it: as the settings say, else as the first run has it."""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from dpo_ray.config import (
    LIVE,
    EvaluateConfig,
    EvaluationConfig,
    JudgeConfig,
    SamplingConfig,
    check_judge_reads,
)
from dpo_ray.evaluating.policies import LocalPolicy, PolicyName, RunVersion
from dpo_ray.models import load_context_length, load_tokenizer
from dpo_ray.prompts import load_prompts, prompt_ids, split_prompts
from dpo_ray.registry import PolicyRegistry
from dpo_ray.run import longest_prompt
from dpo_ray.storage import Storage
from dpo_ray.types import Prompt

_MAX_NEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Plan:
    """The same for all policies."""

    prompts: list[Prompt]
    token_ids: dict[str, list[tuple[int, ...]]]
    """Of each local policy by name: the prompts as its own tokenizer writes them."""
    judge: JudgeConfig
    max_new_tokens: int
    dropped: int
    """Prompts that a local policy's context has no room for."""


@dataclass(frozen=True, slots=True)
class _Run:
    """A run's folder and its settings."""

    storage: Storage
    settings: dict[str, Any]


def make_plan(config: EvaluateConfig, names: Sequence[PolicyName], local: Sequence[LocalPolicy]) -> Plan:
    """ValueError: prompts or judge are missing, or cannot be used."""
    run = _first_run(names)
    tokenizers = {policy.name: load_tokenizer(policy.source) for policy in local}
    prompts = _read_prompts(config, run, next(iter(tokenizers.values()), None))
    judge = _judge(config, run)
    max_new_tokens = config.max_new_tokens or _sampling(run).max_new_tokens
    rooms = {policy.name: load_context_length(policy.source) - max_new_tokens for policy in local}
    fitting = [prompt for prompt in prompts if _fits(prompt, tokenizers, rooms)]
    if not fitting:
        raise ValueError(
            f"no prompts left: none of {len(prompts)} leaves room for max_new_tokens={max_new_tokens} in the "
            f"shortest context, which has room for {min(rooms.values())} tokens of prompt: lower it"
        )
    drawn = random.Random(config.seed).sample(fitting, min(config.max_prompts, len(fitting)))
    token_ids = {name: [_own_ids(prompt, own) for prompt in drawn] for name, own in tokenizers.items()}
    return Plan(drawn, token_ids, judge, max_new_tokens, len(prompts) - len(fitting))


def _first_run(names: Sequence[PolicyName]) -> _Run | None:
    for name in names:
        if isinstance(name, RunVersion):
            storage = Storage(name.run_dir)
            if storage.exists("config.yaml"):
                return _Run(storage, yaml.safe_load(storage.read_text("config.yaml")))
    return None


def _sampling(run: _Run | None) -> SamplingConfig:
    settings = run.settings.get("sampling") if run else None
    return SamplingConfig(**settings) if settings else SamplingConfig(max_new_tokens=_MAX_NEW_TOKENS)


def _judge(config: EvaluateConfig, run: _Run | None) -> JudgeConfig:
    settings = run.settings if run and "judge" not in config.model_fields_set else {}
    judge = JudgeConfig.model_validate(settings["judge"]) if "judge" in settings else config.judge
    check_judge_reads(judge, config.prompts or (run.settings.get("prompts", "") if run else ""))
    if any(term.url == LIVE for term in judge.terms):
        raise ValueError(f"judge.url={LIVE}: here no policy is live: give the URL of an endpoint")
    return judge.model_copy(update={"actors": 1})  # All of the budget is this process's.


def _read_prompts(
    config: EvaluateConfig, run: _Run | None, tokenizer: PreTrainedTokenizerBase | None
) -> list[Prompt]:
    """Distinct ones, with the tokens of the first local policy."""
    if config.prompts:
        prompt_set = load_prompts(
            config.prompts,
            split=config.prompts_split,
            column=config.prompts_column,
            tokenizer=tokenizer,
            max_tokens=sys.maxsize,
        )
        prompts = prompt_set.prompts
    else:
        prompts = _held_out(run)
    asked = [_as_asked(prompt, config) for prompt in prompts]
    known = {str(prompt.text): replace(prompt, token_ids=_own_ids(prompt, tokenizer)) for prompt in asked}
    return list(known.values())


def _held_out(run: _Run | None) -> tuple[Prompt, ...]:
    """What the run evaluates its versions on, and never trains on."""
    if run is None or "prompts" not in run.settings:
        raise ValueError(
            "prompts is unset, and the first run among the policies holds none out: "
            "give a file with --prompts"
        )
    settings, start = run.settings, PolicyRegistry(run.storage).fetch(0)
    evaluation = EvaluationConfig(**settings.get("evaluation", {}))
    prompt_set = load_prompts(
        settings["prompts"],
        split=settings["prompts_split"],
        column=settings["prompts_column"],
        tokenizer=load_tokenizer(start),
        max_tokens=longest_prompt(start, _sampling(run), settings.get("max_prompt_tokens")),
    )
    return split_prompts(prompt_set.prompts, held_out=evaluation.prompts, seed=settings["seed"])[1]


def _as_asked(prompt: Prompt, config: EvaluateConfig) -> Prompt:
    if config.text_prompts == "continue" or not isinstance(prompt.text, str):
        return prompt
    return replace(prompt, text=[{"role": "user", "content": prompt.text}])


def _own_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    return prompt_ids(prompt.text, tokenizer, prompt.fields)


def _fits(prompt: Prompt, tokenizers: dict[str, PreTrainedTokenizerBase], rooms: dict[str, int]) -> bool:
    return all(len(_own_ids(prompt, own)) <= rooms[name] for name, own in tokenizers.items())
