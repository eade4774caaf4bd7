"""One vLLM engine that always knows, and proves, which policy version it holds."""

import asyncio
import contextvars
import os
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from dpo_ray.config import SamplingConfig
from dpo_ray.registry import Canary, PolicyManifest, PolicyRegistry
from serve.weights import REPLICA_PID

SERVED_NAME = "policy"
_PUSH_TIMEOUT_S = 600
_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25, "float16": 0.05}
"""Largest error of one canary token's log-prob, in nats, by the engine's number format."""


class StaleWeightsError(RuntimeError):
    """The engine's log-probs are not those of the version it should hold."""


@dataclass(slots=True)
class VersionSpans:
    """Which versions wrote the tokens of the answers to one HTTP request."""

    spans: list[tuple[int, int, int]] = field(default_factory=list)
    """(version, first token, one past the last token)."""


request_spans: contextvars.ContextVar[VersionSpans | None] = contextvars.ContextVar(
    "request_spans", default=None
)


class VersionedLLM(AsyncLLM):
    """AsyncLLM that tells the surrounding HTTP request which versions wrote its answer."""

    @cached_property
    def proven(self) -> asyncio.Event:
        """Set while the weights are those of the version that the engine names."""
        return asyncio.Event()

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[RequestOutput, None]:
        await self.proven.wait()
        record = request_spans.get()
        async for output in super().generate(*args, **kwargs):
            if record is not None:
                record.spans.extend(
                    span for completion in output.outputs for span in version_spans(completion)
                )
            yield output


def version_spans(completion: Any) -> list[tuple[int, int, int]]:
    """(version, start, end) of each run of tokens that one version wrote; [] while unfinished."""
    return [(int(span.version), span.start, span.end) for span in completion.weight_versions or []]


class PolicyEngine:
    """Loads LIVE when it starts, and converges to it whenever it is told to."""

    def __init__(self, registry: PolicyRegistry, llm: VersionedLLM, manifest: PolicyManifest) -> None:
        self.llm = llm
        self.manifest = manifest
        self.lost = False
        """Whether a swap has failed: what the weights are now, nobody knows."""
        self._registry = registry
        self._swap = asyncio.Lock()

    @classmethod
    async def start(cls, registry: PolicyRegistry, config: SamplingConfig) -> "PolicyEngine":
        """An engine that holds the live version and has proven it."""
        live = registry.live()
        if live is None:
            raise ValueError("no policy version is live yet: promote one before the sampler starts")
        manifest = registry.manifest(live)
        os.environ[REPLICA_PID] = str(os.getpid())
        llm = VersionedLLM.from_engine_args(engine_args(registry.fetch(live), config))
        assert isinstance(llm, VersionedLLM)
        engine = cls(registry, llm, manifest)
        await llm.update_weight_version(str(live))
        await engine.prove(manifest)
        return engine

    @property
    def version(self) -> int:
        return self.manifest.version

    async def converge(self) -> int:
        """Hold the live version, proven, on return. Requests in flight go on with the new weights."""
        async with self._swap:
            live = self._registry.live()
            if live is not None and live != self.version:
                await asyncio.wait_for(self._swap_to(live), _PUSH_TIMEOUT_S)
            return self.version

    async def _swap_to(self, version: int) -> None:
        manifest = self._registry.manifest(version)
        folder = self._registry.fetch(version)  # Checks every file before the engine is touched.
        self.llm.proven.clear()  # New requests wait; those in flight are held by the pause, and go on.
        try:
            await self.llm.pause_generation(mode="keep", clear_cache=True)
            await self.llm.collective_rpc("load_policy", args=(str(folder),))
            await self.llm.update_weight_version(str(version))
            await self.llm.resume_generation()
            await self.prove(manifest)
        except BaseException:
            self.lost = True
            raise
        self.manifest = manifest

    async def prove(self, manifest: PolicyManifest) -> None:
        """Raise StaleWeightsError unless the engine agrees with the learner's canary log-probs."""
        worst = max([await self._canary_error(canary) for canary in manifest.canaries], default=0.0)
        dtype = str(self.llm.model_config.dtype).removeprefix("torch.")
        if not worst <= _TOLERANCE[dtype]:
            raise StaleWeightsError(
                f"policy version {manifest.version} is loaded, but the log-probs are {worst:.4f} nats "
                f"from the learner's ({dtype} allows {_TOLERANCE[dtype]}): this replica takes no traffic"
            )
        self.llm.proven.set()

    async def _canary_error(self, canary: Canary) -> float:
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        # The bare engine's generate: a proof is what requests wait for.
        output = await _last(AsyncLLM.generate(self.llm, _prompt(canary.token_ids), params, _request_id()))
        assert output.prompt_logprobs is not None
        scored = zip(output.prompt_logprobs[1:], canary.token_ids[1:], canary.logprobs, strict=True)
        return max(abs(entry[token].logprob - expected) for entry, token, expected in scored if entry)

    async def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], params: dict[str, Any]
    ) -> list[RequestOutput]:
        """The finished outputs of all prompts, in order. `params` are vLLM's sampling parameters."""
        # FINAL_ONLY: with other kinds, n > 1 can drop completions.
        common = {**params, "logprobs": 0, "output_kind": RequestOutputKind.FINAL_ONLY}
        requests = [
            _last(self.llm.generate(_prompt(prompt), SamplingParams(seed=seed, **common), _request_id()))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return await asyncio.gather(*requests)


def _prompt(token_ids: Sequence[int]) -> TokensPrompt:
    return TokensPrompt(prompt_token_ids=list(token_ids))


def _request_id() -> str:
    return os.urandom(8).hex()


async def _last(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    return [output async for output in outputs][-1]


def engine_args(folder: Path, config: SamplingConfig) -> AsyncEngineArgs:
    """vLLM's settings for one replica."""
    on_gpu = config.gpus_per_replica > 0
    # CPU engines run eagerly: compiling costs more than a small model's whole run. They take a prompt at
    # once: a seeded request whose prompt is taken in chunks ends them ("CPU Generator does not use offset").
    options: dict[str, Any] = (
        {"gpu_memory_utilization": config.gpu_memory_utilization}
        if on_gpu
        else {
            "kv_cache_memory_bytes": config.cpu_kv_cache_mib << 20,
            "enforce_eager": True,
            "enable_chunked_prefill": False,
        }
    )
    if config.max_model_len is not None:
        options["max_model_len"] = config.max_model_len
    default_dtype = "bfloat16" if on_gpu else "float32"
    return AsyncEngineArgs(
        model=str(folder),
        served_model_name=[SERVED_NAME],
        dtype=default_dtype if config.dtype == "auto" else config.dtype,
        max_num_seqs=config.max_num_seqs,
        tensor_parallel_size=config.tensor_parallel_size,
        # One worker needs no process of its own beside the engine's.
        distributed_executor_backend="uni" if config.tensor_parallel_size == 1 else "mp",
        logprobs_mode="raw_logprobs",
        worker_extension_cls="serve.weights.PolicyWeights",
        enable_log_requests=False,
        **options,
    )
