"""Adapters are pushed alone: no request is held, each keeps the version that it began with."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dpo_ray.config import LoraConfig, SamplingConfig
from dpo_ray.logprobs import CompletionScorer
from dpo_ray.lora import add_adapter, merged, save_adapter, without_adapter
from dpo_ray.models import load_model, load_tokenizer, make_canaries, save_policy
from dpo_ray.registry import ADAPTER, PolicyManifest, PolicyRegistry
from dpo_ray.storage import Storage
from serve.deployment import engine_environment

if TYPE_CHECKING:
    from serve.engine import PolicyEngine

LORA = LoraConfig(rank=4)
SEQUENCES = [[5, 9, 12, 7, 30, 4, 8, 11] * 5, [6, 6, 6, 40, 41, 42, 43, 44]]
LONG = {"n": 1, "temperature": 1.0, "max_tokens": 110, "ignore_eos": True}
SHORT = {"n": 1, "temperature": 1.0, "max_tokens": 4}


class Adapted:
    """Publishes the start, and then adapters of it."""

    def __init__(self, start: Path, folder: Path) -> None:
        self.registry = PolicyRegistry(Storage(str(folder / "run")))
        self._start = start
        self._folder = folder

    def publish(self, *, seed: int, proof: int | None = None) -> int:
        """The next version, its adapter drawn by `seed`; its canaries are those of the seed `proof`."""
        version = len(self.registry.versions())
        folder = self._folder / f"model{version}"
        self._save(folder, seed)
        canaries = make_canaries(CompletionScorer(load_model(folder), flat=True), SEQUENCES)
        if proof is not None:
            self._save(self._folder / "proof", proof)
            other = CompletionScorer(load_model(self._folder / "proof"), flat=True)
            canaries = make_canaries(other, SEQUENCES)
        self.registry.publish(folder, PolicyManifest(version=version, canaries=canaries))
        return version

    def _save(self, folder: Path, seed: int) -> None:
        model, tokenizer = load_model(self._start), load_tokenizer(self._start)
        if not seed:
            return save_policy(model, tokenizer, folder)
        add_adapter(model, LORA, None)
        torch.manual_seed(seed)
        with torch.no_grad():
            for weights in (weights for name, weights in model.named_parameters() if ".lora_" in name):
                weights.copy_(0.1 * torch.randn_like(weights))
        state = model.state_dict()
        save_adapter(model, state, folder / ADAPTER, base=str(self._start))
        save_policy(without_adapter(model), tokenizer, folder, merged(model, state, LORA))


@pytest.fixture(scope="module")
def versions(starter: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    versions = Adapted(starter, tmp_path_factory.mktemp("adapters"))
    versions.registry.promote(versions.publish(seed=0))
    return versions


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        for name, value in engine_environment(SamplingConfig()).items():
            patch.setenv(name, value)
        yield runner


@pytest.fixture(scope="module")
def engine(versions: Adapted, runner: asyncio.Runner) -> Iterator["PolicyEngine"]:
    from serve.engine import PolicyEngine

    engine = runner.run(PolicyEngine.start(versions.registry, SamplingConfig(lora_rank=LORA.rank)))
    yield engine
    engine.llm.shutdown(timeout=0)


def test_requests_end_with_the_adapter_that_they_began_with(
    engine: "PolicyEngine", versions: Adapted, runner: asyncio.Runner
) -> None:
    pushed = [versions.publish(seed=seed) for seed in (1, 2, 3)]

    async def scenario() -> list[Any]:
        requests = []
        for version in pushed:
            requests.append(asyncio.create_task(engine.sample([[5, 6]] * 8, list(range(8)), LONG)))
            await asyncio.sleep(0.1)
            versions.registry.promote(version)
            assert await engine.converge() == version
            assert engine.canary_error < 1e-4
        requests.append(asyncio.create_task(engine.sample([[5, 6]] * 8, list(range(8)), LONG)))
        return await asyncio.gather(*requests)

    for expected, outputs in zip([0, *pushed], runner.run(scenario()), strict=True):
        completions = [output.outputs[0] for output in outputs]
        assert all(len(completion.token_ids) == 110 for completion in completions)
        spans = [[(int(s.version), s.start, s.end) for s in c.weight_versions or []] for c in completions]
        assert all(span == [(expected, 0, 110)] for span in spans)
    assert set(engine.push_ms) == {"fetch", "check", "load", "prove"}
    versions.registry.rollback(0, by="test", reason="adapters off")
    assert runner.run(engine.converge()) == 0


@pytest.mark.parametrize("mistake", ["not applied", "flipped bit", "no adapter"])
def test_an_adapter_that_is_not_the_learners_is_caught(
    engine: "PolicyEngine", versions: Adapted, runner: asyncio.Runner, mistake: str
) -> None:
    from serve.engine import StaleWeightsError

    version = versions.publish(
        seed=0 if mistake == "no adapter" else 4, proof=5 if mistake == "not applied" else None
    )
    if mistake == "flipped bit":
        file = versions.registry.fetch(version, part=ADAPTER) / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    versions.registry.promote(version)
    with pytest.raises(StaleWeightsError, match=f"version {version} is not proven"):
        runner.run(engine.converge())
    versions.registry.rollback(0, by="test", reason="it cannot be proven")
    assert runner.run(engine.converge()) == 0
    assert len(runner.run(engine.sample([[5, 6]], [0], SHORT))) == 1
