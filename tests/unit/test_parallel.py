"""Several processes compute what one computes; a round that is resumed ends with the same bits."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from textbook import assert_same_gradient, dpo_losses, gradient, load_plain, make_pairs
from torch import Tensor

from dpo_ray.config import TrainingConfig
from dpo_ray.learner import Learner
from dpo_ray.metrics import StepMetrics
from dpo_ray.parallel import Peers, gathered
from dpo_ray.rounds import RoundPlan, RoundResult, train_round
from dpo_ray.types import Pair

# Batches of 5 and 2: four processes have unequal shares of the first, and two have none of the second.
PAIRS, HELD_OUT = make_pairs(7), make_pairs(3, seed=1)
STEPS = {"batch_size": 5, "learning_rate": 1e-4, "tokens_per_pass": 30, "optimizer": "rmsprop"}
LAYOUTS = [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")]
WAYS: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": {"beta": 0.5}},
    "clipped": {"max_grad_norm": 0.1},
    "kto": {"loss": {"type": "kto"}},
    "bco": {"loss": {"type": "bco"}},
    "aot": {"loss": {"type": "aot"}},
    "tdpo2": {"loss": {"type": "tdpo2"}},
    "wpo": {"loss": {"weighting": "wpo"}},
    "sft": {"loss": {"type": "sft"}},
    "LoRA": {"lora": {"rank": 4}},
    "LoRA and kto": {"lora": {"rank": 4}, "loss": {"type": "kto"}},
    "ema": {"reference": {"kind": "ema", "ema_every_steps": 1}},
    "round_start": {"reference": {"kind": "round_start"}},
    "checkpointing": {"activation_checkpointing": True},
    "padded": {"packing": False},
    "max_kl": {"early_stopping": {"eval_every_steps": 1, "max_kl": 100.0}},
}
IN_BFLOAT16 = {"bfloat16": {"loss": {"beta": 0.5}, "precision": "bfloat16"}}


class GradientKeeper(Learner):
    """Keeps whole gradients of all steps, before they were clipped."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gradients: list[Tensor] = []

    def _update(self, batch: list[Pair], losses: Tensor, rate: float) -> float:  # type: ignore[override]
        whole = gathered([p.grad for p in self.policy.trained if p.grad is not None], keep=True)
        self.gradients.append(torch.cat([part.flatten() for part in whole]))
        return super()._update(batch, losses, rate)


def train(folders: tuple[Path, Path], parallelism: str, settings: dict[str, Any], peers: Peers) -> Any:
    """A round's history, what it was evaluated as, its gradients and its weights."""
    # An adapter lies on the start: there is no other policy to go on from.
    folder, start = folders if "lora" not in settings else (folders[1], folders[1])
    config = TrainingConfig.model_validate({**STEPS, **settings, "parallelism": parallelism})
    learner = GradientKeeper(folder, start, config, peers)
    result = train_round(learner, RoundPlan(PAIRS, 0, HELD_OUT), on_step=lambda metrics, total: None)
    return result.history, learner.evaluate(HELD_OUT), learner.gradients, learner.policy.state_dict()


def train_every_way(folders: tuple[Path, Path], parallelism: str, peers: Peers) -> Any:
    return {
        name: train(folders, parallelism, settings, peers)
        for name, settings in {**WAYS, **IN_BFLOAT16}.items()
    }


@pytest.fixture(scope="module")
def folders(tiny_model: Path, near_model: Path) -> tuple[Path, Path]:
    """What is trained, and its reference."""
    return near_model, tiny_model


