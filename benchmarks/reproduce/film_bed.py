"""A tiny policy of film reviews behind the real sampler, a real buffer, and what its answers say of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, get_args

import ray
import torch
from ray import serve

from benchmarks.reproduce.film_labels import certain
from benchmarks.reproduce.preferences import Labels, labelled_pairs
from dpo_ray.buffer import SnapshotQuery
from dpo_ray.buffer_actor import buffer_actor
from dpo_ray.config import IterativeDPOConfig, TrainingConfig, parse_config
from dpo_ray.desk import EvaluatePairs, ScoreWithStart, TrainerDesk
from dpo_ray.evaluation import mean
from dpo_ray.judges.function import judge_completions
from dpo_ray.machines import connect
from dpo_ray.parallel import Peers
from dpo_ray.run import open_run
from dpo_ray.sampler import Sampler
from dpo_ray.starter import make_starter
from dpo_ray.terminal import Terminal
from dpo_ray.train import TrainWorker
from dpo_ray.types import Completion, Pair, Prompt, ScoredCompletion, TokenSequence
from serve.deployment import deploy, wait_until_serving
from serve.settings import ReplicaSettings

ROOT = Path(__file__).resolve().parents[2]
PER_PROMPT = 4
HELD_OUT = 96
"""Openings that are answered when a version is measured, each by `PER_PROMPT` completions."""
PAIRS = 640
"""Of one kind of labels: 40 steps of 16."""


class Bed:
    """One seed's live policy, preference buffer and run folder."""

    def __init__(self, seed: int) -> None:
        start = make_starter(0, lambda step, total, loss: None)
        settings = {
            "--model": str(start),
            "--run_dir": str(ROOT / f"runs/reproduce/sentiment_{seed}"),
            "--seed": seed,
            "--serving.port": 8131,
            "--sampling.prompts_per_round": 224,
            "--evaluation.prompts": HELD_OUT,
        }
        arguments = [str(each) for setting in settings.items() for each in setting]
        self.config = parse_config(IterativeDPOConfig, arguments)
        self.run = open_run(self.config, Terminal())
        connect()
        application = deploy(self.config.run_dir, ReplicaSettings(self.config.sampling, self.config.serving))
        wait_until_serving(application)
        self._sampler = Sampler(serve.get_app_handle(application), replicas=1)
        self._buffer: Any = buffer_actor(self.run.storage, self.config.buffer)

    def push(self, version: int) -> None:
        self.run.registry.promote(version)
        self._sampler.push(version)

    def sample(self, prompts: Sequence[Prompt], *, per_prompt: int, seed: str) -> list[ScoredCompletion]:
        """Completions of the live policy with their true rewards."""
        sampling = self.config.sampling
        params = {"n": per_prompt, "temperature": 1.0, "max_tokens": sampling.max_new_tokens}
        completions = self._sampler.sample(prompts, params, seed=f"{self.config.seed} {seed}")
        return judge_completions(certain, "certain", completions)

    def fill_buffer(self) -> int:
        """Put the same pairs of the start's completions with both kinds of labels; how many differ."""
        self.push(0)
        scored = self.sample(self.run.prompts(0), per_prompt=PER_PROMPT, seed="pairs")
        alike = [labelled_pairs(scored, labels, per_prompt=PER_PROMPT, seed=0) for labels in get_args(Labels)]
        chosen = Random(self.config.seed).sample(range(len(alike[0])), PAIRS)
        for labels, pairs in zip(get_args(Labels), alike, strict=True):
            ray.get(self._buffer.put.remote([replace(pairs[place], source=labels) for place in chosen]))
        return sum(alike[0][place].chosen_ids != alike[1][place].chosen_ids for place in chosen)

    def worker(self, training: TrainingConfig) -> TrainWorker:
        """What Ray Train runs in each of its processes, here in this one: a group would start slowly."""
        torch.set_num_threads(1)
        desk = ray.remote(num_cpus=0)(TrainerDesk).remote()
        return TrainWorker(self.run.storage, training, Peers(), desk)

    def declare(self, round_: int, labels: Labels) -> None:
        """The snapshot of a round: all pairs with these labels."""
        query = SnapshotQuery(
            max_round=round_,
            min_policy_version=0,
            limit=PAIRS,
            seed=self.config.seed,
            mix={name: float(name == labels) for name in get_args(Labels)},
        )
        ray.get(self._buffer.declare_snapshot.remote(query, live_version=0, retention_rounds=None))


def evaluate(bed: Bed, worker: TrainWorker, version: int) -> dict[str, float]:
    """Reward, and KL to the start both ways: added up over whole distributions, and of the tokens alone."""
    scored = bed.sample(bed.run.held_out, per_prompt=PER_PROMPT, seed=str(version))
    completions = [item.completion for item in scored]
    kl = worker.do(EvaluatePairs(version, tuple(as_pairs(completions))))["kl/reference"]
    sequences = tuple(TokenSequence(c.prompt.token_ids, c.token_ids) for c in completions)
    start_logps = worker.do(ScoreWithStart(sequences))
    return {
        "reward": mean(rewards_of(scored)),
        "kl": kl,
        "kl_of_tokens": mean([c.logp - logp for c, logp in zip(completions, start_logps, strict=True)]),
        "grammatical": mean([item.judgement.metrics["grammatical"] for item in scored]),
    }


def rewards_of(scored: Sequence[ScoredCompletion]) -> list[float]:
    return [item.judgement.reward or 0.0 for item in scored]


def as_pairs(completions: Sequence[Completion]) -> list[Pair]:
    """Every completion once as the chosen side: that of which the learner adds up the KL."""
    others = [*completions[1:], completions[0]]
    return [
        Pair(one.prompt.text, one.text, other.text, one.prompt.token_ids, one.token_ids, other.token_ids)
        for one, other in zip(completions, others, strict=True)
    ]
