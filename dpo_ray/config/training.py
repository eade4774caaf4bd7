"""How the policy is updated."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dpo_ray.config.loss import LossConfig
from dpo_ray.config.section import Section


class LoraConfig(Section):
    """Low-rank adapters (arXiv:2106.09685) in place of full training; the reference is the adapter off."""

    rank: int = Field(default=0, ge=0)
    """Rank of the adapters of all linear layers; 0 trains all weights."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale of the adapters: their product is multiplied by alpha / rank."""


class ReferenceConfig(Section):
    """What the policy is compared with."""

    kind: Literal["start", "round_start", "ema"] = "start"
    """start (version 0), round_start (what the round began with), ema (TR-DPO, arXiv:2404.09656)."""
    ema_alpha: float = Field(default=0.6, gt=0, le=1)
    """How far the ema reference moves to the policy: reference = alpha * policy + (1 - alpha) * reference."""
    ema_every_steps: int = Field(default=512, ge=1)
    """Optimizer steps between two moves of the ema reference."""
    keep_logps: bool = True
    """Keep reference log-probs in ~/.cache/dpo_ray, so that no run computes those of a pair again."""


class EarlyStoppingConfig(Section):
    """When a round's training ends before its steps are done; each bound is on held-out pairs."""

    eval_every_steps: int = Field(default=0, ge=0)
    """Steps between two evaluations on held-out pairs; 0: none during a round."""
    patience: int | None = Field(default=None, ge=1)
    """Evaluations without a better rewards/accuracies before training stops; the best weights are kept."""
    max_kl: float | None = Field(default=None, gt=0)
    """Most nats of KL to the reference, per completion, before training stops."""
    max_chosen_drop: float | None = Field(default=None, gt=0)
    """Most nats that the mean chosen log-prob may fall below the reference's before training stops."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        bounds = (self.patience, self.max_kl, self.max_chosen_drop)
        if any(bound is not None for bound in bounds) and not self.eval_every_steps:
            raise ValueError("a bound needs evaluations to look at: set eval_every_steps")
        return self


class TrainingConfig(Section):
    """How the policy is updated."""

    loss: LossConfig = LossConfig()
    """The preference loss."""
    reference: ReferenceConfig = ReferenceConfig()
    """What the policy is compared with."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters in place of full training."""
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    """When a round's training ends before its steps are done."""
    workers: int = Field(default=2, ge=1)
    """Data-parallel training processes."""
    cpus_per_worker: float = Field(default=1, ge=0)
    """CPUs that each training process reserves in Ray."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs that each training process reserves in Ray; 0 trains on CPU."""
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    """ddp keeps all weights in each process, fsdp (FSDP2) shards weights, gradients and optimizer."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the computation; weights stay float32. auto: bfloat16 on GPU, float32 on CPU."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass: less memory, a third more work."""
    packing: bool = True
    """Rows without padding that compute a prompt once per pair; off: one padded row per completion."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """adamw, or rmsprop as in the DPO paper."""
    learning_rate: float = Field(default=5e-7, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate goes to 0 over all rounds, after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from 0, counted over the whole run."""
    batch_size: int = Field(default=32, ge=1)
    """Pairs per optimizer step, over all workers."""
    tokens_per_pass: int | None = Field(default=None, ge=1)
    """Most tokens in a forward pass of one worker, longer pairs alone; unset: 8,192 on GPU, 1,024 on CPU."""
    epochs: int = Field(default=1, ge=1)
    """Passes over a round's snapshot."""
    max_grad_norm: float = Field(default=10.0, gt=0)
    """Gradients are scaled down to this norm."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    checkpoint_every_steps: int = Field(default=100, ge=0)
    """Steps between two checkpoints within a round; 0: only the end of a round is kept."""
    max_failures: int = Field(default=8, ge=0)
    """How often killed training processes are replaced before the job gives up."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lora.rank and self.reference.kind == "ema":
            raise ValueError(
                "an ema reference of a LoRA policy would need a second adapter: "
                "set reference.kind to start or round_start, or lora.rank to 0"
            )
        return self
