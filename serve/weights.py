"""Runs inside vLLM's worker processes: takes a published version's weights into the live model."""

import os
import signal
import threading
import time
from copy import copy
from typing import Any

from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
from vllm.platforms import current_platform

REPLICA_PID = "DPO_RAY_REPLICA_PID"
"""Environment variable by which the engine's processes know the replica that they belong to."""


class PolicyWeights:
    """vLLM mixes this class into its worker (`worker_extension_cls`).

    Each step returns why it could not be done, or nothing: of an exception, vLLM passes on its type at most.
    """

    model_runner: Any
    vllm_config: VllmConfig
    _prepared: tuple[nn.Module, dict[str, Any]] | None = None

    def prepare_policy(self, folder: str) -> str:
        """Load a Hugging Face folder beside the live model, which goes on; a GPU has no room for a second."""
        self._prepared = None
        try:
            if current_platform.is_cpu():
                self._prepared = self._load_beside(folder)
        except Exception as error:
            return repr(error)
        return ""

    def take_policy(self, folder: str) -> str:
        """Put the prepared model into the live one's place, or else reload the live one from the folder.

        The engine must be paused. A reload that broke off leaves some layers with old weights, and can be
        repeated.
        """
        try:
            if self._prepared is None:
                self._reload(folder)
            else:
                self._replace(*self._prepared)
        except Exception as error:
            _put_back(self.model_runner.get_model())
            return repr(error)
        finally:
            self._prepared = None
        return ""

    def _reload(self, folder: str) -> None:
        self.reload_weights(weights_path=folder)  # type: ignore[attr-defined]

    def _load_beside(self, folder: str) -> tuple[nn.Module, dict[str, Any]]:
        """A model of its own, and those of its layers that vLLM looks up by name: attention, experts."""
        config = copy(self.vllm_config)
        config.model_config = copy(config.model_config)
        config.model_config.model = folder
        config.compilation_config = copy(config.compilation_config)
        config.compilation_config.static_forward_context = layers = {}
        config.compilation_config.static_all_moe_layers = []
        with set_current_vllm_config(config):
            return get_model(vllm_config=config), layers

    def _replace(self, model: nn.Module, layers: dict[str, Any]) -> None:
        """Layers are given what the engine has given to those before them, the cache above all."""
        live_layers = self.vllm_config.compilation_config.static_forward_context
        for name, layer in layers.items():
            live = vars(live_layers[name])
            vars(layer).update(
                {key: live[key] for key in live if key == "kv_cache" or key not in vars(layer)}
            )
        live_layers.update(layers)
        replaced, self.model_runner.model = self.model_runner.model, model
        for module in set(replaced.modules()) - set(model.modules()):  # They share position embeddings.
            vars(module).clear()  # Its cycles would never be collected: vLLM has frozen the heap.


def _put_back(model: nn.Module) -> None:
    """Give the layers that a broken reload has emptied their tensors back."""
    for layer in model.modules():
        reloading = get_layerwise_info(layer)
        if reloading.can_load():
            if reloading.kernel_tensors is not None:
                _place_kernel_tensors(layer, reloading)
            reloading.reset()


def _end_with(replica: int) -> None:
    """An engine outlives a killed replica, and would keep its memory from the replacement."""
    while os.path.exists(f"/proc/{replica}"):
        time.sleep(1.0)
    if os.getppid() not in (1, replica):
        os.kill(os.getppid(), signal.SIGKILL)  # The engine, where this worker is a process of its own.
    os._exit(1)


if REPLICA_PID in os.environ:
    threading.Thread(target=_end_with, args=[int(os.environ[REPLICA_PID])], daemon=True).start()
