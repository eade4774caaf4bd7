"""The engine and its weights: pushes under way, proofs, and what happens when a proof fails."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from dpo_ray.config import SamplingConfig
from dpo_ray.logprobs import CompletionScorer
from dpo_ray.models import load_model, load_tokenizer, make_canaries, save_policy
from dpo_ray.registry import Canary, PolicyManifest, PolicyRegistry
from dpo_ray.storage import Storage
from serve.deployment import CPU_ENV

if TYPE_CHECKING:
    from serve.engine import PolicyEngine

SEQUENCES = [[5, 9, 12, 7, 30, 4, 8, 11], [6, 6, 6, 40, 41, 42, 43, 44]]


@pytest.fixture
def registry(starter: Path, tmp_path: Path) -> PolicyRegistry:
    """Version 0 is live; 1 and 2 are other weights, and the canaries of 2 are those of 1."""
    registry = PolicyRegistry(Storage(str(tmp_path / "run")))
    tokenizer, canaries = load_tokenizer(starter), []
    for version in range(3):
        model = load_model(starter)
        torch.manual_seed(version)
        with torch.no_grad():
            for parameter in model.parameters() if version else []:
                parameter.add_(0.02 * torch.randn_like(parameter))
        canaries = canaries if version == 2 else make_canaries(CompletionScorer(model, flat=True), SEQUENCES)
        save_policy(model, tokenizer, tmp_path / f"model{version}")
        registry.publish(tmp_path / f"model{version}", PolicyManifest(version=version, canaries=canaries))
    registry.promote(0)
    return registry


@asynccontextmanager
async def running(registry: PolicyRegistry, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator["PolicyEngine"]:
    for name, value in CPU_ENV.items():
        monkeypatch.setenv(name, value)
    from serve.engine import PolicyEngine

    engine = await PolicyEngine.start(registry, SamplingConfig())
    try:
        yield engine
    finally:
        engine.llm.shutdown(timeout=0)


def test_push_keeps_requests_in_flight_and_a_false_proof_ends_the_replica(
    registry: PolicyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with running(registry, monkeypatch) as engine:
            long = {"n": 1, "temperature": 1.0, "max_tokens": 110, "ignore_eos": True}
            in_flight = asyncio.create_task(engine.sample([[5, 6]] * 64, list(range(64)), long))
            await asyncio.sleep(0.4)
            registry.promote(1)
            assert await engine.converge() == 1
            outputs = [output.outputs[0] for output in await in_flight]
            assert all(len(output.token_ids) == 110 for output in outputs)
            spans = [[int(span.version) for span in output.weight_versions or []] for output in outputs]
            assert any(span == [0, 1] for span in spans)
            assert all(span in ([0], [0, 1], [1]) for span in spans)

            registry.promote(2)
            with pytest.raises(RuntimeError, match="version 2 is loaded, but the log-probs are"):
                await engine.converge()
            assert engine.lost
            assert not engine.llm.proven.is_set()  # Requests wait until the replica is replaced.
            with pytest.raises(TimeoutError):
                short = {"n": 1, "temperature": 1.0, "max_tokens": 1}
                await asyncio.wait_for(engine.sample([[5, 6]], [0], short), timeout=1)

    asyncio.run(scenario())


def test_engine_does_not_start_with_weights_that_it_cannot_prove(
    registry: PolicyRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = [Canary(token_ids=ids, logprobs=[-1.0] * (len(ids) - 1)) for ids in SEQUENCES]
    registry.publish(tmp_path / "model0", PolicyManifest(version=3, canaries=wrong))
    registry.promote(3)

    async def scenario() -> None:
        async with running(registry, monkeypatch):
            pass

    with pytest.raises(RuntimeError, match="version 3 is loaded"):
        asyncio.run(scenario())
