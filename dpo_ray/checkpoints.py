"""Training states in the run's folder: of unfinished rounds, and of versions that training may go on from."""

from io import BytesIO
from typing import Any

import torch

from dpo_ray.parallel import Peers
from dpo_ray.storage import Storage


class RoundCheckpoints:
    """The state of an unfinished round, one file in the run's folder."""

    def __init__(self, storage: Storage, candidate: int, peers: Peers) -> None:
        self._storage = storage
        self._file = f"trainer/v{candidate:05d}.unfinished.pt"
        self._writes = peers.rank == 0

    def load(self) -> dict[str, Any] | None:
        return load_state(self._storage, self._file)

    def save(self, state: dict[str, Any]) -> None:
        if self._writes:
            save_state(self._storage, self._file, state)

    def remove(self) -> None:
        if self._writes:
            self._storage.remove(self._file)


def state_file(version: int) -> str:
    """Where the state lies that belongs to a version's weights."""
    return f"trainer/v{version:05d}.pt"


def save_state(storage: Storage, file: str, state: dict[str, Any]) -> None:
    content = BytesIO()
    torch.save(state, content)
    storage.write_bytes(file, content.getvalue())


def load_state(storage: Storage, file: str) -> dict[str, Any] | None:
    """On CPU; None where there is no such file."""
    if not storage.exists(file):
        return None
    return torch.load(BytesIO(storage.read_bytes(file)), map_location="cpu", weights_only=True)
