"""A training step of an 8B model on many GPUs, in time and memory, by arithmetic alone: nothing is run.

`python benchmarks/scaling.py` prints the tables of docs/scaling.md.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

REACHABLE = 790e12
"""bf16 FLOP/s of large matrix products, measured on an H200; an H100 of 80 GB computes as fast (assumed)."""
UTILISATION = 0.4
"""Share of it that a step is assumed to reach."""
GPUS_PER_MACHINE = 8
NVLINK = 450e9
"""Bytes per second into a GPU from those of its machine: NVLink 4 (assumed)."""
NETWORK = 400e9
"""Bytes per second into a machine: eight InfiniBand cards of 400 Gbit/s (assumed)."""
REACHED = 0.75
"""Share of either that collectives are assumed to reach."""
TILE_BYTES = 2**30
"""fp32 logits that are held at a time on a GPU."""
TOKENS_PER_PASS = 8192
"""Of training.tokens_per_pass on a GPU, where it is not set."""

Parallelism = Literal["ddp", "fsdp"]


class Lengths(NamedTuple):
    """Tokens of a pair."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def in_row(self) -> int:
        """The prompt once; the last token of a completion predicts nothing."""
        return self.prompt + self.chosen + self.rejected - 2

    @property
    def predicted(self) -> int:
        return self.chosen + self.rejected

    @property
    def visible(self) -> int:
        """Pairs of a query and a key that it sees."""
        first, second = self.prompt + self.chosen - 1, self.rejected - 1
        return first * (first + 1) // 2 + second * self.prompt + second * (second + 1) // 2


