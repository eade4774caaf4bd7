"""Two or more policies on the same prompts, by one judge: who is better, and how sure that is."""

from __future__ import annotations

import sys

from dpo_ray.config import EvaluateConfig, exit_with, parse_config


def main(config: EvaluateConfig) -> None:
    """Sample, judge, compare; then tables, and files in `config.run_dir`."""
    from dpo_ray.evaluating import sentences
    from dpo_ray.evaluating.endpoint import EndpointError
    from dpo_ray.evaluating.outcome import evaluate
    from dpo_ray.evaluating.results import write_results
    from dpo_ray.evaluating.tables import findings_table
    from dpo_ray.judges import JudgeError
    from dpo_ray.terminal import Terminal

    terminal = Terminal()
    try:
        outcome = evaluate(config, terminal)
    except (JudgeError, EndpointError) as error:
        exit_with(str(error), code=1)
    except (ValueError, FileNotFoundError) as error:
        exit_with(str(error))
    terminal.console.print(findings_table(outcome))
    for comparison in outcome.comparisons:
        terminal.say(sentences.verdict(comparison))
    errors = [line for each in outcome.measures for line in sentences.errors(each.policy, each.errors)]
    for note in (*outcome.notes, *errors):
        terminal.say(note)
    terminal.say(f"judge {outcome.judge}: {sentences.judged(outcome.bill)}")
    terminal.say(f"side by side: {write_results(outcome, config)}")


if __name__ == "__main__":
    main(parse_config(EvaluateConfig, sys.argv[1:]))
