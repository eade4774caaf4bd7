"""The parts of an iterative run, but for training."""

from typing import Literal

from pydantic import Field

from dpo_ray.config.section import Section


class SamplingConfig(Section):
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
    max_replicas: int | None = Field(default=None, ge=1)
    """Most copies, to which Ray Serve scales up with the load; unset: always `replicas`."""
    requests_per_replica: float = Field(default=64, gt=0)
    """Requests in flight per copy that Ray Serve scales to."""
    cpus_per_replica: float = Field(default=1, ge=0)
    """CPUs that each replica reserves in Ray, and threads that its engine computes with on CPU."""
    gpus_per_replica: float = Field(default=0, ge=0)
    """GPUs that each replica reserves in Ray; 0 samples on CPU."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that one engine spreads its weights over."""
    push_every_rounds: int = Field(default=1, ge=1)
    """Rounds from one push to the next; in between, training goes on from versions that are not live, and
    the last round always pushes."""
    transport: Literal["storage", "stream"] = "storage"
    """How a version gets to the replicas: storage, where each node reads it; stream, a trainer
    also sends it to all nodes at once (NCCL between GPUs, gloo elsewhere)."""
    lora_rank: int = Field(default=0, ge=0, le=512)
    """Rank of adapters (`training.lora.rank`) that are pushed alone and served as they are; 0: merged."""
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


class EvaluationConfig(Section):
    """What is measured after each round, on prompts that no round trains on."""

    prompts: int = Field(default=128, ge=1)
    """Held-out prompts."""
    samples_per_prompt: int = Field(default=2, ge=1)
    """Completions per held-out prompt."""


class GateConfig(Section):
    """Bounds that a trained version must keep to go live; most are measured on held-out prompts.

    Win rate and reward gain are known up to chance: they refuse a version only where the whole 95 % interval,
    with each prompt as one trial, is below the bound.
    """

    max_chosen_drop: float | None = Field(default=None, gt=0)
    """Most nats that the mean chosen log-prob may fall below the reference's; unset: no bound."""
    max_kl: float | None = Field(default=None, gt=0)
    """Largest kl/start (sequence KL to the starting policy, sampled), in nats; unset: no bound."""
    min_win_rate: float | None = Field(default=None, gt=0, le=1)
    """Lowest win rate against the version live before; unset: no bound."""
    min_reward_gain: float | None = None
    """Least mean reward above that of the version live before, negative to allow a loss; unset: no bound."""
    max_length_ratio: float | None = Field(default=None, gt=0)
    """Largest mean length, as a multiple of the starting policy's; unset: no bound."""
    max_degenerate_rise: float | None = Field(default=None, ge=0, lt=1)
    """Most that the share of completions that are empty, cut off or loops may be above the start's."""
    on_failure: Literal["continue", "stop"] = "continue"
    """After a refusal: continue with the next round from the version live before, or stop the job."""
    canary_share: float = Field(default=0.0, ge=0, le=1)
    """Share of live traffic that a candidate answers before promotion, where there are several replicas."""
    min_vote_share: float | None = Field(default=None, gt=0, le=1)
    """Lowest share of people's votes against the live version, ties half; unset: no bound."""
    votes_wanted: int = Field(default=0, ge=0)
    """Votes on comparisons with the live version that a candidate waits for before it is judged."""
    votes_wait_s: float = Field(default=600.0, ge=0)
    """Longest time that it waits for them."""


class ServingConfig(Section):
    """The live policy's HTTP endpoint."""

    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach needs tokens (`python -m serve.tokens`)."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""
    replica_port: int | None = Field(default=None, ge=1, le=65535)
    """Port at which replicas answer by themselves, on their nodes; unset: through Serve's proxy alone."""
    max_concurrent_requests: int = Field(default=256, ge=1)
    """Requests that each replica works on at the same time, streams until their last byte."""
    max_queued_requests: int = Field(default=1024, ge=0)
    """Requests that wait in each replica for those; more are answered with 429."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests that a token, or without tokens an address, may send to each replica; unset: no bound."""
    max_body_bytes: int = Field(default=1 << 20, ge=1)
    """Largest body of a request."""
    body_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds in which a request's body must be here."""
    max_header_bytes: int = Field(default=16 << 10, ge=1)
    """Largest headers of a request, names and values together."""
    max_n: int = Field(default=64, ge=1)
    """Most completions of one prompt (`n`)."""
    max_completions_per_request: int = Field(default=256, ge=1)
    """Most completions of one request: `n` times its prompts."""
    max_messages: int = Field(default=256, ge=1)
    """Most messages in one chat."""
    max_new_tokens_per_request: int | None = Field(default=None, ge=1)
    """Longest completion, in tokens; also where a request names none; unset: the context's length."""


class ClusterConfig(Section):
    """The Ray cluster."""

    wait_for_resources_s: float = Field(default=0, ge=0)
    """Seconds to wait until the cluster has what the job reserves; give an autoscaling one time to grow."""
