"""A version's files, sent at once to every node as one packed stream: NCCL between GPUs, gloo elsewhere."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dpo_ray.registry import PolicyRegistry
from dpo_ray.types import Stream

_CHUNK = 256 << 20
"""Bytes of one message: a GPU holds that much, and not the whole version once more."""
_ARRIVED, _ALL_ARRIVED = "arrived ", "all arrived"
_TIMEOUT = timedelta(seconds=60)


def send(stream: Stream, registry: PolicyRegistry) -> None:
    """Send the version's files, in the order of the manifest; return when all receivers have them."""
    store = _store(stream)
    group, device = _join(stream, store, 0), torch.device(stream.device)
    folder = registry.fetch(stream.version, part=stream.part)
    files = [folder / name for name in registry.files(stream.version, part=stream.part)]
    sizes = torch.tensor([file.stat().st_size for file in files], dtype=torch.int64, device=device)
    group.broadcast(sizes, 0).wait()
    for part in _parts(files, sizes.tolist(), shared=False):
        group.broadcast(part.to(device), 0).wait()
    store.wait([f"{_ARRIVED}{receiver}" for receiver in stream.receivers])
    store.set(_ALL_ARRIVED, "")


def receive(stream: Stream, registry: PolicyRegistry, receiver: str) -> None:
    """Take the files to this node: `registry.fetch` checks and gives them."""
    store = _store(stream)
    group = _join(stream, store, stream.rank(receiver))
    names = registry.files(stream.version, part=stream.part)
    registry.bring(
        stream.version, lambda folder: _write(group, stream, [folder / n for n in names]), part=stream.part
    )
    store.set(f"{_ARRIVED}{receiver}", "")
    store.wait([_ALL_ARRIVED])  # Whoever leaves earlier breaks the connections of the others.


def _write(group: dist.ProcessGroup, stream: Stream, files: Sequence[Path]) -> None:
    device = torch.device(stream.device)
    sizes = torch.empty(len(files), dtype=torch.int64, device=device)
    group.broadcast(sizes, 0).wait()
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for part in _parts(files, sizes.tolist(), shared=True):
        arrived = part if device.type == "cpu" else torch.empty_like(part, device=device)
        group.broadcast(arrived, 0).wait()
        part.copy_(arrived)


def _parts(files: Sequence[Path], sizes: Sequence[int], *, shared: bool) -> Iterator[Tensor]:
    """[at most _CHUNK] bytes of the files, in order; `shared`: written to the file when they change."""
    for file, size in zip(files, sizes, strict=True):
        if size:
            yield from torch.from_file(str(file), shared=shared, size=size, dtype=torch.uint8).split(_CHUNK)


def meeting_place(host: str) -> TCPStore:
    """At a free port of this host, for as long as it is held."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)


def _store(stream: Stream) -> TCPStore:
    return TCPStore(stream.host, stream.port, is_master=False, timeout=_TIMEOUT)


def _join(stream: Stream, store: TCPStore, rank: int) -> dist.ProcessGroup:
    if stream.device == "cpu":
        return dist.ProcessGroupGloo(store, rank, stream.world_size, _TIMEOUT)  # type: ignore[return-value]
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _TIMEOUT
    return dist.ProcessGroupNCCL(store, rank, stream.world_size, options)  # type: ignore[return-value]