@pytest.fixture(scope="module")
def alone(folders: tuple[Path, Path]) -> dict[str, Any]:
    return train_every_way(folders, "ddp", Peers())


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"{layout[0]} {layout[1]}")
def together(
    request: pytest.FixtureRequest, folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    num, parallelism = request.param
    function = partial(train_every_way, folders, parallelism)
    return in_processes(num, function, tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize("way", WAYS)
def test_several_processes_compute_what_one_computes(
    together: dict[str, Any], alone: dict[str, Any], way: str
) -> None:
    history, measured, gradients, weights = together[way]
    expected_history, expected_measured, expected_gradients, expected_weights = alone[way]
    assert len(history) == len(expected_history) == 2
    for metrics, expected in zip([*history, measured], [*expected_history, expected_measured], strict=True):
        assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert_same_gradient(ours, theirs)
    apart = [(weights[name] - value).norm() / value.norm() for name, value in expected_weights.items()]
    assert max(apart) < 1e-5


def test_bfloat16_is_near_and_its_weights_stay_in_float32(
    together: dict[str, Any], alone: dict[str, Any]
) -> None:
    expected, _, (gradient, *_), _ = alone["sigmoid"]
    for history, _, gradients, weights in (alone["bfloat16"], together["bfloat16"]):
        assert history[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.02)
        assert_same_gradient(gradients[0], gradient, tolerance=0.05)
        # Not a value of 8 bits: what a step adds is less than bfloat16 can add to a weight.
        assert all(not torch.equal(value, value.bfloat16().float()) for value in weights.values())


def test_gradients_are_the_textbooks(together: dict[str, Any], folders: tuple[Path, Path]) -> None:
    policy, reference = map(load_plain, folders)
    (batch, _) = RoundPlan(PAIRS, 0).batches(TrainingConfig.model_validate(STEPS))
    loss = dpo_losses(policy, reference, batch, beta=0.5).mean()
    loss.backward()
    history, _, gradients, _ = together["sigmoid"]
    assert history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert_same_gradient(gradients[0], gradient(policy))


class Kept:
    """The state after each step, as bytes; every process keeps its own copy of the first one's."""

    def __init__(self, states: list[bytes], peers: Peers) -> None:
        self.states = states
        self.loads = bool(states)
        self._peers = peers

    def load(self) -> dict[str, Any] | None:
        return torch.load(io.BytesIO(self.states[-1]), weights_only=False) if self.loads else None

    def save(self, state: dict[str, Any]) -> None:
        file = io.BytesIO()
        torch.save(state, file)
        states = [file.getvalue()]
        if self._peers.world_size > 1:
            torch.distributed.broadcast_object_list(states)
        self.states.append(states[0])


class KilledError(Exception):
    pass


RESUMED: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "schedule": "cosine", "warmup_steps": 2},
    "rmsprop": {"optimizer": "rmsprop"},
    "LoRA": {"lora": {"rank": 4}},
    "bco": {"loss": {"type": "bco"}},
    "kto": {"loss": {"type": "kto"}},
    "ema": {"reference": {"kind": "ema", "ema_every_steps": 2}},
    "round_start": {"reference": {"kind": "round_start"}},
    "patience": {"early_stopping": {"eval_every_steps": 1, "patience": 3}},
}
ROUND = {**STEPS, "batch_size": 3, "epochs": 2, "checkpoint_every_steps": 1, "learning_rate": 1e-3}
NUM_STEPS = 6


def make(folders: tuple[Path, Path], parallelism: str, settings: dict[str, Any], peers: Peers) -> Learner:
    folder, start = folders if "lora" not in settings else (folders[1], folders[1])
    config = TrainingConfig.model_validate({**ROUND, **settings, "parallelism": parallelism})
    return Learner(folder, start, config, peers)


def first_round(learner: Learner, kept: Kept, on_step: Callable[[StepMetrics, int], None]) -> RoundResult:
    return train_round(learner, RoundPlan(PAIRS, 0, HELD_OUT, 0, 2), on_step=on_step, checkpoints=kept)


def both_rounds(learner: Learner, kept: Kept) -> tuple[list[StepMetrics], dict[str, Tensor]]:
    """Of which the first is resumed where something is kept of it."""
    first = first_round(learner, kept, lambda metrics, total: None)
    second = train_round(
        learner, RoundPlan(make_pairs(4, seed=5), 0, HELD_OUT, 1, 2), on_step=lambda metrics, total: None
    )
    return first.history + second.history, learner.policy.state_dict()


def whole_and_resumed(
    folders: tuple[Path, Path], parallelism: str, settings: dict[str, Any], killed_at: int, peers: Peers
) -> Any:
    """Both rounds at one go, and with a new learner from where the first one was killed."""

    def kill(metrics: StepMetrics, total: int) -> None:
        if metrics["step"] == killed_at:
            raise KilledError

    whole = both_rounds(make(folders, parallelism, settings, peers), Kept([], peers))
    kept = Kept([], peers)
    with pytest.raises(KilledError):
        first_round(make(folders, parallelism, settings, peers), kept, kill)
    assert len(kept.states) == killed_at - 1
    learner = make(folders, parallelism, settings, peers)
    return whole, both_rounds(learner, Kept(kept.states, peers))


def assert_same_bits(whole: Any, resumed: Any) -> None:
    assert len(whole[0]) >= NUM_STEPS
    assert resumed[0] == whole[0]
    assert all(torch.equal(value, resumed[1][name]) for name, value in whole[1].items())


@pytest.mark.parametrize("killed_at", range(1, NUM_STEPS + 1))
def test_a_round_killed_at_any_step_ends_with_the_same_bits(
    folders: tuple[Path, Path], killed_at: int
) -> None:
    assert_same_bits(*whole_and_resumed(folders, "ddp", RESUMED["adamw"], killed_at, Peers()))


@pytest.mark.parametrize("way", RESUMED)
def test_so_does_every_kind_of_round(folders: tuple[Path, Path], way: str) -> None:
    assert_same_bits(*whole_and_resumed(folders, "ddp", RESUMED[way], 4, Peers()))


def resume_every_way(folders: tuple[Path, Path], parallelism: str, peers: Peers) -> Any:
    ways = RESUMED.items()
    return {name: whole_and_resumed(folders, parallelism, settings, 4, peers) for name, settings in ways}


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_so_does_one_of_two_processes(folders: tuple[Path, Path], parallelism: str, tmp_path: Path) -> None:
    results = in_processes(2, partial(resume_every_way, folders, parallelism), tmp_path)
    assert results.keys() == RESUMED.keys()
    for whole, resumed in results.values():
        assert_same_bits(whole, resumed)
