"""What each job can be told."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from dpo_ray.config.sections import (
    BufferConfig,
    ClusterConfig,
    EvaluationConfig,
    GateConfig,
    JudgeConfig,
    PairingConfig,
    SamplingConfig,
    ServingConfig,
)
from dpo_ray.config.settings import CONFIGS, Settings
from dpo_ray.config.training import TrainingConfig


class JobConfig(Settings):
    """Settings that all training jobs share."""

    model: str
    """Starting policy: a Hugging Face folder or hub name."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random."""
    training: TrainingConfig = TrainingConfig()
    """How the policy is updated."""
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
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured after each round."""
    gate: GateConfig = GateConfig()
    """Bounds that a trained version must keep to go live."""
    serving: ServingConfig = ServingConfig()
    """The live policy's HTTP endpoint."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.judge.function.startswith("dpo_ray.film_reviews:") and self.prompts != "film_reviews":
            raise ValueError(
                f"the judge of film reviews cannot score prompts of {self.prompts}: "
                "set --judge.function module:function"
            )
        loss = self.training.loss
        if loss.label_smoothing and loss.type != "sigmoid":
            raise ValueError(
                f"label_smoothing={loss.label_smoothing} belongs to the sigmoid loss: "
                f"set it to 0 or training.loss.type to sigmoid (now {loss.type})"
            )
        return self


class OfflineDPOConfig(JobConfig):
    """Offline DPO: train on preference pairs from a file or data set, for some epochs."""

    pairs: str
    """A JSONL, Parquet or CSV file, or a `datasets` name, with prompt, chosen and rejected."""
    pairs_split: str = "train"
    """Split, where `pairs` is a `datasets` name."""
    max_length: int = Field(default=1024, ge=2)
    """Pairs with a longer prompt plus completion, in tokens, are dropped and counted."""
    max_pairs: int | None = Field(default=None, ge=2)
    """Train on at most this many pairs, drawn at random; unset: all."""
    held_out_pairs: int = Field(default=256, ge=1)
    """Pairs kept apart for evaluation after each epoch."""
    rounds: int = Field(default=1, ge=1)
    """Epochs: each goes once through all pairs and ends with a policy version."""


class ServeConfig(Settings):
    """Serve the live policy of a run over HTTP, with the sampling settings that the run has."""

    serving: ServingConfig = ServingConfig()
    """The live policy's HTTP endpoint."""
