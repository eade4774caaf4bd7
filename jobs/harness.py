"""lm-evaluation-harness on versions of a run, before and after DPO: one table."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dpo_ray.config import HarnessConfig, exit_with, parse_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dpo_ray.storage import Storage
    from dpo_ray.terminal import Terminal


def main(config: HarnessConfig) -> None:
    """Ask each version that was not asked yet, and show what all of them scored."""
    from dpo_ray.evaluating.harness import HarnessError, check_installed, find_versions, kept, scores_table
    from dpo_ray.evaluating.served_copy import ServeError
    from dpo_ray.storage import Storage
    from dpo_ray.terminal import Terminal

    terminal, run = Terminal(), Storage(config.run_dir)
    try:
        check_installed()
        versions = find_versions(config)
        ask_versions(config, run, [each for each in versions if kept(run, config, each) is None], terminal)
    except (HarnessError, ServeError) as error:
        exit_with(str(error), code=1)
    except ValueError as error:
        exit_with(str(error))
    scores = {version: kept(run, config, version) or {} for version in versions}
    terminal.console.print(scores_table(scores))


def ask_versions(config: HarnessConfig, run: Storage, versions: Sequence[int], terminal: Terminal) -> None:
    """Keep the scores of each of them."""
    from dpo_ray.evaluating.harness import keep, run_tasks
    from dpo_ray.registry import PolicyRegistry

    if not versions:
        return
    with answering(config, run, versions, terminal) as url_of:
        for version in versions:
            with terminal.phase("evaluate", f"{', '.join(config.tasks)} by version {version}"):
                folder = PolicyRegistry(run).fetch(version)
                keep(run, config, version, run_tasks(config, version, url_of(version), folder))


@contextmanager
def answering(
    config: HarnessConfig, run: Storage, versions: Sequence[int], terminal: Terminal
) -> Iterator[Callable[[int], str]]:
    """Says where a version answers: at the url of the settings, or in a copy of the run."""
    from dpo_ray.evaluating.harness import check_loaded
    from dpo_ray.evaluating.served_copy import served_copy

    if config.url:
        check_loaded(config, versions)
        yield lambda version: config.url
        return
    terminal.say("a copy of the run is served, which takes a minute; what is live stays live")
    with served_copy(run, versions) as url_of:
        yield url_of


if __name__ == "__main__":
    main(parse_config(HarnessConfig, sys.argv[1:]))
