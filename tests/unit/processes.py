"""Runs a function in several processes that meet over gloo, forked from this one."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpo_ray.parallel import Peers

SECONDS = 120


def in_processes(num: int, function: Callable[[Peers], Any], folder: Path) -> Any:
    """What `function` returned in the first of `num` processes; `folder` is for the results."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")  # Torch need not be imported again in each.
    processes = [
        context.Process(target=_run, args=(rank, num, port, function, folder / "result.pt"))
        for rank in range(num)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * num
    return torch.load(folder / "result.pt", weights_only=False)


def _run(rank: int, num: int, port: int, function: Callable[[Peers], Any], result: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=num)
    value = function(Peers.current(torch.device("cpu")))
    if rank == 0:
        torch.save(value, result)
    # One that has ended closes its connections, in which another may still be waiting.
    dist.barrier()
    dist.destroy_process_group()
