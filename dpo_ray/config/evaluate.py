"""What the jobs can be told that compare policies and train none."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import CliVariadicArg

from dpo_ray.config.judge import JudgeConfig
from dpo_ray.config.section import Section
from dpo_ray.config.settings import Settings


class EndpointConfig(Section):
    """How policies are asked that answer over HTTP."""

    api_key_variable: str = ""
    """Environment variable that holds the API key; unset: none is sent."""
    concurrency: int = Field(default=8, ge=1)
    """Requests in flight at the same time."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds to wait for an answer."""
    retries: int = Field(default=4, ge=0)
    """How often a request is repeated that fails; one that fails still is counted, and never a low score."""


class EvaluateConfig(Settings):
    """Compare policies on the same prompts, by any judge; the first one is the baseline of all others.

    Without prompts, judge or max_new_tokens, those of the first run among the policies hold.
    """

    run_dir: str = "runs/evaluation"
    """Folder of the results: evaluation.html, evaluation.json and completions.jsonl."""
    policies: CliVariadicArg[tuple[str, ...]]
    """Two or more: a version of a run (runs/demo@3, runs/demo@live), a model (folder or hub name), or an
    OpenAI-compatible endpoint and its model (http://host:8000/v1#policy)."""
    prompts: str = ""
    """A file, a folder, or a `datasets` name; unset: the prompts that the first run holds out."""
    prompts_split: str = "train"
    """Split, where `prompts` is a `datasets` name."""
    prompts_column: str = "prompt"
    """Column of the prompts: text or lists of messages."""
    text_prompts: Literal["continue", "ask"] = "continue"
    """A prompt that is text: continue goes on with it as it is, ask makes it a user's message."""
    max_prompts: int = Field(default=256, ge=1)
    """Most prompts, drawn at random."""
    samples_per_prompt: int = Field(default=2, ge=1)
    """Completions of each policy per prompt; self-BLEU needs two."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 is greedy. KL is measured at 1, where samples are the policy's own."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest completion, in tokens; unset: what the first run samples with, else 256."""
    tie_margin: float = Field(default=0.0, ge=0)
    """Two completions whose rewards differ by this much or less are a tie."""
    resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples behind each interval."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random."""
    endpoint: EndpointConfig = EndpointConfig()
    """How policies are asked that answer over HTTP."""
    judge: JudgeConfig = JudgeConfig()
    """Who says which completion is better; unset: the first run's judge."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.policies) < 2:
            raise ValueError(
                f"policies={list(self.policies)}: give two or more, the baseline first, "
                "as --policies runs/demo@0 runs/demo@live"
            )
        twice = {name for name in self.policies if self.policies.count(name) > 1}
        if twice:
            raise ValueError(f"policies has {', '.join(sorted(twice))} more than once: give each once")
        return self


class HarnessConfig(Settings):
    """Run tasks of lm-evaluation-harness on versions of a run, over HTTP, and show them side by side.

    Without a url, a copy of the run is served for it: what is live stays live. What was measured is kept in
    run_dir, evaluation/harness, and not measured again.
    """

    versions: CliVariadicArg[tuple[str, ...]] = ("0", "live")
    """Versions of the run: numbers, or live."""
    tasks: CliVariadicArg[tuple[str, ...]] = ("film_praise", "film_grammar")
    """Names of tasks, of the harness or of task_folder."""
    task_folder: str = "examples/harness"
    """Folder with task definitions of your own; unset with "" where there are none."""
    limit: int | None = Field(default=None, ge=1)
    """Most rows of each task; unset: all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Solved rows before each question; unset: what the task says."""
    apply_chat_template: bool = False
    """Ask in the policy's chat template."""
    url: str = ""
    """Where the versions answer already (http://host:8000/v1); unset: a copy of the run is served."""
    api_key_variable: str = ""
    """Environment variable that holds the token for url; unset: none is sent."""
    concurrency: int = Field(default=8, ge=1)
    """Requests in flight at the same time."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.versions or not self.tasks:
            raise ValueError(
                f"versions={list(self.versions)}, tasks={list(self.tasks)}: give at least one of each"
            )
        if self.task_folder and not Path(self.task_folder).is_dir():
            raise ValueError(
                f"task_folder={self.task_folder}: there is no such folder: give one, or --task_folder ''"
            )
        return self
