"""Low-rank adapters: put into a model, switched off for the reference, saved alone and merged."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_ray.batching import FlatRow
from dpo_ray.config import LoraConfig
from dpo_ray.lm_head import CompletionSums, Head
from dpo_ray.logprobs import CompletionScorer

_NAME = "default"
_WEIGHTS = "adapter_model.safetensors"


def add_adapter(model: PreTrainedModel, config: LoraConfig, folder: Path | None) -> None:
    """Adapters in all linear layers but the head, the only weights that are trained from now on.

    `folder`: where they were saved; None: new ones, which change nothing yet.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # All processes begin with the same adapters.
        model.add_adapter(peft_config(config), adapter_name=_NAME)
    if folder is not None:
        weights = load_file(folder / _WEIGHTS)
        ours = get_peft_model_state_dict(model, adapter_name=_NAME)
        with torch.no_grad():
            for name, value in ours.items():
                value.copy_(weights[f"base_model.model.{name}"])


def peft_config(config: LoraConfig) -> PeftLoraConfig:
    return PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before `add_adapter`."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class AdapterOff(CompletionScorer):
    """The policy without its adapter, on the same weights."""

    def __init__(self, policy: CompletionScorer) -> None:
        super().__init__(policy.model, flat=policy.flat)
        self._policy = [policy]  # In a list, so that its weights are not registered once more.

    def forward(self, groups: Any, *args: Any, **kwargs: Any) -> tuple[Tensor | None, CompletionSums]:
        # Called through the policy, whose hooks gather weights that are sharded.
        with adapter_off(self.model):
            return self._policy[0](groups, *args, **kwargs)

    def hidden_states(self, row: FlatRow) -> tuple[Head, Tensor]:
        with adapter_off(self.model):
            return super().hidden_states(row)

    def padded_log_probs(self, groups: Any) -> Tensor:
        with adapter_off(self.model):
            return super().padded_log_probs(groups)


def merged(model: PreTrainedModel, state: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The weights of a plain model that does the same; `state` is that of `model` with adapters."""
    kept = {name: value for name, value in state.items() if ".lora_" not in name}
    plain = {name.replace(".base_layer.", "."): value for name, value in kept.items()}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            down, up = state[f"{name}.lora_A.{_NAME}.weight"], state[f"{name}.lora_B.{_NAME}.weight"]
            change = config.alpha / config.rank * (up @ down)
            # GPT-2 keeps its linear weights the other way around.
            turned = getattr(layer, "fan_in_fan_out", False)
            plain[f"{name}.weight"] = plain[f"{name}.weight"] + (change.T if turned else change)
    return plain


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same kind and settings that has no adapter, and no weights either."""
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.generation_config = model.generation_config
    return plain


def save_adapter(model: PreTrainedModel, state: dict[str, Tensor], folder: Path, base: str) -> None:
    """The adapters alone, as peft and vLLM load them onto `base`."""
    weights: dict[str, Any] = get_peft_model_state_dict(model, state_dict=state, adapter_name=_NAME)
    weights = {f"base_model.model.{name}": value.contiguous() for name, value in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / _WEIGHTS)
    config = model.peft_config[_NAME]  # type: ignore[index]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(folder))
