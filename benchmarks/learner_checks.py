"""Gradients against TRL's, FLOPs against the least possible, speed against the machine's own."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from learner_peers import make_trl_trainer, trl_row
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dpo_ray.config.loss import LossConfig
from dpo_ray.config.training import ReferenceConfig, TrainingConfig
from dpo_ray.learner import Learner, Peers
from dpo_ray.types import Pair

Settings = Mapping[str, Any]
_aten = torch.ops.aten

LOSSES: dict[str, tuple[Settings, Settings]] = {
    "sigmoid": ({}, {"type": "sigmoid"}),
    "ipo": ({}, {"type": "ipo", "ipo_normalize": "mean"}),
    "hinge": ({}, {"type": "hinge"}),
    "sigmoid_norm": ({}, {"type": "sigmoid_norm"}),
    "robust": ({"label_smoothing": 0.1}, {"type": "robust", "label_smoothing": 0.1}),
    "exo_pair": ({"label_smoothing": 0.1}, {"type": "exo", "label_smoothing": 0.1}),
    "nca_pair": ({}, {"type": "nca"}),
    "sppo_hard": ({}, {"type": "sppo"}),
    "aot": ({"label_smoothing": 0.1}, {"type": "aot", "label_smoothing": 0.1}),
    "aot_unpaired": ({"label_smoothing": 0.1}, {"type": "aot_unpaired", "label_smoothing": 0.1}),
    "apo_zero": ({}, {"type": "apo_zero"}),
    "apo_down": ({}, {"type": "apo_down"}),
    # At its default of 0.05, tau multiplies the rounding of both sides by 20.
    "discopop": ({"discopop_tau": 0.5}, {"type": "discopop", "discopop_tau": 0.5}),
    "sft": ({}, {"type": "sft"}),
    "sigmoid + sft": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        {"type": "sigmoid", "plus": ({"type": "sft", "weight": 0.2},)},
    ),
    "sigmoid, forward KL": (
        {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
        {"type": "sigmoid", "divergence": "forward_kl"},
    ),
    "sigmoid, JS": (
        {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
        {"type": "sigmoid", "divergence": "js"},
    ),
    "sigmoid, alpha": (
        {"loss_type": "sigmoid", "f_divergence_type": "alpha_divergence"},
        {"type": "sigmoid", "divergence": "alpha"},
    ),
    "sigmoid, WPO": (
        {"loss_type": "sigmoid", "use_weighting": True},
        {"type": "sigmoid", "weighting": "wpo"},
    ),
    "sigmoid, LD": ({"loss_type": "sigmoid", "ld_alpha": 0.5}, {"type": "sigmoid", "ld_alpha": 0.5}),
}
"""What TRL calls a loss (where nothing else is said, its `loss_type`), TRL's other settings, and ours.

TRL's bco_pair is not here: it leaves out the running mean of the rewards, which our bco has as its paper."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Ours from TRL's, relative to TRL's value, and to the norm of TRL's gradient."""

    loss: float
    gradient: float


def differences(
    policy: Path, reference: Path, pairs: Sequence[Pair], names: Sequence[str]
) -> Iterator[tuple[str, Difference]]:
    """One batch under a policy that is not its reference, loss by loss. Gradients are of all weights."""
    for name in names:
        theirs, ours = LOSSES[name]
        their_loss, their_gradient = _trl_gradient(policy, reference, pairs, {"loss_type": name, **theirs})
        our_loss, our_gradient = _our_gradient(policy, reference, pairs, ours)
        assert our_gradient.keys() == their_gradient.keys()
        squared = sum(((our_gradient[key] - theirs) ** 2).sum() for key, theirs in their_gradient.items())
        norm = sum((theirs**2).sum() for theirs in their_gradient.values())
        yield name, Difference(abs(our_loss - their_loss) / abs(their_loss), float(squared / norm) ** 0.5)


def _trl_gradient(
    policy: Path, reference: Path, pairs: Sequence[Pair], settings: Settings
) -> tuple[float, dict[str, Tensor]]:
    """By TRL's own collator and `compute_loss`."""
    given = {"output_dir": str(policy.parent / "trl"), "use_cpu": True, "bf16": False, **settings}
    start = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    trainer = make_trl_trainer(str(policy), pairs, given, ref_model=start)
    rows = trainer.data_collator([trl_row(pair) for pair in pairs])
    loss = trainer.compute_loss(trainer.model.train(), rows)
    loss.backward()
    return loss.item(), {name: weight.grad.double() for name, weight in trainer.model.named_parameters()}


