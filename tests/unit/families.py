"""Tiny models of many families, with random weights that leave no place for a wrong position to hide."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

_LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_LLAMA, "num_key_value_heads": 2}
_GPT = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
_GPT_2 = {**_GPT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_FALCON = {**_GPT, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_HALF_LOCAL = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

FLAT: dict[str, dict[str, Any]] = {
    "Llama": _GROUPED,
    "Qwen2": _GROUPED,
    "Qwen3": {**_GROUPED, "head_dim": 16},
    "Mistral": {**_GROUPED, "sliding_window": 5},
    "Gemma": {**_GROUPED, "head_dim": 8},
    "Gemma2": {
        **_GROUPED,
        **_HALF_LOCAL,
        "head_dim": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "Gemma3Text": {**_GROUPED, **_HALF_LOCAL, "head_dim": 8},
    "GPTNeoX": _LLAMA,
    "Olmo": _LLAMA,
    "Olmo2": _LLAMA,
    "GPT2": _GPT_2,
    "OPT": {
        **_GPT,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    },
    "Phi": _LLAMA,
    "Phi3": {**_GROUPED, "sliding_window": 5},
}
"""Settings of the families that run on flat rows."""

PADDED: dict[str, tuple[dict[str, Any], str]] = {
    "Bloom": ({**_GPT, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "brings its own attention"),
    "Falcon": (_FALCON, "brings its own attention"),
    "Mamba": ({**_GPT, "hidden_size": 32, "num_hidden_layers": 2}, "other log-probs on flat rows"),
    "Cohere": ({**_LLAMA, "logit_scale": 0.5}, "other log-probs on flat rows"),
    "Granite": ({**_LLAMA, "logits_scaling": 3.0}, "other log-probs on flat rows"),
    "GptOss": (
        {**_GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        "other log-probs on flat rows",
    ),
    "Phimoe": ({**_GROUPED, "num_local_experts": 2, "sliding_window": 12}, "whose mask has one of 12"),
    "Qwen2Moe": (
        {
            **_GROUPED,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
        },
        "whose mask has one of 12",
    ),
}
"""Settings of families that do not, and what is said of them; both windows are longer than the trial."""


def make_model(family: str) -> PreTrainedModel:
    """Weights far from 0, norms and biases far from 1 and 0; the same in each call."""
    settings = FLAT[family] if family in FLAT else PADDED[family][0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**settings)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
                else:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.float().eval()
