"""What each job can be told."""

from pathlib import Path
from typing import ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from dpo_ray.config.buffer import BufferConfig
from dpo_ray.config.judge import LIVE, JudgeConfig
from dpo_ray.config.loss import LossConfig, UnpairedLoss
from dpo_ray.config.pairing import PairingConfig
from dpo_ray.config.sections import (
    ClusterConfig,
    EvaluationConfig,
    GateConfig,
    SamplingConfig,
    ServingConfig,
)
from dpo_ray.config.settings import CONFIGS, Settings
from dpo_ray.config.training import TrainingConfig
from dpo_ray.config.votes import VotesConfig
from dpo_ray.config.warnings import WarningsConfig


class JobConfig(Settings):
    """Settings that all training jobs share."""

    model: str
    """Starting policy: a Hugging Face folder or hub name."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random."""
    training: TrainingConfig = TrainingConfig()
    """How the policy is updated."""
    warnings: WarningsConfig = WarningsConfig()
    """What is looked at after each round or epoch, and what follows."""
    cluster: ClusterConfig = ClusterConfig()
    """The Ray cluster."""
    tensorboard: bool = True
    """Write TensorBoard files to the run's folder (local folders only)."""


class IterativeDPOConfig(JobConfig):
    """Iterative DPO: sample, judge, pair, train, push, for some rounds.

    --config FILE reads settings from a YAML file; without it, configs/tiny.yaml holds.
    """

    default_file: ClassVar[Path | None] = CONFIGS / "tiny.yaml"

    model: str = "film_reviews"
    """Starting policy: a Hugging Face folder or hub name; film_reviews makes a tiny one."""
    rounds: int = Field(default=6, ge=1)
    """Rounds to do; a finished run goes on where this is raised."""
    prompts: str = "film_reviews"
    """A JSONL, Parquet or CSV file, or a `datasets` name; film_reviews generates its own."""
    prompts_split: str = "train"
    """Split, where `prompts` is a `datasets` name."""
    prompts_column: str = "prompt"
    """Column of the prompts: text or lists of messages."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Prompts longer than this are dropped and counted; unset: what the model's context leaves."""
    sampling: SamplingConfig = SamplingConfig()
    """How the policy is sampled."""
    judge: JudgeConfig = JudgeConfig()
    """Who says which completion is better."""
    pairing: PairingConfig = PairingConfig()
    """How scored completions become pairs."""
    buffer: BufferConfig = BufferConfig()
    """Where pairs are kept, and which of them a round trains on."""
    votes: VotesConfig = VotesConfig()
    """Which votes of people become pairs."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured after each round."""
    gate: GateConfig = GateConfig()
    """Bounds that a trained version must keep to go live."""
    serving: ServingConfig = ServingConfig()
    """The live policy's HTTP endpoint."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_judge_reads(self.judge, self.prompts)
        served, trained = self.sampling.lora_rank, self.training.lora.rank
        if served not in (0, trained):
            raise ValueError(
                f"sampling.lora_rank is {served} and training.lora.rank {trained}: set both to one rank, or "
                "sampling.lora_rank to 0, which serves merged weights"
            )
        of_two = [term.type for term in self.training.loss.terms if term.type not in get_args(UnpairedLoss)]
        if self.pairing.rule == "unpaired" and of_two:
            raise ValueError(
                f"pairing.rule=unpaired gives single completions, and the loss {of_two[0]} compares two: "
                "set training.loss.type to kto or bco, or pairing.rule to one that pairs them"
            )
        if self.pairing.rule == "answer_vs_worst" and self.training.loss.weighting == "wpo_sampler":
            raise ValueError(
                "training.loss.weighting=wpo_sampler needs the log-probs that the sampler recorded, and the "
                "answers of pairing.rule=answer_vs_worst have none: set weighting to wpo"
            )
        if self.training.early_stopping.eval_every_steps:
            raise ValueError(
                "training.early_stopping looks at held-out pairs, which only offline jobs have: unset it, "
                "and bound each round's candidate with gate"
            )
        self._check_votes()
        return self

    def _check_votes(self) -> None:
        losses = [term.type for term in self.training.loss.terms]
        if self.votes.take_unpaired and not {*losses} <= {"kto", "bco", "sft"}:
            raise ValueError(
                f"votes.take_unpaired gives single completions, and the loss {losses[0]} compares two: "
                "set training.loss.type to kto or bco, or unset it"
            )
        if self.votes.weight_by_trust and {*losses} & {"aot", "aot_unpaired"}:
            raise ValueError("votes.weight_by_trust weighs pairs, and aot sorts them apart: unset it")


class OfflineConfig(JobConfig):
    """Settings of the jobs that train on what is there already."""

    max_length: int = Field(default=1024, ge=2)
    """Longest prompt plus completion, in tokens."""
    long_prompts: Literal["drop", "cut_start"] = "drop"
    """Beyond max_length: drop leaves a row out, cut_start takes tokens off the start of its prompt."""
    max_pairs: int | None = Field(default=None, ge=2)
    """Train on at most this many rows, drawn at random; unset: all."""
    held_out_pairs: int = Field(default=256, ge=1)
    """Rows kept apart for evaluation, during and after each epoch."""
    rounds: int = Field(default=1, ge=1)
    """Epochs: each goes once through all rows and ends with a policy version."""


class OfflineDPOConfig(OfflineConfig):
    """Offline DPO: train on preference pairs, or on single completions with a label, for some epochs."""

    pairs: str
    """A file, a folder, or a `datasets` name with preferences; film_reviews generates its own."""
    pairs_split: str = "train"
    """Split, where `pairs` is a `datasets` name."""
    read_with: Literal["memory", "ray_data"] = "memory"
    """ray_data reads and tokenizes large files and folders in parallel, on all nodes."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.training.loss.type == "sft":
            raise ValueError("training.loss.type=sft imitates and prefers nothing: run jobs/sft.py for it")
        if self.read_with == "ray_data" and self.pairs == "film_reviews":
            raise ValueError("pairs=film_reviews is no file that Ray Data reads: set read_with to memory")
        return self


