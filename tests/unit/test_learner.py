"""A step is the textbook step, however its batch is divided; a round goes on as if never interrupted."""

import math
import multiprocessing
import os
import random
import socket
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.spawn import start_processes

from dpo_ray.config import LossConfig, TrainingConfig
from dpo_ray.learner import Learner, Peers, TrainingError
from dpo_ray.models import load_model
from dpo_ray.types import Pair

Weights = dict[str, torch.Tensor]

CONFIG = TrainingConfig(
    loss=LossConfig(beta=0.5), learning_rate=1e-5, batch_size=4, micro_batch_size=3, weight_decay=0.01
)
CPU = torch.device("cpu")


def make_pairs(num: int, *, seed: int = 0) -> list[Pair]:
    rng = random.Random(seed)

    def ids() -> tuple[int, ...]:
        return tuple(rng.randrange(3, 60) for _ in range(rng.randint(1, 9)))

    return [Pair("p", "a", "b", prompt_ids=ids(), chosen_ids=ids(), rejected_ids=ids()) for _ in range(num)]


def make_learner(folder: Path, config: TrainingConfig = CONFIG, *, reference: Path | None = None) -> Learner:
    return Learner(folder, reference or folder, config, Peers())


def weights(learner: Learner) -> Weights:
    return {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}


def assert_same_update(ours: Weights, theirs: Weights, before: Weights) -> None:
    """Weights to 1e-6, and the change of all weights together to a thousandth.

    Of a gradient that is nothing but rounding, AdamW makes a step like any other: single weights may
    differ by a part of the learning rate.
    """
    assert ours.keys() == theirs.keys() == before.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-6
    moved = torch.cat([(theirs[name] - before[name]).flatten() for name in ours])
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours])
    assert moved.abs().max() > CONFIG.learning_rate / 2
    assert apart.norm() < 1e-3 * moved.norm()


def ignore(metrics: dict[str, float], num_steps: int) -> None:
    pass


def test_the_first_step_costs_log_two_and_no_pair_counts_as_right(tiny_model: Path) -> None:
    # In one micro-batch the reference reads the same rows as the policy: not even rounding differs.
    config = CONFIG.model_copy(update={"micro_batch_size": 9})
    metrics = make_learner(tiny_model, config).train_step(make_pairs(9))
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/accuracies", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert metrics[name] == 0.0, name
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize("seed", range(4))
def test_the_first_step_costs_log_two_in_micro_batches_too(tiny_model: Path, seed: int) -> None:
    metrics = make_learner(tiny_model).train_step(make_pairs(9, seed=seed))
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)


def step_alone(folder: Path, pairs: list[Pair], config: TrainingConfig = CONFIG) -> tuple[Weights, float]:
    """Weights and gradient norm after one step of a learner in this process alone."""
    learner = make_learner(folder, config)
    norm = learner.train_step(pairs)["grad_norm"]
    return weights(learner), norm


def naive_steps(
    folder: Path, pairs: list[Pair], config: TrainingConfig, *, num_steps: int
) -> tuple[Weights, float]:
    """Eq. 7 of arXiv:2305.18290 pair by pair, without padding, with a second model as the reference."""
    policy, reference = load_model(folder), load_model(folder)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )

    def logp(model: Any, pair: Pair, answer: tuple[int, ...]) -> torch.Tensor:
        ids = torch.tensor([[*pair.prompt_ids, *answer]])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        return logps[len(pair.prompt_ids) - 1 :].sum()

    def log_ratio(pair: Pair, answer: tuple[int, ...]) -> torch.Tensor:
        return logp(policy, pair, answer) - logp(reference, pair, answer).detach()

    norm = 0.0
    for _ in range(num_steps):
        margins = [log_ratio(pair, pair.chosen_ids) - log_ratio(pair, pair.rejected_ids) for pair in pairs]
        optimizer.zero_grad()
        (-F.logsigmoid(config.loss.beta * torch.stack(margins)).mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}, norm


@pytest.mark.parametrize("max_grad_norm", [1e9, 0.5])
def test_steps_are_those_of_a_plain_loop(tiny_model: Path, max_grad_norm: float) -> None:
    config = CONFIG.model_copy(update={"max_grad_norm": max_grad_norm})
    pairs = make_pairs(5)
    learner = make_learner(tiny_model, config)
    before = weights(learner)
    norms = [learner.train_step(pairs)["grad_norm"] for _ in range(2)]
    expected, norm = naive_steps(tiny_model, pairs, config, num_steps=2)
    assert norms[-1] == pytest.approx(norm, rel=1e-4)
    assert_same_update(weights(learner), expected, before)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 7])
