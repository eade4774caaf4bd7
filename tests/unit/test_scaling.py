"""The arithmetic of docs/scaling.md: hand-worked on a tiny model, and counted in a real one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.scaling import (
    LENGTHS,
    LLAMA_3_8B,
    TILE_BYTES,
    TOKENS_PER_PASS,
    Lengths,
    Parallelism,
    Plan,
    Shape,
    exchange_s,
    exchanged_bytes,
    input_bytes,
    layer_bytes,
    memory_bytes,
    pair_flops,
    reference_flops,
    tables,
)
from dpo_ray import lm_head, scoring
from dpo_ray.attention import FlatAttention
from dpo_ray.batching import PromptGroup, flatten
from dpo_ray.config import LoraConfig
from dpo_ray.logprobs import CompletionScorer
from dpo_ray.lora import add_adapter
from dpo_ray.models import checkpoint_activations

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
SMALL = Shape(layers=1, hidden=2, intermediate=3, heads=1, kv_heads=1, vocab=5)
SHORT = Lengths(2, 2, 2)
BUILT = Shape(layers=2, hidden=32, intermediate=48, heads=4, kv_heads=4, vocab=64)


def build(shape: Shape, *, layers: int | None = None) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.config.use_cache = False
    return model.eval()


def kept_bytes(layers: int, parallelism: Parallelism, *, checkpointing: bool) -> float:
    """Bytes per token that autograd keeps of a forward pass, each storage once, the model's own aside."""
    model = build(BUILT, layers=layers)
    if parallelism == "fsdp":
        model.bfloat16()  # What a layer computes with while it is gathered.
    scorer = CompletionScorer(model, flat=True)
    if checkpointing:
        checkpoint_activations(model)
    kept: dict[int, Tensor] = {weight.untyped_storage().data_ptr(): weight for weight in model.parameters()}
    weights = set(kept)

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    group = PromptGroup(tuple(range(1, 21)), (tuple(range(1, 22)),))
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=parallelism == "ddp")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        scorer([group], lambda groups, sums: sums.logp.sum())
    total = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    return total / group.num_tokens


def test_weights_are_those_of_the_real_shape() -> None:
    with torch.device("meta"):
        model = build(LLAMA_3_8B)
    assert LLAMA_3_8B.num_weights == sum(weight.numel() for weight in model.parameters()) == 8_030_261_248


def test_an_adapter_has_the_weights_that_are_trained() -> None:
    shape = Shape(layers=2, hidden=32, intermediate=48, heads=4, kv_heads=2, vocab=64)
    model = build(shape)
    add_adapter(model, LoraConfig(rank=4), None)
    assert shape.adapter(4) == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def test_lengths_are_those_of_a_flat_row() -> None:
    group = PromptGroup((1,) * 5, ((2,) * 4, (3,) * 3))
    lengths, row = Lengths(5, 4, 3), flatten([group], torch.device("cpu"))
    sees = FlatAttention(row).sees(None)
    places: list[Any] = list(torch.arange(group.num_tokens))
    zero = torch.tensor(0)
    assert lengths.in_row == group.num_tokens
    assert lengths.predicted == len(row.targets)
    assert lengths.visible == sum(bool(sees(zero, zero, query, key)) for query in places for key in places)


def test_flops_of_a_pair() -> None:
    # N = 4 * 4 + 3 * 6 = 34, H V = 10, the adapters 4 * 4 + 3 * 5 = 31; 4 tokens, 4 predicted, 9 visible.
    def flops(**options: Any) -> int:
        return pair_flops(SMALL, Plan(1, 1, lengths=SHORT, **options))

    assert flops() == 6 * 34 * 4 + 6 * 10 * 4 + 12 * 2 * 9
    assert flops(checkpointing=True) == 8 * 34 * 4 + 6 * 10 * 4 + 16 * 2 * 9
    assert flops(rank=1) == (4 * 34 + 6 * 31) * 4 + 4 * 10 * 4 + 12 * 2 * 9
    assert flops(rank=1, checkpointing=True) == (6 * 34 + 8 * 31) * 4 + 4 * 10 * 4 + 16 * 2 * 9
    assert 3 * reference_flops(SMALL, SHORT) == flops()


