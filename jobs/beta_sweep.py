"""A sweep over beta: how far the policy goes from its start, and what that buys."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from dpo_ray.config import BetaSweepConfig, exit_with, parse_config

if TYPE_CHECKING:
    from dpo_ray.run_folder import RunFolder
    from dpo_ray.train import TrainerGroup
    from dpo_ray.types import Prompt

_TRIAL_BYTES = 1 << 30
"""A trial reserves only memory: its work is done by training workers, which reserve their own."""


def main(config: BetaSweepConfig) -> None:
    """One run per beta under Ray Tune, then a table and a plot; runs that are done are not done again."""
    from ray import tune

    from dpo_ray.judges import check_judges
    from dpo_ray.machines import connect
    from dpo_ray.storage import Storage
    from dpo_ray.sweep import SayTrials, sweep_table, write_sweep
    from dpo_ray.terminal import Terminal

    terminal = Terminal()
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Ray Tune has a banner that `verbose=0` leaves on.
    connect()
    try:
        check_judges(config.judge)
    except ValueError as error:
        exit_with(str(error))
    terminal.say(f"{len(config.betas)} runs below {config.run_dir}, {config.runs_at_once} at a time")
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(try_beta, config=config), {"memory": _TRIAL_BYTES}),
        param_space={"beta": tune.grid_search(list(config.betas))},
        tune_config=tune.TuneConfig(max_concurrent_trials=config.runs_at_once),
        run_config=tune.RunConfig(
            name="ray_tune",
            storage_path=Storage(config.run_dir).root,
            callbacks=[SayTrials()],
            verbose=0,
        ),
    )
    results = tuner.fit()
    for error in results.errors:
        exit_with(str(error), code=1)
    rows = sorted((dict(r.metrics or {}) for r in results), key=lambda row: row["beta"])
    terminal.console.print(sweep_table(rows))
    plot = write_sweep(Storage(config.run_dir), rows, start_reward=rows[0]["start/reward_mean"])
    terminal.say(f"plot: {plot}")


def try_beta(params: dict[str, Any], config: BetaSweepConfig) -> None:
    """One run, its last version and its start evaluated on held-out prompts."""
    from ray import tune

    from dpo_ray.offline import train_offline
    from dpo_ray.terminal import Terminal
    from jobs.offline_dpo import read_pairs

    beta = params["beta"]
    loss = config.training.loss.model_copy(update={"beta": beta})
    training = config.training.model_copy(update={"loss": loss})
    run = config.model_copy(update={"training": training, "run_dir": f"{config.run_dir}/beta_{beta:g}"})
    trainers, folder = train_offline(run, lambda model: read_pairs(run, model), Terminal())
    try:
        prompts = held_out_prompts(run, folder)
        start = evaluate(run, trainers, 0, prompts)
        version = folder.registry.live() or 0
        measured = {**folder.rows()[-1], **evaluate(run, trainers, version, prompts)}
    finally:
        trainers.close()
    named = {name: value for name, value in measured.items() if "/" in name}
    tune.report({"beta": beta, **named, "start/reward_mean": start["eval/reward_mean"]})


def held_out_prompts(config: BetaSweepConfig, folder: RunFolder) -> list[Prompt]:
    """The same prompts for every beta."""
    from dpo_ray.models import load_context_length, load_tokenizer
    from dpo_ray.prompts import load_prompts, split_prompts

    start = folder.registry.fetch(0)
    prompt_set = load_prompts(
        config.prompts,
        split=config.prompts_split,
        column=config.prompts_column,
        tokenizer=load_tokenizer(start),
        max_tokens=load_context_length(start) - config.max_new_tokens,
    )
    return list(split_prompts(prompt_set.prompts, held_out=config.evaluation.prompts, seed=config.seed)[1])


def evaluate(
    config: BetaSweepConfig, trainers: TrainerGroup, version: int, prompts: list[Prompt]
) -> dict[str, float]:
    """Reward, length and KL to the start of one version."""
    from dpo_ray.desk import SamplePolicy
    from dpo_ray.evaluation import evaluated, summary
    from dpo_ray.judges import require_judged
    from dpo_ray.judges.actor import JudgeActor

    per_prompt = config.evaluation.samples_per_prompt
    completions, start_logps = trainers.run(
        SamplePolicy(version, tuple(prompts), per_prompt, config.max_new_tokens, config.seed)
    )
    scored = JudgeActor(config.judge, config.run_dir).judge(completions)
    require_judged(scored, config.judge)
    return summary(evaluated(scored, start_logps, per_prompt=per_prompt))


if __name__ == "__main__":
    main(parse_config(BetaSweepConfig, sys.argv[1:]))
