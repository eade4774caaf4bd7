"""Runs inside vLLM's worker processes: takes a published version's weights into the live model."""

import os
import signal
import threading
import time
from typing import Any

from torch import nn
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

REPLICA_PID = "DPO_RAY_REPLICA_PID"
"""Environment variable by which the engine's processes know the replica that they belong to."""


class PolicyWeights:
    """vLLM mixes this class into its worker (`worker_extension_cls`)."""

    model_runner: Any

    def load_policy(self, folder: str) -> str:
        """Replace the weights in place by those of a Hugging Face folder; the engine must be paused.

        Why it could not be done, or nothing: of an exception, vLLM passes the type on at most. A load that
        broke off leaves some layers with old weights, and can be repeated.
        """
        try:
            self._load(folder)
        except Exception as error:
            _put_back(self.model_runner.get_model())
            return repr(error)
        return ""

    def _load(self, folder: str) -> None:
        self.reload_weights(weights_path=folder)  # type: ignore[attr-defined]
        model = self.model_runner.get_model()
        lm_head = getattr(model, "lm_head", None)
        if lm_head is not None and model.config.tie_word_embeddings:
            # CPU engines keep a packed copy of a tied head, which a reload leaves at the old weights.
            lm_head.quant_method.process_weights_after_loading(lm_head)


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
