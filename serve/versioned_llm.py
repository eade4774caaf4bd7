"""vLLM's engine, which gives out only what proven weights said, and names their version."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput, WeightVersionSpan
from vllm.v1.engine.async_llm import AsyncLLM


class StaleWeightsError(RuntimeError):
    """The engine does not hold, or cannot prove, the version that it should."""


class Proof:
    """Whether the engine's weights are proven: yes, not yet, or refused with a reason."""

    def __init__(self) -> None:
        self.refusal = ""
        self.failures = 0
        """Weights that have said something, and were replaced because they could not be proven."""
        self._settled = asyncio.Event()

    def begin(self) -> None:
        """From here on, nothing that the engine says is given out."""
        self.failures += not self._settled.is_set()
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


@dataclass(frozen=True, slots=True)
class Adapter:
    """A version as vLLM adds it to the weights of version 0; requests keep the one they began with."""

    version: int
    request: LoRARequest


class VersionedLLM(AsyncLLM):
    """AsyncLLM that gives out only what proven weights said."""

    adapter: Adapter | None = None
    """What new requests are answered with; None: the weights as they are."""

    @cached_property
    def proof(self) -> Proof:
        return Proof()

    @cached_property
    def _adapters(self) -> dict[str, Adapter]:
        """Of the requests in flight, by their ids."""
        return {}

    @property
    def takes_adapters(self) -> bool:
        return self.vllm_config.lora_config is not None

    async def generate(  # type: ignore[override]
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        await self.proof.wait()
        adapter, failures = self.adapter, self.proof.failures
        if adapter is None:
            outputs = super().generate(prompt, sampling_params, request_id, **options)
        else:
            outputs = self.adapted(adapter, prompt, sampling_params, request_id, **options)
        async for output in outputs:
            await self.proof.wait()  # Tokens after a swap wait for its proof, or are never seen.
            if self.proof.failures > failures:
                raise StaleWeightsError("weights that were not proven had a part in this answer: ask again")
            yield output

    async def hold(self) -> None:
        """Hold requests in flight where they are, and forget all keys and values of theirs.

        AsyncLLM.pause_generation sleeps for 20 ms more, so that callers see earlier outputs first: here,
        every output names its version, and waits for its proof.
        """
        await self.renderer.clear_mm_cache_async()
        await self.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)

    async def adapted(
        self, adapter: Adapter, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """What a version's adapter answers, proven or not."""
        self._adapters[request_id] = adapter
        options["lora_request"] = adapter.request
        try:
            async for output in super().generate(prompt, sampling_params, request_id, **options):
                yield _signed(output, adapter.version)
        finally:
            del self._adapters[request_id]

    def first_version(self, request_id: str) -> int | None:
        """Of the first token of a request under way: vLLM's outputs name versions only at the end."""
        if request_id in self._adapters:
            return self._adapters[request_id].version
        processor = self.output_processor
        states = [
            processor.request_states.get(name) for name in processor.external_req_ids.get(request_id, ())
        ]
        starts = [state.weight_version_starts for state in states if state and state.weight_version_starts]
        return int(starts[0][0][0]) if starts else None


def _signed(output: RequestOutput, version: int) -> RequestOutput:
    """By the adapter's version: vLLM names that of the weights below it."""
    for completion in output.outputs:
        if spans := completion.weight_versions:
            completion.weight_versions = [WeightVersionSpan(str(version), spans[0].start, spans[-1].end)]
    return output
