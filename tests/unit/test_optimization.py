"""The learning rate by hand, and optimizers that take the steps of torch's own."""

import math

import pytest
import torch
from torch import nn

from dpo_ray.config import TrainingConfig
from dpo_ray.optimization import learning_rate, make_optimizer


def rates(num: int, *, steps: int, warmup_steps: int, schedule: str) -> list[float]:
    """Of the first `num` of `steps` steps, in units of the peak."""
    config = TrainingConfig.model_validate(
        {"learning_rate": 2e-4, "warmup_steps": warmup_steps, "schedule": schedule}
    )
    return [
        learning_rate(config, step=step, progress=(step - 1) / steps) / 2e-4 for step in range(1, num + 1)
    ]


def test_without_a_schedule_the_rate_is_the_peak() -> None:
    assert rates(3, steps=3, warmup_steps=0, schedule="constant") == [1, 1, 1]


def test_the_warm_up_is_a_line_that_reaches_the_peak_after_its_steps() -> None:
    expected = [1 / 4, 2 / 4, 3 / 4, 1, 1]
    assert rates(5, steps=9, warmup_steps=3, schedule="constant") == pytest.approx(expected)


def test_linear_falls_by_the_same_in_each_step_and_would_be_0_after_the_last() -> None:
    assert rates(4, steps=4, warmup_steps=0, schedule="linear") == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4])


def test_cosine_is_half_way_down_in_the_middle() -> None:
    root = math.sqrt(2)
    expected = [1, (2 + root) / 4, 1 / 2, (2 - root) / 4]
    assert rates(4, steps=4, warmup_steps=0, schedule="cosine") == pytest.approx(expected)


def test_a_schedule_falls_while_the_warm_up_rises() -> None:
    expected = [1 / 2 * 1, 1 * 3 / 4, 2 / 4, 1 / 4]
    assert rates(4, steps=4, warmup_steps=1, schedule="linear") == pytest.approx(expected)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("rmsprop", torch.optim.RMSprop)])
def test_a_step_is_torchs_own_and_leaves_out_what_is_frozen(
    name: str, kind: type[torch.optim.Optimizer]
) -> None:
    def weights() -> list[nn.Parameter]:
        return [nn.Parameter(torch.linspace(-1, 1, 5)), nn.Parameter(torch.ones(2), requires_grad=False)]

    ours, theirs = weights(), weights()
    config = TrainingConfig.model_validate({"optimizer": name, "learning_rate": 0.1, "weight_decay": 0.2})
    optimizers = (make_optimizer(ours, config), kind(theirs[:1], lr=0.1, weight_decay=0.2))  # type: ignore[call-arg]
    for _ in range(3):
        for trained, optimizer in zip((ours[0], theirs[0]), optimizers, strict=True):
            optimizer.zero_grad()
            (trained**3).sum().backward()
            optimizer.step()
    assert torch.equal(ours[0], theirs[0])
    assert not torch.equal(ours[0], weights()[0])
    assert torch.equal(ours[1], torch.ones(2))


def test_weight_decay_is_decoupled_in_adamw() -> None:
    """A weight without gradient shrinks by learning rate times decay, and by nothing else."""
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    make_optimizer([weight], TrainingConfig(learning_rate=0.1, weight_decay=0.5)).step()
    assert weight.tolist() == pytest.approx([0.95] * 3)
