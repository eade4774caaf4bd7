"""Iterative DPO: sample, judge, pair, train, push, round after round."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from dpo_ray.config import IterativeDPOConfig, exit_with, parse_config

if TYPE_CHECKING:
    from dpo_ray.cluster import Cluster
    from dpo_ray.gate import Verdict
    from dpo_ray.run import Run
    from dpo_ray.terminal import Terminal


def improve(run: Run, cluster: Cluster, terminal: Terminal) -> None:
    """Improve the policy round by round; started again after a crash, go on."""
    from dpo_ray.gate import GateError, judge_candidate, judge_warnings
    from dpo_ray.metrics import pair_metrics, sample_metrics
    from dpo_ray.run_warnings import require_no_stop

    cluster.evaluate(run.live(), run.held_out)
    run.start()
    for round_ in run.remaining_rounds():
        run.folder.wait_while_paused(terminal.say)
        terminal.start_round()
        scored = run.scored(round_)
        if scored is None:
            completions = cluster.sample(run.prompts(round_), round_=round_)
            scored = run.keep_scored(round_, cluster.judge(completions))
        made = run.make_pairs(round_, scored)
        cluster.put(made.pairs)
        snapshot = cluster.declare_snapshot(round_)
        counts = run.count_pairs(made, snapshot)
        candidate = cluster.train(snapshot, run.parent(), run.canary_sequences())
        verdict = judge_candidate(candidate, run.config.gate)
        if verdict.passed and run.is_push_due(round_):
            verdict = try_out(candidate.version, run, cluster)
        measured = {**sample_metrics(scored), **pair_metrics(counts, snapshot)}
        warnings = run.warnings(candidate.version, measured)
        verdict = judge_warnings(verdict, warnings)
        if not verdict.passed:
            cluster.reject(candidate.version, reason=verdict.reason)
        cluster.evaluate(run.live(), run.held_out)  # Another one than before where a person has moved LIVE.
        metrics = {**measured, **terminal.seconds()}
        row = run.finish(round_, metrics, verdict, warnings)  # Until this line, all can be redone.
        terminal.round_line(row)
        require_no_stop(warnings)
        if not verdict.passed and run.config.gate.on_failure == "stop":
            raise GateError(
                f"the gate refused version {candidate.version}: {verdict.reason}. gate.on_failure is stop: "
                f"started again, the job goes on from version {run.live()}"
            )


def try_out(version: int, run: Run, cluster: Cluster) -> Verdict:
    """Evaluate a candidate by what it answers, and promote it if it keeps the gate's bounds."""
    from dpo_ray.gate import Verdict
    from dpo_ray.sampler import RefusedError

    try:
        cluster.show(version)
        cluster.evaluate(version, run.held_out)
        verdict = run.verdict(version, cluster.votes(version))
        if verdict.passed:
            cluster.promote(version)
        return verdict
    except RefusedError as refusal:
        return Verdict(False, str(refusal))


def start_cluster(config: IterativeDPOConfig, terminal: Terminal) -> Cluster:
    """Ray, the live policy, judges, buffer and trainers. ValueError: they cannot start like this."""
    from ray import serve

    from dpo_ray.cluster import Cluster
    from dpo_ray.machines import all_bundles, connect, wait_for_resources
    from serve.deployment import deploy, http_address, wait_until_serving
    from serve.settings import ReplicaSettings

    connect()
    wait_for_resources(all_bundles(config), timeout_s=config.cluster.wait_for_resources_s)
    with terminal.phase("start", "start sampler, judges, buffer and trainers"):
        settings = ReplicaSettings(config.sampling, config.serving, config.votes, config.buffer)
        application = deploy(config.run_dir, settings)
        live_url = f"{http_address()}/v1"
        cluster = Cluster(config, serve.get_app_handle(application), terminal, live_url=live_url)
        wait_until_serving(application)
    terminal.say(f"run {config.run_dir} · live policy on {live_url}")
    return cluster


def main(config: IterativeDPOConfig) -> None:
    """Do the rounds that are left, and show what came of all."""
    from dpo_ray.buffer import StoreError
    from dpo_ray.gate import GateError
    from dpo_ray.judges.function import JudgeError
    from dpo_ray.learner import TrainingError
    from dpo_ray.pairing import PairingError
    from dpo_ray.report import write_report
    from dpo_ray.run import open_run
    from dpo_ray.run_warnings import StopError
    from dpo_ray.sampler import SamplerError
    from dpo_ray.terminal import Terminal

    endings = (JudgeError, PairingError, StoreError, TrainingError, SamplerError, GateError, StopError)
    terminal = Terminal()
    try:
        run = open_run(config, terminal)
        cluster = start_cluster(config, terminal) if run.remaining_rounds() else None
    except (ValueError, FileNotFoundError) as error:
        exit_with(str(error))
    if cluster is not None:
        try:
            improve(run, cluster, terminal)
        except endings as error:
            exit_with(str(error), code=1)
        finally:
            cluster.close()
    terminal.round_table([row for row in run.folder.rows() if row["kind"] == "round"])
    terminal.say(f"report: {write_report(config.run_dir)}")


if __name__ == "__main__":
    main(parse_config(IterativeDPOConfig, sys.argv[1:]))
