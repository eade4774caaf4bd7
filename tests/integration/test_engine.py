"""The engine and its weights: pushes under way, their proofs, and every mistake that a proof must catch."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from dpo_ray.config import SamplingConfig
from dpo_ray.logprobs import CompletionScorer
from dpo_ray.models import load_model, load_tokenizer, make_canaries, save_policy
from dpo_ray.registry import Canary, PolicyManifest, PolicyRegistry
from dpo_ray.storage import Storage
from serve.deployment import engine_environment

if TYPE_CHECKING:
    from serve.engine import PolicyEngine

# Longer than a block of the prefix cache.
SEQUENCES = [[5, 9, 12, 7, 30, 4, 8, 11] * 5, [6, 6, 6, 40, 41, 42, 43, 44]]
LONG = {"n": 1, "temperature": 1.0, "max_tokens": 110, "ignore_eos": True}
SHORT = {"n": 1, "temperature": 1.0, "max_tokens": 4}


class Versions:
    """Publishes variants of a starting model, one version after the other."""

    def __init__(self, start: Path, folder: Path) -> None:
        self.registry = PolicyRegistry(Storage(str(folder / "run")))
        self._start = start
        self._folder = folder

    def model(self, *, seed: int) -> PreTrainedModel:
        """The start, with other weights for each seed but 0."""
        model = load_model(self._start)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters() if seed else []:
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model

    def publish(
        self,
        model: PreTrainedModel,
        *,
        proof: PreTrainedModel | None = None,
        change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda tensors: tensors,
    ) -> int:
        """The next version; its canaries are of `proof`, its tensors are changed before."""
        version = len(self.registry.versions())
        folder = self._folder / f"model{version}"
        save_policy(model, load_tokenizer(self._start), folder)
        (file,) = folder.glob("*.safetensors")
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        canaries = make_canaries(CompletionScorer(proof or model, flat=True), SEQUENCES)
        self.registry.publish(folder, PolicyManifest(version=version, canaries=canaries))
        return version

    def file(self, version: int) -> Path:
        (file,) = self.registry.fetch(version).glob("*.safetensors")
        return file


@pytest.fixture(scope="module")
def versions(starter: Path, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    versions = Versions(starter, tmp_path_factory.mktemp("versions"))
    versions.registry.promote(versions.publish(versions.model(seed=0)))
    return versions


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Runs coroutines in the one event loop that the engine lives in."""
    with asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        for name, value in engine_environment(SamplingConfig()).items():
            patch.setenv(name, value)
        yield runner.run


@pytest.fixture(scope="module")
def shared_engine(versions: Versions, run: Any) -> Iterator["PolicyEngine"]:
    import serve.engine
    from serve.engine import PolicyEngine

    args = serve.engine.engine_args

    def faulty(*arguments: Any) -> Any:
        settings = args(*arguments)
        settings.worker_extension_cls = "tests.integration.faulty_weights.FaultyWeights"
        return settings

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve.engine, "engine_args", faulty)
        engine = run(PolicyEngine.start(versions.registry, SamplingConfig()))
    yield engine
    engine.llm.shutdown(timeout=0)


@pytest.fixture
def engine(shared_engine: "PolicyEngine", versions: Versions, run: Any) -> Iterator["PolicyEngine"]:
    """It holds version 0, and afterwards comes back to it, whatever happened: a rollback mends it."""
    yield shared_engine
    run(shared_engine.llm.collective_rpc("choose", args=("",)))
    versions.registry.promote(0)
    assert run(shared_engine.converge()) == 0
    assert shared_engine.describe().state == "serving"
    assert len(run(shared_engine.sample([[5, 6]], [0], SHORT))) == 1


