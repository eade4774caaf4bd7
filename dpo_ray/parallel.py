"""Data-parallel processes: who computes what, and how weights, gradients and states are shared."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_ray.config import TrainingConfig


@dataclass(frozen=True, slots=True)
class Peers:
    """This process among the data-parallel ones. Every collective is a no-op for a single process."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls, device: torch.device) -> "Peers":
        if not dist.is_initialized():
            return cls(device=device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


def compute_dtype(config: TrainingConfig, device: torch.device) -> torch.dtype:
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.precision)


def shard(module: nn.Module, config: TrainingConfig, peers: Peers, *, methods: Sequence[str]) -> None:
    """FSDP2, in place: each layer a unit, the rest another one. Nothing is done without fsdp.

    `methods` are called from outside, beside `forward`.
    """
    if config.parallelism != "fsdp" or not dist.is_initialized():
        return
    dtype = compute_dtype(config, peers.device)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            fully_shard(layer, mp_policy=policy)
    fully_shard(module, mp_policy=policy)
    for method in methods:
        register_fsdp_forward_method(module, method)


def weights_of(module: nn.Module) -> list[nn.Parameter]:
    """All weights, as the optimizer knows them: a forward pass leaves some that are sharded whole."""
    if isinstance(module, FSDPModule):
        module.reshard()
    return list(module.parameters())


def parallel(module: nn.Module, config: TrainingConfig, peers: Peers) -> nn.Module:
    """The module whose backward passes exchange gradients."""
    if config.parallelism == "fsdp" or peers.world_size == 1:
        return module
    # Buckets of gradients keep their order from the first step on: a resumed run adds in the same order.
    return DistributedDataParallel(module, find_unused_parameters=True)


@contextmanager
def exchange(module: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Whether the backward pass inside exchanges gradients, or only adds them up here."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)
        yield
    elif isinstance(module, DistributedDataParallel) and not wanted:
        with module.no_sync():
            yield
    else:
        yield


def gathered(tree: Any, *, keep: bool) -> Any:
    """Sharded tensors of dicts and lists made whole, on CPU; a process that does not `keep` gets None.

    Every process must call this: it is a collective.
    """
    if isinstance(tree, dict):
        return {name: gathered(value, keep=keep) for name, value in tree.items()}
    if isinstance(tree, list):
        return [gathered(value, keep=keep) for value in tree]
    if isinstance(tree, Tensor):
        whole = tree.full_tensor() if isinstance(tree, DTensor) else tree
        return whole.detach().cpu().clone() if keep else None
    return tree


def copy_into(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Whole values into weights that may be sharded."""
    with torch.no_grad():
        for target, value in zip(targets, values, strict=True):
            target.copy_(sharded_like(value, target))


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `like` is sharded."""
    value = value.to(like.device)
    if isinstance(like, DTensor) and isinstance(value, DTensor):
        return value.redistribute(like.device_mesh, like.placements)
    if isinstance(like, DTensor) and value.shape == like.shape and value.dim():
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value