class BetaSweepConfig(OfflineDPOConfig):
    """One offline run per beta, each evaluated on held-out prompts: reward, KL and accuracy side by side."""

    betas: tuple[float, ...] = (0.05, 0.1, 1.0, 5.0)
    """Values of training.loss.beta, as JSON; those of the DPO paper (arXiv:2305.18290)."""
    prompts: str = "film_reviews"
    """A file, a folder, or a `datasets` name; film_reviews generates its own."""
    prompts_split: str = "train"
    """Split, where `prompts` is a `datasets` name."""
    prompts_column: str = "prompt"
    """Column of the prompts: text or lists of messages."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest completion, in tokens."""
    runs_at_once: int = Field(default=1, ge=1)
    """Runs that train at the same time, each with training.workers processes."""
    judge: JudgeConfig = JudgeConfig()
    """Who gives completions their rewards."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is sampled of each policy."""

    @model_validator(mode="after")
    def _check_sweep(self) -> Self:
        if not self.betas or min(self.betas) <= 0 or len(set(self.betas)) < len(self.betas):
            raise ValueError(f"betas={list(self.betas)}: give different positive numbers")
        check_judge_reads(self.judge, self.prompts)
        if any(term.url == LIVE for term in self.judge.terms):
            raise ValueError(f"judge.url={LIVE}: a sweep has no live policy: give the URL of an endpoint")
        return self


class SFTConfig(OfflineConfig):
    """Supervised fine-tuning: imitate the chosen completions of preference data, answers, or plain text."""

    texts: str
    """A file, a folder, or a `datasets` name; film_reviews generates its own."""
    texts_split: str = "train"
    """Split, where `texts` is a `datasets` name."""
    training: TrainingConfig = TrainingConfig(loss=LossConfig(type="sft"), learning_rate=2e-5)
    """How the policy is updated."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        stopping = self.training.early_stopping
        if self.training.loss.type != "sft":
            raise ValueError(
                f"training.loss.type={self.training.loss.type} needs pairs: run jobs/offline_dpo.py"
            )
        if stopping.patience is not None:
            raise ValueError(
                "early_stopping.patience looks at rewards/accuracies, which needs pairs: unset it"
            )
        return self


class ServeConfig(Settings):
    """Serve the live policy of a run over HTTP, with the sampling settings that the run has."""

    serving: ServingConfig = ServingConfig()
    """The live policy's HTTP endpoint."""


class RewardModelConfig(Settings):
    """Train a reward model on preference pairs, for `--judge.kind reward_model`; saved in run_dir."""

    model: str = "film_reviews"
    """What it starts from: a Hugging Face folder or hub name; film_reviews makes a tiny one."""
    pairs: str
    """A file, a folder, or a `datasets` name with preferences; film_reviews generates its own."""
    pairs_split: str = "train"
    """Split, where `pairs` is a `datasets` name."""
    max_length: int = Field(default=1024, ge=2)
    """Longest prompt plus completion, in tokens; longer pairs are left out and counted."""
    held_out_pairs: int = Field(default=256, ge=1)
    """Pairs kept apart, on which accuracy is measured."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the other pairs."""
    batch_size: int = Field(default=32, ge=1)
    """Pairs per optimizer step."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Learning rate of the first step; it falls linearly to 0."""
    margin: float = Field(default=0.0, ge=0)
    """How far apart two rewards should be, as a multiple of the difference of the pair's own rewards."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random."""


class JudgeQualityConfig(Settings):
    """Measure judges on pairs of which people said what is better, and on themselves.

    Without pairs, on people's votes in the snapshots of run_dir; without judge settings, that run's judge.
    """

    pairs: str = ""
    """A file, a folder, or a `datasets` name with preferences; unset: the votes of people in the run."""
    pairs_split: str = "train"
    """Split, where `pairs` is a `datasets` name."""
    max_pairs: int = Field(default=200, ge=1)
    """Most pairs, drawn at random; each is asked twice."""
    seed: int = Field(default=0, ge=0)
    """Seed of what is drawn."""
    judge: JudgeConfig = JudgeConfig()
    """The judges to measure."""


def check_judge_reads(judge: JudgeConfig, prompts: str) -> None:
    """ValueError: the judge reads only prompts of another source."""
    functions = [term.function for term in judge.terms if term.kind == "function"]
    if prompts != "film_reviews" and any(name.startswith("dpo_ray.film_reviews:") for name in functions):
        raise ValueError(
            f"the judge of film reviews cannot score prompts of {prompts}: "
            "set --judge.function module:function, or another --judge.kind"
        )
