"""What a replica is told of the run that it serves."""

from dataclasses import dataclass, field

from dpo_ray.config import BufferConfig, SamplingConfig, ServingConfig, VotesConfig


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    sampling: SamplingConfig
    serving: ServingConfig
    votes: VotesConfig = field(default_factory=VotesConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    """Where votes are kept."""

    @property
    def identity(self) -> str:
        """Equal where replicas need not be started anew; the address belongs to all that Serve serves."""
        limits = self.serving.model_dump_json(exclude={"host", "port"})
        return f"{self.sampling.model_dump_json()} {limits} {self.votes.model_dump_json()} {self.buffer.url}"