def test_bytes_exchanged_in_a_step() -> None:
    # 34 + 2 * 2 weights in the layer, 2 * 10 + 2 outside of it. Half of all comes from the other GPU.
    once = Plan(2, 2, lengths=SHORT)
    assert exchanged_bytes(SMALL, once) == (2 * (2 * 38 + 22) + 4 * 60) / 2
    twice = Plan(2, 8192, lengths=SHORT)
    assert twice.passes == 2
    assert exchanged_bytes(SMALL, twice) == (2 * 2 * (2 * 38 + 22) + 4 * 60) / 2
    assert exchanged_bytes(SMALL, Plan(2, 2, "ddp", lengths=SHORT)) == 2 * 4 * 60 / 2
    assert exchanged_bytes(SMALL, Plan(2, 2, "ddp", rank=1, lengths=SHORT)) == 2 * 4 * 31 / 2


def test_several_machines_are_as_fast_as_their_network() -> None:
    one, two = Plan(8, 64), Plan(16, 64)
    assert exchange_s(LLAMA_3_8B, one) == exchanged_bytes(LLAMA_3_8B, one) / (450e9 * 0.75)
    assert exchange_s(LLAMA_3_8B, two) == exchanged_bytes(LLAMA_3_8B, two) / (400e9 * 0.75)


def test_memory_of_a_gpu() -> None:
    sharded = memory_bytes(SMALL, Plan(2, 2, lengths=SHORT))
    assert sharded == {
        "weights": 4 * 60 / 2,
        "gradients, moments": 12 * 60 / 2,
        "copies": 2 * (2 * 34 + 22),
        "waiting gradients": 0,
        "activations": 4 * (22 * 2 + 4 * 2 + 8 * 3 + 4 + 8),
        "head": 2 * 4 * 5 * 4 + 6 * 10,
    }
    assert memory_bytes(SMALL, Plan(2, 8192, lengths=SHORT))["waiting gradients"] == 4 * 60
    adapter = memory_bytes(SMALL, Plan(2, 2, "ddp", rank=1, checkpointing=True, lengths=SHORT))
    assert adapter == {
        "weights": 4 * 60,
        "gradients, moments": 16 * 31,
        "copies": 2 * (34 + 10),
        "activations": 4 * (4 * 2 + 32 * 2 + 4 * 2 + 8 * 3 + 4 + 8),
        "head": 2 * 4 * 5 * 4,
    }


@pytest.mark.parametrize("parallelism", ["fsdp", "ddp"])
def test_a_layer_keeps_what_autograd_keeps_of_it(parallelism: Parallelism) -> None:
    plain = kept_bytes(3, parallelism, checkpointing=False) - kept_bytes(2, parallelism, checkpointing=False)
    copies = 0 if parallelism == "fsdp" else 2 * BUILT.layer / 40  # Of 40 tokens; weights cast to bf16.
    assert plain - copies == pytest.approx(layer_bytes(BUILT, parallelism), abs=1e-6)
    short = kept_bytes(3, parallelism, checkpointing=True) - kept_bytes(2, parallelism, checkpointing=True)
    assert short == pytest.approx(input_bytes(BUILT, parallelism), abs=1e-6)


def test_tiles_and_passes_are_the_learners() -> None:
    assert lm_head._TILE_BYTES["cuda"] == TILE_BYTES
    assert scoring.TOKENS_PER_PASS["cuda"] == TOKENS_PER_PASS
    assert TOKENS_PER_PASS // LENGTHS.in_row == 10


def test_one_long_pass_exchanges_and_holds_less_than_seven() -> None:
    seven, one = (
        Plan(8, 512, checkpointing=True, tokens_per_pass=tokens) for tokens in (TOKENS_PER_PASS, 65536)
    )
    assert (seven.passes, one.passes) == (7, 1)
    assert exchange_s(LLAMA_3_8B, one) == pytest.approx(0.16, abs=0.005)
    assert sum(memory_bytes(LLAMA_3_8B, one).values()) == pytest.approx(48e9, abs=0.5e9)
    assert memory_bytes(LLAMA_3_8B, seven)["waiting gradients"] == 4 * LLAMA_3_8B.num_weights


def test_the_document_holds_the_tables() -> None:
    for table in tables(LLAMA_3_8B):
        assert table in DOCUMENT.read_text()