def _our_gradient(
    policy: Path, reference: Path, pairs: Sequence[Pair], settings: Settings
) -> tuple[float, dict[str, Tensor]]:
    """What one training step hands to the optimizer."""
    config = TrainingConfig(
        loss=LossConfig(**settings), reference=ReferenceConfig(keep_logps=False), max_grad_norm=1e9
    )
    learner = Learner(policy, reference, config, Peers())
    gradient: dict[str, Tensor] = {}

    def keep(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for name, weight in learner.model.named_parameters():
            assert weight.grad is not None
            gradient[name] = weight.grad.double()

    hook = register_optimizer_step_pre_hook(keep)
    loss = learner.train_step(pairs)["loss"]
    hook.remove()
    return loss, gradient


@dataclass(frozen=True, slots=True)
class Work:
    """What our steps compute, on one thread."""

    counted_flops: int
    product_flops: int
    """Of these, the matrix products'."""
    step_s: float
    product_s: float
    """CPU-seconds of the same matrix products alone."""


def measure_work(
    model: Path,
    batches: Sequence[Sequence[Pair]],
    *,
    tokens_per_pass: int | None,
    on_batch: Callable[[], object],
) -> Work:
    """Each batch three times, by turns: counted, timed, and its matrix products alone."""
    reference = ReferenceConfig(keep_logps=False)
    config = TrainingConfig(tokens_per_pass=tokens_per_pass, reference=reference)
    learner = Learner(model, model, config, Peers())
    learner.evaluate(list(itertools.chain.from_iterable(batches)))  # Computes the reference.
    counted = product_flops = 0
    step_s = product_s = 0.0
    for batch in batches:
        with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter, Products() as products:
            learner.train_step(batch)
        counted += counter.get_total_flops()
        product_flops += products.flops
        step_s += _cpu_s(lambda batch=batch: learner.train_step(batch))
        product_s += products.replay()
        on_batch()
    return Work(counted, product_flops, step_s, product_s)


def _cpu_s(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def _accumulated_product(out: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products of all queries with all keys, hidden ones too."""
    batch, heads, queries, channels = query
    return 4 * batch * heads * queries * key[2] * channels


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Five products, since the scores are computed again."""
    return _attention(query, key, value) * 5 // 2


_UNCOUNTED: dict[Any, Any] = {
    _aten.addmm_: _accumulated_product,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operators of a step that torch's own counter takes to be free."""


class Products(TorchDispatchMode):
    """Notes the shapes and strides of all matrix products, to repeat them."""

    _OPERANDS: ClassVar = {_aten.mm: (0, 1), _aten.addmm: (1, 2), _aten.addmm_: (1, 2), _aten.bmm: (0, 1)}

    def __init__(self) -> None:
        super().__init__()
        self._seen: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in self._OPERANDS:
            operands = [args[place] for place in self._OPERANDS[func.overloadpacket]]
            self._seen[tuple((tuple(each.shape), each.stride(), each.dtype) for each in operands)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> int:
        return sum(times * _product_flops(left, right) for (left, right), times in self._seen.items())

    def replay(self) -> float:
        """CPU-seconds of all of them, on other numbers."""
        seconds = 0.0
        for (left, right), times in self._seen.items():
            a, b = _like(*left), _like(*right)
            out = a @ b
            seconds += _cpu_s(lambda a=a, b=b, out=out, times=times: _repeat(a, b, out, times))
        return seconds


def _product_flops(left: Any, right: Any) -> int:
    *batch, rows, inner = left[0]
    return 2 * (batch[0] if batch else 1) * rows * inner * right[0][-1]


def _like(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype).normal_()


def _repeat(a: Tensor, b: Tensor, out: Tensor, times: int) -> None:
    for _ in range(times):
        torch.matmul(a, b, out=out)


def gpu_matmul_rate(*, size: int = 8192, times: int = 50) -> float:
    """FLOP/s of large bf16 matrix products."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    _repeat(a, b, out, times)
    torch.cuda.synchronize()
    return times * 2 * size**3 / (time.perf_counter() - started)
