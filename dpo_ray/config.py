"""Every setting of every job, in one frozen tree that is parsed before torch is imported."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

_SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this variable for the entry point of a submitted job."""
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class _Section(BaseModel):
    """A branch of the tree."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class SamplingConfig(_Section):
    """How the policy is sampled, and the vLLM engine that does it."""

    prompts_per_round: int = Field(default=128, ge=1)
    """Prompts drawn in each round."""
    samples_per_prompt: int = Field(default=8, ge=2)
    """Completions per prompt, from which pairs are made."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of the training completions."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling bound."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Longest completion, in tokens."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the deployment, each with an engine of its own."""
    cpus_per_replica: float = Field(default=1, ge=0)
    """CPUs that each replica reserves in Ray."""
    gpus_per_replica: float = Field(default=0, ge=0)
    """GPUs that each replica reserves in Ray; 0 samples on CPU."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that one engine spreads its weights over."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the engine's weights; auto is float32 on CPU and bfloat16 on GPU."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest prompt plus completion, in tokens; unset: the model's own limit."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences that one engine decodes at the same time."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    """Share of the GPU that an engine takes."""
    cpu_kv_cache_mib: int = Field(default=128, ge=1)
    """Key-value cache of a CPU engine, in MiB."""


class JudgeConfig(_Section):
    """Who says which completion is better."""

    function: str = "dpo_ray.film_reviews:judge_reviews"
    """Import path `module:function` of a judge: a list of completions in, a list of judgements out."""
    actors: int = Field(default=1, ge=1)
    """Judge actors; completions are divided among them."""
    cpus_per_actor: float = Field(default=1, ge=0)
    """CPUs that each judge actor reserves in Ray."""


class PairingConfig(_Section):
    """How scored completions become pairs."""

    rule: Literal["best_vs_worst", "all_pairs"] = "best_vs_worst"
    """Which completions of one prompt are paired."""
    min_margin: float = Field(default=0.0, ge=0.0)
    """Pairs whose rewards differ by this much or less are dropped as ties."""


class BufferConfig(_Section):
    """Where pairs are kept, and which of them a round trains on."""

    url: str | None = None
    """SQLAlchemy URL of the store; unset: buffer.sqlite in the run's folder."""
    pairs_per_round: int = Field(default=256, ge=1)
    """Most pairs in one round's snapshot; more are drawn at random."""
    max_age: int | None = Field(default=None, ge=0)
    """Oldest pairs a round may train on, in policy versions; unset: all."""


class LossConfig(_Section):
    """The preference loss."""

    type: Literal["sigmoid", "ipo", "minor"] = "sigmoid"
    """sigmoid (DPO, arXiv:2305.18290), ipo (arXiv:2310.12036), minor (MinorDPO, arXiv:2408.09834)."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull to the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of labels taken to be wrong (cDPO); sigmoid only."""
    nll_coef: float = Field(default=0.0, ge=0)
    """Weight of the chosen completion's negative log-likelihood per token (RPO, arXiv:2404.19733)."""


class TrainingConfig(_Section):
    """How the policy is updated."""

    loss: LossConfig = LossConfig()
    """The preference loss."""
    workers: int = Field(default=2, ge=1)
    """Data-parallel training processes."""
    cpus_per_worker: float = Field(default=1, ge=0)
    """CPUs that each training process reserves in Ray."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs that each training process reserves in Ray; 0 trains on CPU."""
    learning_rate: float = Field(default=5e-7, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from 0, counted over the whole run."""
    batch_size: int = Field(default=32, ge=1)
    """Pairs per optimizer step, over all workers."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Pairs per forward pass of one worker."""
    epochs: int = Field(default=1, ge=1)
    """Passes over a round's snapshot."""
    max_grad_norm: float = Field(default=10.0, gt=0)
    """Gradients are scaled down to this norm."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    max_failures: int = Field(default=8, ge=0)
    """How often killed training processes are replaced before the job gives up."""


class EvaluationConfig(_Section):
    """What is measured after each round, on prompts that no round trains on."""

    prompts: int = Field(default=128, ge=1)
    """Held-out prompts."""
    samples_per_prompt: int = Field(default=2, ge=1)
    """Completions per held-out prompt."""


class GateConfig(_Section):
    """Bounds that a trained version must keep to go live."""

    max_chosen_drop: float | None = Field(default=None, gt=0)
    """Most nats that the mean chosen log-prob may fall below the reference's; unset: no bound."""


class ServingConfig(_Section):
    """The live policy's HTTP endpoint."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""


class ClusterConfig(_Section):
    """The Ray cluster."""

    wait_for_resources_s: float = Field(default=0, ge=0)
    """Seconds to wait until the cluster has what the job reserves; give an autoscaling one time to grow."""


class Settings(BaseSettings):
    """Settings from the command line, the environment and a file, in that order."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        nested_model_default_partial_update=True,
        env_prefix="DPO_RAY_",
        env_nested_delimiter="__",
    )

    default_file: ClassVar[Path | None] = None
    """Settings that hold where no `--config` is given."""

    run_dir: str = "runs/run"
    """Folder of the run: a path that every node sees, or a URL (s3://, gs://, …)."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The file's settings are the initial ones: the environment and the command line go over them."""
        return env_settings, init_settings

    @field_validator("run_dir")
    @classmethod
    def _resolve_run_dir(cls, run_dir: str) -> str:
        """An absolute folder, or the URL itself.

        A submitted job runs in a temporary copy of the working directory: a relative folder is then below
        ~/dpo_ray, where it outlives the job.
        """
        if "://" in run_dir:
            return run_dir
        base = Path.home() / "dpo_ray" if _SUBMITTED_JOB in os.environ else Path.cwd()
        return str(base / Path(run_dir).expanduser())


AnySettings = TypeVar("AnySettings", bound=Settings)


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


def parse_config(config_type: type[AnySettings], arguments: Sequence[str]) -> AnySettings:
    """The command line over environment variables (DPO_RAY_…) over the file of `--config`.

    Exits with code 2 and one message where a setting is unknown or wrong.
    """
    file_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file_parser.add_argument("--config", type=Path, default=config_type.default_file)
    known, rest = file_parser.parse_known_args(arguments)
    try:
        initial = _read_yaml(known.config) if known.config else {}
        return config_type(_cli_parse_args=rest, **initial)  # type: ignore[call-arg]
    except ValidationError as error:
        exit_with("; ".join(map(_sentence, error.errors())))
    except (SettingsError, ValueError, OSError) as error:
        exit_with(str(error))


def exit_with(message: str, *, code: int = 2) -> NoReturn:
    """End the process with one sentence; 2 is the code for wrong settings."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file")
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path} holds a {type(settings).__name__}, not settings by name")
    return settings


def _sentence(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{name} is no setting: see --help"
    given = f" (got {error['input']!r})" if error["loc"] else ""
    return f"{name}: {error['msg']}{given}".removeprefix(": ")
