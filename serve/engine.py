"""One vLLM engine that always knows, and proves, which policy version it holds."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from vllm import SamplingParams
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from dpo_ray.config import SamplingConfig
from dpo_ray.registry import Canary, PolicyManifest, PolicyRegistry
from dpo_ray.tensors import same_tensors
from serve.engine_args import engine_args
from serve.metrics import count_push
from serve.replica import ReplicaState
from serve.weights import REPLICA_PID

_PUSH_TIMEOUT_S = 600
_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25, "float16": 0.05}
"""Largest error of one canary token's log-prob, in nats, by the engine's number format."""


class StaleWeightsError(RuntimeError):
    """The engine does not hold, or cannot prove, the version that it should."""


class Proof:
    """Whether the engine's weights are proven: yes, not yet, or refused with a reason."""

    def __init__(self) -> None:
        self.refusal = ""
        self._settled = asyncio.Event()

    def begin(self) -> None:
        """From here on, nothing that the engine says is given out."""
        self.refusal = ""
        self._settled.clear()

    def settle(self, *, refusal: str = "") -> None:
        self.refusal = refusal
        self._settled.set()

    async def wait(self) -> None:
        """Return when the weights are proven. StaleWeightsError: they are not those that they should be."""
        await self._settled.wait()
        if self.refusal:
            raise StaleWeightsError(self.refusal)


class VersionedLLM(AsyncLLM):
    """AsyncLLM that gives out only what proven weights said."""

    @cached_property
    def proof(self) -> Proof:
        return Proof()

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[RequestOutput, None]:
        await self.proof.wait()
        async for output in super().generate(*args, **kwargs):
            await self.proof.wait()  # Tokens after a swap wait for its proof, or are never seen.
            yield output


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
        self.canary_error = 0.0
        self.push_ms: dict[str, float] = {}
        self._registry = registry
        self._takes_candidate = takes_candidate
        self._wanted = manifest.version
        self._swap = asyncio.Lock()

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
        manifest = registry.manifest(version)
        os.environ[REPLICA_PID] = str(os.getpid())
        llm = VersionedLLM.from_engine_args(engine_args(registry.fetch(version), config))
        assert isinstance(llm, VersionedLLM)
        engine = cls(registry, llm, manifest, takes_candidate)
        await llm.update_weight_version(str(version))
        await engine._prove(manifest)
        llm.proof.settle()
        await engine.converge()  # The desired version may be another one by now.
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

    async def _swap_to(self, version: int) -> None:
        phases = _Phases()
        with phases("fetch"):
            manifest = self._registry.manifest(version)
            folder = await asyncio.to_thread(self._registry.fetch, version)  # With the sha256 of every file.
        with phases("check"):
            same_tensors(manifest.tensors, self.manifest.tensors)
        self.llm.proof.begin()  # New requests wait; those in flight are held by the pause, and go on.
        with phases("pause"):
            await self.llm.pause_generation(mode="keep", clear_cache=True)
        with phases("load"):
            if any(failures := await self.llm.collective_rpc("load_policy", args=(str(folder),))):
                raise StaleWeightsError(f"policy version {version} could not be loaded: {max(failures)}")
            await self.llm.update_weight_version(str(version))
        with phases("resume"):
            await self.llm.resume_generation()
        with phases("prove"):
            await self._prove(manifest)
        self.manifest, self.push_ms = manifest, phases.milliseconds

    async def _prove(self, manifest: PolicyManifest) -> None:
        """Raise StaleWeightsError unless the engine agrees with the learner's canary log-probs."""
        errors = await asyncio.gather(
            *(self._canary_error(canary) for canary in manifest.canaries),
            *(self._cached_error(canary) for canary in manifest.canaries[:1]),
        )
        worst = max(errors, default=0.0)
        if not worst <= self.tolerance:
            raise StaleWeightsError(
                f"policy version {manifest.version} is loaded, but the log-probs are {worst:.4f} nats "
                f"from the learner's (allowed are {self.tolerance})"
            )
        self.canary_error = worst

    async def _canary_error(self, canary: Canary) -> float:
        """Of all tokens, computed anew."""
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        output = await self._bare(canary.token_ids, params)
        assert output.prompt_logprobs is not None
        scored = zip(output.prompt_logprobs[1:], canary.token_ids[1:], canary.logprobs, strict=True)
        return max(abs(entry[token].logprob - expected) for entry, token, expected in scored if entry)

    async def _cached_error(self, canary: Canary) -> float:
        """Of the last token, with the keys and values that the cache has of the others, if any."""
        *prompt, last = canary.token_ids
        params = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=[last], detokenize=False)
        output = await self._bare(prompt, params)
        (completion,) = output.outputs
        assert completion.logprobs is not None
        return abs(completion.logprobs[0][last].logprob - canary.logprobs[-1])

    async def _bare(self, token_ids: Sequence[int], params: SamplingParams) -> RequestOutput:
        """The bare engine's answer: a proof is what others wait for."""
        return await _last(AsyncLLM.generate(self.llm, _prompt(token_ids), params, _request_id()))

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


async def _last(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    return [output async for output in outputs][-1]
