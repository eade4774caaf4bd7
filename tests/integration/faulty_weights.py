"""A worker extension that can be told to make the mistakes that a push must catch."""

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from serve.weights import PolicyWeights


class FaultyWeights(PolicyWeights):
    """Loads like its parent, until a fault is chosen."""

    fault = ""

    def choose_fault(self, fault: str) -> None:
        self.fault = fault

    def _load(self, folder: str) -> None:
        match self.fault:
            case "nothing is loaded":
                return
            case "stale head":
                self.reload_weights(weights_path=folder)  # type: ignore[attr-defined]
            case "breaks off":
                self._load_from(folder, most=17)
            case "breaks off once":
                self.fault = ""
                self._load_from(folder, most=17)
            case _:
                super()._load(folder)

    def _load_from(self, folder: str, *, most: int) -> None:
        """Some tensors of the folder's file, the last of them within a fused layer."""
        tensors = iter(load_file(next(Path(folder).glob("*.safetensors"))).items())

        def broken() -> Iterator[tuple[str, Tensor]]:
            yield from (next(tensors) for _ in range(most))
            raise ConnectionError("the sender is gone")

        self.reload_weights(weights_iterator=broken())  # type: ignore[attr-defined]
