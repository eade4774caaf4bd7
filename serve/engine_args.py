"""The settings that a replica's vLLM engine is started with."""

from pathlib import Path
from typing import Any, get_args

from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs

from dpo_ray.config import SamplingConfig
from serve.models import SERVED_NAME


def engine_args(folder: Path, config: SamplingConfig) -> AsyncEngineArgs:
    """vLLM's settings for one replica; the model is read from safetensors, and brings no code."""
    on_gpu = config.gpus_per_replica > 0
    default_dtype = "bfloat16" if on_gpu else "float32"
    context: dict[str, Any] = {} if config.max_model_len is None else {"max_model_len": config.max_model_len}
    return AsyncEngineArgs(
        model=str(folder),
        served_model_name=[SERVED_NAME],
        load_format="safetensors",
        use_tqdm_on_load=False,
        trust_remote_code=False,
        dtype=default_dtype if config.dtype == "auto" else config.dtype,
        max_num_seqs=config.max_num_seqs,
        tensor_parallel_size=config.tensor_parallel_size,
        # One worker needs no process of its own beside the engine's.
        distributed_executor_backend="uni" if config.tensor_parallel_size == 1 else "mp",
        logprobs_mode="raw_logprobs",
        worker_extension_cls="serve.weights.PolicyWeights",
        enable_log_requests=False,
        **(_gpu(config) if on_gpu else _cpu(config)),
        **(_adapters(config.lora_rank) if config.lora_rank else {}),
        **context,
    )


def _gpu(config: SamplingConfig) -> dict[str, Any]:
    return {"gpu_memory_utilization": config.gpu_memory_utilization}


def _cpu(config: SamplingConfig) -> dict[str, Any]:
    return {
        "kv_cache_memory_bytes": config.cpu_kv_cache_mib << 20,
        # The smallest: the prefix cache keeps a canary's prompt, and so the proof sees that it was reset.
        "block_size": 32,
        # Compiling costs more than a small model's whole run.
        "enforce_eager": True,
        # A seeded request whose prompt comes in chunks ends it ("CPU Generator does not use offset").
        "enable_chunked_prefill": False,
    }


def _adapters(rank: int) -> dict[str, Any]:
    allowed = next(size for size in get_args(MaxLoRARanks) if size >= rank)
    # Requests of earlier versions go on with theirs while the newest is proven.
    return {"enable_lora": True, "max_lora_rank": allowed, "max_loras": 4}