def test_micro_batches_do_not_change_the_step(tiny_model: Path, micro_batch_size: int) -> None:
    pairs = make_pairs(7)
    config = CONFIG.model_copy(update={"micro_batch_size": micro_batch_size})
    (whole, whole_norm), (divided, norm) = (
        step_alone(tiny_model, pairs),
        step_alone(tiny_model, pairs, config),
    )
    assert norm == pytest.approx(whole_norm, rel=1e-5)
    assert_same_update(divided, whole, weights(make_learner(tiny_model)))


def test_the_learning_rate_warms_up_over_the_whole_run(tiny_model: Path) -> None:
    config = CONFIG.model_copy(update={"warmup_steps": 3})
    learner = make_learner(tiny_model, config)
    rates = [learner.train_step(make_pairs(2))["learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([0.25e-5, 0.5e-5, 0.75e-5, 1e-5, 1e-5])


def test_an_epoch_sees_every_pair_once_in_an_order_of_its_own(tiny_model: Path) -> None:
    config = CONFIG.model_copy(update={"epochs": 2, "batch_size": 4})
    learner, pairs = Recorder(tiny_model, tiny_model, config, Peers()), make_pairs(10)
    totals: list[int] = []
    history = learner.train_round(pairs, seed="0 0", on_step=lambda metrics, total: totals.append(total))
    assert [len(batch) for batch in learner.batches] == [4, 4, 2, 4, 4, 2]
    epochs = [list(chain(*learner.batches[:3])), list(chain(*learner.batches[3:]))]
    assert [sorted(epoch) for epoch in epochs] == [sorted(pair.pair_id for pair in pairs)] * 2
    assert epochs[0] != epochs[1]
    assert totals == [6] * 6
    assert [metrics["step"] for metrics in history] == [1, 2, 3, 4, 5, 6]


class Recorder(Learner):
    """Notes the pair ids of each batch."""

    batches: list[list[str]]

    def train_step(self, batch: Sequence[Pair]) -> dict[str, float]:
        self.batches = [*getattr(self, "batches", []), [pair.pair_id for pair in batch]]
        return super().train_step(batch)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tiny_model: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"warmup_steps": 4})
    rounds = [make_pairs(9, seed=1), make_pairs(9, seed=2)]
    whole = make_learner(tiny_model, config)
    whole.train_round(rounds[0], seed="0 0", on_step=ignore)
    whole.save(tmp_path / "policy")
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    uninterrupted = whole.train_round(rounds[1], seed="0 1", on_step=ignore)

    resumed = make_learner(tmp_path / "policy", config, reference=tiny_model)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.train_round(rounds[1], seed="0 1", on_step=ignore) == uninterrupted
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(resumed).items())
    assert resumed.step == 6


def test_a_weight_that_is_no_number_stops_training_and_names_the_pairs(tiny_model: Path) -> None:
    learner, pairs = make_learner(tiny_model), make_pairs(2)
    with torch.no_grad():
        next(learner.model.parameters())[:] = math.nan
    with pytest.raises(TrainingError, match=rf"step 1; pairs: {pairs[0].pair_id}, {pairs[1].pair_id}"):
        learner.train_step(pairs)
    assert learner.step == 0


def _train_in_group(rank: int, port: int, folder: Path, sizes: list[int], out: Path) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for size in sizes:
        learner = Learner(folder, folder, CONFIG, Peers.current(CPU))
        metrics = learner.train_step(make_pairs(size))
        torch.save((weights(learner), metrics), out / f"{size}-{rank}.pt")
    dist.barrier()
    os._exit(0)  # Gloo's own end, with a gradient reducer still alive, hung once.


def test_two_processes_take_the_step_of_one(tiny_model: Path, tmp_path: Path) -> None:
    """Also of a batch that they cannot halve, that leaves one of them without a pair, or in micro-batches."""
    sizes = [4, 7, 1]
    before = weights(make_learner(tiny_model))
    # Both processes share the seconds that the imports take.
    multiprocessing.set_forkserver_preload(["dpo_ray.learner"])
    args = (free_port(), tiny_model, sizes, tmp_path)
    start_processes(_train_in_group, args=args, nprocs=2, start_method="forkserver")
    for size in sizes:
        alone = make_learner(tiny_model)
        expected = alone.train_step(make_pairs(size))
        (ours, metrics), (theirs, their_metrics) = (
            torch.load(tmp_path / f"{size}-{rank}.pt", weights_only=True) for rank in range(2)
        )
        assert metrics == their_metrics
        compared = [name for name in expected if name != "rewards/accuracies"]  # All are ties here.
        assert [metrics[n] for n in compared] == pytest.approx([expected[n] for n in compared], abs=1e-4)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert_same_update(ours, weights(alone), before)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
