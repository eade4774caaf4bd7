"""How the policy is updated."""

from pydantic import Field

from dpo_ray.config.loss import LossConfig
from dpo_ray.config.section import Section


class TrainingConfig(Section):
    """How the policy is updated."""

    loss: LossConfig = LossConfig()
    """The preference loss."""
    workers: int = Field(default=2, ge=1)
    """Data-parallel training processes."""
    cpus_per_worker: float = Field(default=1, ge=0)
    """CPUs that each training process reserves in Ray."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs that each training process reserves in Ray; 0 trains on CPU."""
    learning_rate: float = Field(default=5e-7, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from 0, counted over the whole run."""
    batch_size: int = Field(default=32, ge=1)
    """Pairs per optimizer step, over all workers."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Pairs per forward pass of one worker."""
    epochs: int = Field(default=1, ge=1)
    """Passes over a round's snapshot."""
    max_grad_norm: float = Field(default=10.0, gt=0)
    """Gradients are scaled down to this norm."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    max_failures: int = Field(default=8, ge=0)
    """How often killed training processes are replaced before the job gives up."""
