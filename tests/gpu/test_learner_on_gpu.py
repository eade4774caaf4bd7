"""The training step on a GPU: flat rows under FlexAttention give what the CPU gives."""

import math
import random
from pathlib import Path

import pytest
import torch

from dpo_ray.config import ReferenceConfig, TrainingConfig
from dpo_ray.learner import Learner
from dpo_ray.parallel import Peers
from dpo_ray.starter import make_random_model
from dpo_ray.types import Pair

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CONFIG = TrainingConfig(
    batch_size=8, learning_rate=1e-4, precision="float32", reference=ReferenceConfig(keep_logps=False)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_random_model(["one two three four five six seven"] * 8, folder, vocab_size=300)
    return folder


def make_pairs(num: int) -> list[Pair]:
    rng = random.Random(0)

    def ids() -> tuple[int, ...]:
        return tuple(rng.randrange(3, 250) for _ in range(rng.randint(1, 90)))

    return [Pair("p", "a", "b", prompt_ids=ids(), chosen_ids=ids(), rejected_ids=ids()) for _ in range(num)]


def steps(model: Path, config: TrainingConfig, device: str) -> list[dict[str, float]]:
    learner = Learner(model, model, config, Peers(device=torch.device(device)))
    return [learner.train_step(make_pairs(8)) for _ in range(3)]


@pytest.mark.parametrize("packing", [True, False])
def test_fp32_steps_are_those_of_the_cpu(model: Path, packing: bool) -> None:
    config = CONFIG.model_copy(update={"packing": packing})
    for ours, theirs in zip(steps(model, config, "cuda"), steps(model, config, "cpu"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def test_bf16_starts_at_log_two_and_learns(model: Path) -> None:
    config = CONFIG.model_copy(update={"precision": "auto"})
    first, *_, last = steps(model, config, "cuda")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/accuracies"] == 0.0
    assert last["loss"] < first["loss"]