def test_requests_in_flight_go_on_across_a_push(engine: "PolicyEngine", versions: Versions, run: Any) -> None:
    version = versions.publish(versions.model(seed=1))

    async def scenario() -> list[Any]:
        in_flight = asyncio.create_task(engine.sample([[5, 6]] * 64, list(range(64)), LONG))
        await asyncio.sleep(0.4)
        versions.registry.promote(version)
        assert await engine.converge() == version
        return [output.outputs[0] for output in await in_flight]

    outputs = run(scenario())
    assert all(len(output.token_ids) == 110 for output in outputs)
    spans = [[int(span.version) for span in output.weight_versions or []] for output in outputs]
    assert any(span == [0, version] for span in spans)
    assert all(span in ([0], [0, version], [version]) for span in spans)
    state = engine.describe()
    assert state.canary_error < 1e-4
    assert set(state.push_ms) == {"fetch", "check", "load", "pause", "swap", "resume", "prove"}


async def stream(engine: "PolicyEngine", seen: list[int]) -> None:
    """A greedy answer, whose tokens are added to `seen` as they are given out."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0, max_tokens=110, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    async for output in engine.llm.generate({"prompt_token_ids": [5, 6]}, params, os.urandom(8).hex()):
        seen += output.outputs[0].token_ids


def test_a_stream_goes_on_while_weights_load_and_waits_for_their_proof(
    engine: "PolicyEngine", versions: Versions, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.engine import StaleWeightsError

    expected: list[int] = []
    run(stream(engine, expected))
    hold, seen, loaded = engine.llm.hold, list[int](), list[int]()

    async def hold_later() -> None:
        loaded.append(len(seen))
        while len(seen) < loaded[0] + 3:
            await asyncio.sleep(0.01)
        await hold()

    async def refuse_later(*_: Any) -> None:
        await asyncio.sleep(0.5)  # The engine goes on meanwhile, with the new weights.
        raise StaleWeightsError("it never agrees")

    async def scenario() -> None:
        in_flight = asyncio.create_task(stream(engine, seen))
        while len(seen) < 10:
            await asyncio.sleep(0.01)
        with pytest.raises(StaleWeightsError):
            await engine.converge()
        with pytest.raises(StaleWeightsError):
            await in_flight

    versions.registry.promote(versions.publish(versions.model(seed=1)))
    with monkeypatch.context() as patch:
        patch.setattr(engine.llm, "hold", hold_later)
        patch.setattr(engine, "_prove", refuse_later)
        run(asyncio.wait_for(scenario(), 60))
    assert 13 <= len(seen) < 110
    assert seen == expected[: len(seen)]  # No token of weights that were not proven.


def refused(engine: "PolicyEngine", versions: Versions, run: Any, version: int) -> str:
    """Why the engine refuses a version; it then says nothing, to new requests and to those in flight."""
    from serve.engine import StaleWeightsError

    async def scenario() -> str:
        in_flight = asyncio.create_task(engine.sample([[5, 6]] * 64, list(range(64)), LONG))
        await asyncio.sleep(0.1)
        versions.registry.promote(version)
        with pytest.raises(StaleWeightsError) as refusal:
            await engine.converge()
        with pytest.raises(StaleWeightsError):
            await engine.sample([[5, 6]], [0], SHORT)
        with pytest.raises(StaleWeightsError):
            await in_flight
        return str(refusal.value)

    reason = run(scenario())
    assert (engine.describe().state, engine.describe().reason) == ("refused", reason)
    assert reason.startswith(f"version {version} is not proven, so this replica answers nothing: ")
    return reason


def test_a_flipped_bit_is_caught(engine: "PolicyEngine", versions: Versions, run: Any) -> None:
    version = versions.publish(versions.model(seed=1))
    file = versions.file(version)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "is not the file that version" in refused(engine, versions, run, version)


def test_a_missing_tensor_is_caught(engine: "PolicyEngine", versions: Versions, run: Any) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    version = versions.publish(
        versions.model(seed=1), change=lambda tensors: {n: t for n, t in tensors.items() if n != name}
    )
    assert name in refused(engine, versions, run, version)


def swapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    def other(name: str) -> str:
        return name.translate(str.maketrans({"0": "1", "1": "0"})) if ".layers." in name else name

    return {other(name): tensor for name, tensor in tensors.items()}


def test_swapped_layers_are_caught(engine: "PolicyEngine", versions: Versions, run: Any) -> None:
    version = versions.publish(versions.model(seed=1), change=swapped)
    assert "nats from the learner's" in refused(engine, versions, run, version)


def test_an_adapter_that_was_not_merged_is_caught(
    engine: "PolicyEngine", versions: Versions, run: Any
) -> None:
    version = versions.publish(versions.model(seed=0), proof=versions.model(seed=1))
    assert "nats from the learner's" in refused(engine, versions, run, version)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("nothing is taken", "nats from the learner's"),
        ("load breaks off", "the sender is gone"),
        ("reload leaves the head", "nats from the learner's"),
        ("reload breaks off", "the sender is gone"),
    ],
)
def test_a_load_that_goes_wrong_is_caught(
    engine: "PolicyEngine", versions: Versions, run: Any, fault: str, reason: str
) -> None:
    version = versions.publish(versions.model(seed=1))
    run(engine.llm.collective_rpc("choose", args=(fault,)))
    assert reason in refused(engine, versions, run, version)


def test_an_answer_with_tokens_of_a_failed_swap_is_never_seen(
    engine: "PolicyEngine", versions: Versions, run: Any
) -> None:
    from serve.engine import StaleWeightsError

    version = versions.publish(versions.model(seed=1))
    run(engine.llm.collective_rpc("choose", args=("nothing is taken once",)))

    async def scenario() -> int:
        in_flight = asyncio.create_task(stream(engine, seen))
        while not seen:
            await asyncio.sleep(0.01)
        versions.registry.promote(version)
        held = await engine.converge()  # The second swap succeeds.
        with pytest.raises(StaleWeightsError, match="ask again"):
            await in_flight
        return held

    seen: list[int] = []
    assert run(scenario()) == version
    assert engine.describe().state == "serving"


@pytest.mark.parametrize("way", ["reload", "reload breaks off once"])
def test_the_live_model_is_reloaded_where_no_second_has_room(
    engine: "PolicyEngine", versions: Versions, run: Any, way: str
) -> None:
    version = versions.publish(versions.model(seed=1))
    run(engine.llm.collective_rpc("choose", args=(way,)))
    versions.registry.promote(version)
    assert run(engine.converge()) == version
    assert engine.describe().canary_error < 1e-4


def test_a_stale_cache_is_caught(
    engine: "PolicyEngine", versions: Versions, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = versions.publish(versions.model(seed=1))

    async def keeps_cache() -> None:
        await engine.llm.pause_generation(mode="keep", clear_cache=False)

    with monkeypatch.context() as patch:
        patch.setattr(engine.llm, "hold", keeps_cache)
        assert "nats from the learner's" in refused(engine, versions, run, version)


def test_an_engine_does_not_start_with_weights_that_it_cannot_prove(
    versions: Versions, run: Any, starter: Path, tmp_path: Path
) -> None:
    from serve.engine import PolicyEngine

    registry = PolicyRegistry(Storage(str(tmp_path / "run")))
    save_policy(load_model(starter), load_tokenizer(starter), tmp_path / "model")
    wrong = [Canary(token_ids=ids, logprobs=[-1.0] * (len(ids) - 1)) for ids in SEQUENCES]
    registry.publish(tmp_path / "model", PolicyManifest(version=0, canaries=wrong))
    registry.promote(0)
    with pytest.raises(RuntimeError, match="version 0 is loaded"):
        run(PolicyEngine.start(registry, SamplingConfig()))


def test_weights_spread_over_two_workers_are_pushed_and_proven(versions: Versions, run: Any) -> None:
    from serve.engine import PolicyEngine

    version = versions.publish(versions.model(seed=1))
    engine = run(PolicyEngine.start(versions.registry, SamplingConfig(tensor_parallel_size=2)))
    try:
        versions.registry.promote(version)
        assert run(engine.converge()) == version
        assert engine.describe().canary_error < 1e-4
    finally:
        versions.registry.promote(0)
        engine.llm.shutdown(timeout=0)
