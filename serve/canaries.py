"""Whether an engine agrees with the learner about fixed token sequences: the proof that a push arrived."""

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence

from vllm import SamplingParams
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM

from dpo_ray.registry import Canary
from serve.versioned_llm import Adapter, VersionedLLM

_POSITIONS = 8


async def largest_error(llm: VersionedLLM, canaries: Sequence[Canary], adapter: Adapter | None) -> float:
    """Nats between the engine's and the learner's log-prob of a token, where they differ most."""
    if llm.takes_adapters:
        # Prompt log-probs of several requests at once end an engine that takes adapters.
        asked = [
            _next_error(llm, canary, end, adapter) for canary in canaries for end in _ends(canary.token_ids)
        ]
    else:
        # The first as requests are answered, with what the cache has of it; the others computed anew.
        asked = [_next_error(llm, canary, len(canary.token_ids) - 1, None) for canary in canaries[:1]]
        asked += [_whole_error(llm, canary) for canary in canaries[1:] or canaries]
    return max(await asyncio.gather(*asked), default=0.0)


def _ends(token_ids: Sequence[int]) -> list[int]:
    """Places of tokens, evenly from the second to the last."""
    last = len(token_ids) - 1
    return sorted({max(1, round(last * part / _POSITIONS)) for part in range(1, _POSITIONS + 1)})


async def _whole_error(llm: VersionedLLM, canary: Canary) -> float:
    """Of all tokens, computed anew."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    output = await _answer(llm, canary.token_ids, params, None)
    assert output.prompt_logprobs is not None
    scored = zip(output.prompt_logprobs[1:], canary.token_ids[1:], canary.logprobs, strict=True)
    return max(abs(entry[token].logprob - expected) for entry, token, expected in scored if entry)


async def _next_error(llm: VersionedLLM, canary: Canary, place: int, adapter: Adapter | None) -> float:
    """Of one token, with the keys and values that the cache has of those before it, if any."""
    token = canary.token_ids[place]
    params = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=[token], detokenize=False)
    output = await _answer(llm, canary.token_ids[:place], params, adapter)
    (completion,) = output.outputs
    assert completion.logprobs is not None
    return abs(completion.logprobs[0][token].logprob - canary.logprobs[place - 1])


async def _answer(
    llm: VersionedLLM, token_ids: Sequence[int], params: SamplingParams, adapter: Adapter | None
) -> RequestOutput:
    """The bare engine's: a proof is what others wait for."""
    prompt, request_id = TokensPrompt(prompt_token_ids=list(token_ids)), os.urandom(8).hex()
    if adapter is None:
        return await last(AsyncLLM.generate(llm, prompt, params, request_id))
    return await last(llm.adapted(adapter, prompt, params, request_id))


async def last(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    return [output async for output in outputs][-1]
