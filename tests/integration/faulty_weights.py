"""A worker extension that can be told to make the mistakes that a push must catch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from serve.weights import PolicyWeights


class FaultyWeights(PolicyWeights):
    """Loads like its parent, until something else is chosen."""

    _chosen = ""

    def choose(self, what: str) -> None:
        self._chosen = what

    def prepare_policy(self, folder: str) -> str:
        """As on a GPU, which reloads the live model, where a reload is chosen."""
        return "" if "reload" in self._chosen else super().prepare_policy(folder)

    def take_policy(self, folder: str) -> str:
        if self._chosen == "nothing is taken once":
            self._chosen = ""
            return ""
        return "" if self._chosen == "nothing is taken" else super().take_policy(folder)

    def _load_beside(self, folder: str) -> tuple[nn.Module, dict[str, Any]]:
        if self._chosen == "load breaks off":
            raise ConnectionError("the sender is gone")
        return super()._load_beside(folder)

    def _reload(self, folder: str) -> None:
        if "breaks off" in self._chosen:
            self._chosen = self._chosen.replace("reload breaks off once", "reload")
            self._reload_some(folder, most=17)
        super()._reload(folder)
        if self._chosen != "reload leaves the head":
            # Of a tied head, CPU engines keep a packed copy, which vLLM's reload leaves at the old weights.
            lm_head = self.model_runner.get_model().lm_head
            lm_head.quant_method.process_weights_after_loading(lm_head)

    def _reload_some(self, folder: str, *, most: int) -> None:
        """Some tensors of the folder's file, the last of them within a fused layer."""
        tensors = iter(load_file(next(Path(folder).glob("*.safetensors"))).items())

        def broken() -> Iterator[tuple[str, Tensor]]:
            yield from (next(tensors) for _ in range(most))
            raise ConnectionError("the sender is gone")

        self.reload_weights(weights_iterator=broken())  # type: ignore[attr-defined]