LENGTHS = Lengths(300, 250, 250)


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder with grouped-query attention, a gated MLP, and an output head of its own."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def kv(self) -> int:
        """Width of keys, and of values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's linear maps: query, output, key, value, gate, up, down."""
        wide, up = (self.hidden, self.hidden), (self.hidden, self.intermediate)
        return [wide, wide, (self.hidden, self.kv), (self.hidden, self.kv), up, up, up]

    @property
    def layer(self) -> int:
        """Weights of one layer's matrices."""
        return sum(inputs * outputs for inputs, outputs in self.matrices)

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def root(self) -> int:
        """Weights outside of the layers: embeddings, last norm, head."""
        return 2 * self.head + self.hidden

    @property
    def num_weights(self) -> int:
        return self.layers * (self.layer + 2 * self.hidden) + self.root

    def adapter(self, rank: int) -> int:
        """Weights of low-rank adapters of all matrices but the head."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.matrices)


@dataclass(frozen=True, slots=True)
class Plan:
    """A global batch on some GPUs."""

    gpus: int
    pairs: int
    parallelism: Parallelism = "fsdp"
    rank: int = 0
    """Of the adapters; 0 trains all weights."""
    checkpointing: bool = False
    lengths: Lengths = LENGTHS
    tokens_per_pass: int = TOKENS_PER_PASS

    @property
    def pairs_per_gpu(self) -> int:
        return -(-self.pairs // self.gpus)

    @property
    def pairs_per_pass(self) -> int:
        return min(self.pairs_per_gpu, max(1, self.tokens_per_pass // self.lengths.in_row))

    @property
    def passes(self) -> int:
        return -(-self.pairs_per_gpu // self.pairs_per_pass)

    def trained(self, shape: Shape) -> int:
        return shape.adapter(self.rank) if self.rank else shape.num_weights


LLAMA_3_8B = Shape(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocab=128256)
FULL, CHECKPOINTED = Plan(8, 64), Plan(8, 64, checkpointing=True)
LORA, LORA_CHECKPOINTED = Plan(8, 64, rank=16), Plan(8, 64, rank=16, checkpointing=True)


def pair_flops(shape: Shape, plan: Plan) -> int:
    """Of forward and backward: 6 N (P + C + R - 2) + 6 H V (C + R) and attention.

    Frozen weights need no gradient: 4 in place of 6. Checkpointing computes the layers once more: 2 more.
    """
    lengths, weights = plan.lengths, shape.layers * shape.layer
    repeated = 1 if plan.checkpointing else 0
    times = (4 if plan.rank else 6) + 2 * repeated
    layers = times * weights + (6 + 2 * repeated) * shape.adapter(plan.rank)
    head = (4 if plan.rank else 6) * shape.head
    attention = (12 + 4 * repeated) * shape.layers * shape.hidden * lengths.visible
    return layers * lengths.in_row + head * lengths.predicted + attention


def reference_flops(shape: Shape, lengths: Lengths) -> int:
    """Of the one forward pass that a new pair costs."""
    layers = 2 * shape.layers * shape.layer * lengths.in_row
    attention = 4 * shape.layers * shape.hidden * lengths.visible
    return layers + 2 * shape.head * lengths.predicted + attention


def compute_s(shape: Shape, plan: Plan) -> float:
    return plan.pairs_per_gpu * pair_flops(shape, plan) / (REACHABLE * UTILISATION)


def exchanged_bytes(shape: Shape, plan: Plan) -> float:
    """Into each GPU in one step.

    FSDP gathers bf16 weights in every pass, the layers' in forward and backward and the others' once, and
    scatters fp32 gradients in the last; DDP sums fp32 gradients, which goes around twice.
    """
    if plan.parallelism == "ddp":
        exchanged = 2 * 4 * plan.trained(shape)
    else:
        layers = shape.num_weights - shape.root
        exchanged = plan.passes * 2 * (2 * layers + shape.root) + 4 * plan.trained(shape)
    return exchanged * (plan.gpus - 1) / plan.gpus


def exchange_s(shape: Shape, plan: Plan) -> float:
    """Where nothing is computed meanwhile. What goes around several machines enters each of them once."""
    rate = NVLINK if plan.gpus <= GPUS_PER_MACHINE else min(NVLINK, NETWORK)
    return exchanged_bytes(shape, plan) / (rate * REACHED)


def memory_bytes(shape: Shape, plan: Plan) -> dict[str, float]:
    """Of one GPU where it holds most, which is at the head, by what takes it."""
    trained, full = plan.trained(shape), not plan.rank
    tile = min(TILE_BYTES, 4 * shape.vocab * plan.pairs_per_pass * plan.lengths.predicted)
    # Logits and log-probs; where the head is trained its fp32 gradient, and a tile's in bf16.
    head = 2 * tile + (6 * shape.head if full else 0)
    if plan.parallelism == "ddp":
        # Gradients lie in buckets once more.
        states: dict[str, float] = {
            "weights": 4 * shape.num_weights,
            "gradients, moments": (4 + 4 + 8) * trained,
        }
        layers = 1 if plan.checkpointing and not full else shape.layers
        copies = {"copies": 2 * (layers * shape.layer + shape.head)}
    else:
        states = {
            "weights": 4 * shape.num_weights / plan.gpus,
            "gradients, moments": (4 + 8) * trained / plan.gpus,
        }
        # Between two passes, gradients wait whole.
        waiting = 4 * trained if plan.passes > 1 else 0
        copies = {"copies": 2 * (2 * shape.layer + shape.root), "waiting gradients": waiting}
    return {**states, **copies, "activations": activation_bytes(shape, plan), "head": head}


def activation_bytes(shape: Shape, plan: Plan) -> int:
    """What the layers keep of a pass for its backward pass."""
    tokens = plan.pairs_per_pass * plan.lengths.in_row
    layer = layer_bytes(shape, plan.parallelism)
    if not plan.checkpointing:
        return tokens * shape.layers * layer
    # Each layer's input, and all of the one that is computed again.
    return tokens * (shape.layers * input_bytes(shape, plan.parallelism) + layer)


def layer_bytes(shape: Shape, parallelism: Parallelism) -> int:
    """Kept by one layer of one token. Autocast (DDP) keeps fp32 beside bf16, FSDP casts the weights."""
    norms_and_inputs = (22 if parallelism == "fsdp" else 32) * shape.hidden
    return norms_and_inputs + 4 * shape.kv + 8 * shape.intermediate + 4 * shape.heads + 8


def input_bytes(shape: Shape, parallelism: Parallelism) -> int:
    return (2 if parallelism == "fsdp" else 4) * shape.hidden


def flops_rows(shape: Shape) -> list[list[str]]:
    named = {
        "all weights": FULL,
        "all weights, checkpointing": CHECKPOINTED,
        "LoRA of rank 16": LORA,
        "LoRA of rank 16, checkpointing": LORA_CHECKPOINTED,
    }
    flops = {name: pair_flops(shape, plan) for name, plan in named.items()}
    flops["reference log-probs, once per pair"] = reference_flops(shape, LENGTHS)
    seconds = {name: value / (REACHABLE * UTILISATION) for name, value in flops.items()}
    return [[name, f"{value / 1e12:.1f}", f"{1 / seconds[name]:.1f}"] for name, value in flops.items()]


def plan_rows(shape: Shape) -> list[list[str]]:
    kinds: list[tuple[str, int, Parallelism]] = [
        ("all, FSDP2", 0, "fsdp"),
        ("LoRA 16, FSDP2", 16, "fsdp"),
        ("LoRA 16, DDP", 16, "ddp"),
    ]
    rows = []
    for gpus in (8, 64):
        for pairs in (64, 512):
            for name, rank, parallelism in kinds:
                plans = [
                    Plan(gpus, pairs, parallelism, rank, checkpointing) for checkpointing in (False, True)
                ]
                costs = [cost for plan in plans for cost in _time_and_memory(shape, plan)]
                exchange = f"{exchange_s(shape, plans[0]):.2f}"
                rows.append([str(gpus), str(pairs), name, str(plans[0].passes), exchange, *costs])
    return rows


def _time_and_memory(shape: Shape, plan: Plan) -> tuple[str, str]:
    gigabytes = sum(memory_bytes(shape, plan).values()) / 1e9
    return f"{compute_s(shape, plan):.2f}", f"{gigabytes:.0f}" + (" (too much)" if gigabytes > 80 else "")


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---", *["--:"] * (len(titles) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(shape: Shape) -> list[str]:
    costs = ["compute, s", "memory, GB", "compute with checkpointing, s", "memory with checkpointing, GB"]
    return [
        markdown(["a pair", "TFLOP", "pairs per second and GPU"], flops_rows(shape)),
        markdown(["GPUs", "pairs a step", "trained", "passes", "exchange, s", *costs], plan_rows(shape)),
    ]


if __name__ == "__main__":
    print("\n\n".join(tables(LLAMA_3_8B)))
