"""One vLLM engine that always knows, and proves, which policy version it holds."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from dpo_ray.config import SamplingConfig
from dpo_ray.registry import ADAPTER, PolicyManifest, PolicyRegistry
from dpo_ray.tensors import TensorSpec, read_tensors, same_tensors
from serve.canaries import largest_error, last
from serve.engine_args import engine_args
from serve.metrics import count_push
from serve.replica import ReplicaState
from serve.versioned_llm import Adapter, StaleWeightsError, VersionedLLM
from serve.weights import REPLICA_PID

_PUSH_TIMEOUT_S = 600
_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25, "float16": 0.05}
"""Largest error of one canary token's log-prob, in nats, by the engine's number format."""


class PolicyEngine:
    """Loads the version that it should hold when it starts, and converges to it whenever it is told to."""

    def __init__(
        self,
        registry: PolicyRegistry,
        llm: VersionedLLM,
        manifest: PolicyManifest,
        takes_candidate: Callable[[], bool],
    ) -> None:
        self.llm = llm
        self.manifest = manifest
        """Of the version that it holds; while it refuses, of the last one that it had proven."""
        self.replica = ""
        self.address = ""
        self.node = ""
        self.canary_error = 0.0
        self.push_ms: dict[str, float] = {}
        self._registry = registry
        self._takes_candidate = takes_candidate
        self._wanted = manifest.version
        self._swap = asyncio.Lock()
        self._adapter_ids = count(1)
        self._adapter_tensors: dict[str, TensorSpec] = {}

    @classmethod
    async def start(
        cls,
        registry: PolicyRegistry,
        config: SamplingConfig,
        *,
        takes_candidate: Callable[[], bool] = lambda: False,
    ) -> "PolicyEngine":
        """An engine that holds the version that it should, and has proven it.

        `takes_candidate`: whether a candidate on offer is for this replica.
        """
        version = _desired(registry, takes_candidate)
        base = 0 if config.lora_rank else version  # Adapters lie on the start.
        os.environ[REPLICA_PID] = str(os.getpid())
        llm = VersionedLLM.from_engine_args(engine_args(registry.fetch(base), config))
        assert isinstance(llm, VersionedLLM)
        engine = cls(registry, llm, registry.manifest(base), takes_candidate)
        await llm.update_weight_version(str(base))
        await engine._prove(engine.manifest, None)
        llm.proof.settle()
        await engine.converge()  # The desired version may be another one.
        return engine

    @property
    def version(self) -> int:
        return self.manifest.version

    @property
    def tolerance(self) -> float:
        """Nats that a canary token's log-prob may be from the learner's."""
        return _TOLERANCE[str(self.llm.model_config.dtype).removeprefix("torch.")]

    @property
    def refusal(self) -> str:
        """Why nothing is answered; empty while the engine serves."""
        return self.llm.proof.refusal

    def describe(self) -> ReplicaState:
        return ReplicaState(
            replica=self.replica,
            version=self.version,
            state="refused" if self.refusal else "serving",
            reason=self.refusal,
            canary_error=self.canary_error,
            push_ms=self.push_ms,
            address=self.address,
            node=self.node,
        )

    async def converge(self) -> int:
        """Hold the desired version, proven, on return. Requests in flight go on with the new weights.

        StaleWeightsError: it is not to be had; until another one is desired, nothing is answered.
        """
        await asyncio.shield(asyncio.create_task(self._converge()))  # A swap that has begun goes to its end.
        await self.llm.proof.wait()
        return self.version

    async def _converge(self) -> None:
        async with self._swap:
            wanted = _desired(self._registry, self._takes_candidate)
            if wanted != self._wanted:
                self._wanted = wanted
                await self._take(wanted)

    async def _take(self, version: int) -> None:
        refusal = ""
        for _ in range(2):  # The second time anew from storage.
            try:
                await asyncio.wait_for(self._swap_to(version), _PUSH_TIMEOUT_S)
                count_push(self.push_ms, "proven")
                return self.llm.proof.settle()
            except Exception as error:
                refusal = f"version {version} is not proven, so this replica answers nothing: {error!r}"
        count_push({}, "refused")
        self.llm.proof.settle(refusal=refusal)
        await self.llm.pause_generation(mode="abort")  # Requests in flight learn of the refusal.
        await self.llm.resume_generation()

    async def _swap_to(self, version: int) -> None:
        phases = _Phases()
        manifest = self._registry.manifest(version)
        await (self._swap_adapter if self.llm.takes_adapters else self._swap_weights)(manifest, phases)
        self.manifest, self.push_ms = manifest, phases.milliseconds

    async def _swap_weights(self, manifest: PolicyManifest, phases: "_Phases") -> None:
        with phases("fetch"):
            folder = await asyncio.to_thread(self._registry.fetch, manifest.version)  # With all sha256.
        with phases("check"):
            same_tensors(manifest.tensors, self.manifest.tensors)
        with phases("load"):
            await self._in_workers("prepare_policy", folder)
        with phases("pause"):
            await self.llm.hold()  # Requests in flight; they go on with the new weights.
        proving = asyncio.create_task(self._prove(manifest, None))  # Asked now, answered in the first step.
        try:
            with phases("swap"):
                await self._in_workers("take_policy", folder)
                await self.llm.update_weight_version(str(manifest.version))
            self.llm.proof.begin()  # What was said before is of the old weights, and may still be on its way.
            with phases("resume"):
                await self.llm.resume_generation()
            with phases("prove"):
                await proving
        finally:
            proving.cancel()

    async def _in_workers(self, step: str, folder: Path) -> None:
        if any(failures := await self.llm.collective_rpc(step, args=(str(folder),))):
            raise StaleWeightsError(f"the weights could not be loaded: {max(failures)}")

    async def _swap_adapter(self, manifest: PolicyManifest, phases: "_Phases") -> None:
        """Until the adapter is proven, new requests begin with the one before; no request is held."""
        adapter = None
        if manifest.version:
            with phases("fetch"):
                folder = await asyncio.to_thread(self._registry.fetch, manifest.version, part=ADAPTER)
            with phases("check"):
                self._check_adapter(folder)
            with phases("load"):
                name, number = f"v{manifest.version}", next(self._adapter_ids)
                adapter = Adapter(manifest.version, LoRARequest(f"{name}-{number}", number, str(folder)))
                await self.llm.add_lora(adapter.request)
        with phases("prove"):
            await self._prove(manifest, adapter)
        self.llm.adapter = adapter

    def _check_adapter(self, folder: Path) -> None:
        """ValueError: its tensors are not laid out as those of the adapter before it."""
        tensors = read_tensors(folder)
        same_tensors(tensors, self._adapter_tensors or tensors)
        self._adapter_tensors = tensors

    async def _prove(self, manifest: PolicyManifest, adapter: Adapter | None) -> None:
        """Raise StaleWeightsError unless the engine agrees with the learner's canary log-probs."""
        worst = await largest_error(self.llm, manifest.canaries, adapter)
        if not worst <= self.tolerance:
            raise StaleWeightsError(
                f"policy version {manifest.version} is loaded, but the log-probs are {worst:.4f} nats "
                f"from the learner's (allowed are {self.tolerance})"
            )
        self.canary_error = worst

    async def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], params: dict[str, Any]
    ) -> list[RequestOutput]:
        """The finished outputs of all prompts, in order. `params` are vLLM's sampling parameters."""
        # FINAL_ONLY: with other kinds, n > 1 can drop completions.
        common = {**params, "logprobs": 0, "output_kind": RequestOutputKind.FINAL_ONLY}
        requests = [
            last(self.llm.generate(_prompt(prompt), SamplingParams(seed=seed, **common), _request_id()))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return await asyncio.gather(*requests)


class _Phases:
    """Times the phases of a push."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.milliseconds[name] = 1000 * (time.perf_counter() - begin)


def _desired(registry: PolicyRegistry, takes_candidate: Callable[[], bool]) -> int:
    """The version that a replica should hold now."""
    candidate, live = registry.candidate(), registry.live()
    if candidate is not None and takes_candidate():
        return candidate.version
    if live is None:
        raise ValueError("no policy version is live yet: promote one before the sampler starts")
    return live


def _prompt(token_ids: Sequence[int]) -> TokensPrompt:
    return TokensPrompt(prompt_token_ids=list(token_ids))


def _request_id() -> str:
    return os.urandom(8).hex()
