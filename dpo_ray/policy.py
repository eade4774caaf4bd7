"""The weights of one policy in the training processes: loaded, adapted, sharded, saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from dpo_ray.config import TrainingConfig
from dpo_ray.logprobs import CompletionScorer
from dpo_ray.lora import AdapterOff, add_adapter, merged, save_adapter, without_adapter
from dpo_ray.models import checkpoint_activations, load_tokenizer, make_scorer, save_policy
from dpo_ray.parallel import Peers, gathered, shard, weights_of
from dpo_ray.registry import ADAPTER

_CALLED_FROM_OUTSIDE = ("hidden_states", "padded_log_probs", "token_logps")


class Policy:
    """A scorer whose weights are trained: all of them, or an adapter's."""

    def __init__(self, folder: Path, start: Path, config: TrainingConfig, peers: Peers) -> None:
        self._start = start
        self._config = config
        self._peers = peers
        self.tokenizer = load_tokenizer(folder)
        self.is_start = folder == start
        """Until the first step."""
        # An adapter lies on the start's weights; the weights of a later version have it merged.
        scorer = load_scorer(start if config.lora.rank else folder, config, peers)
        if config.lora.rank:
            add_adapter(scorer.model, config.lora, None if self.is_start else folder / ADAPTER)
        if config.activation_checkpointing:
            checkpoint_activations(scorer.model)
        shard(scorer, config, peers, methods=_CALLED_FROM_OUTSIDE)
        self.scorer = scorer

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in weights_of(self.scorer) if parameter.requires_grad]

    @contextmanager
    def start(self) -> Iterator[CompletionScorer]:
        """The start's scorer: this policy's own where that is possible, else loaded for a while."""
        if self._config.lora.rank:
            yield AdapterOff(self.scorer)
        elif self.is_start:
            yield self.scorer
        else:
            yield self.load_frozen(self._start)

    def load_frozen(self, folder: Path) -> CompletionScorer:
        """Another policy, sharded like this one."""
        scorer = load_scorer(folder, self._config, self._peers).requires_grad_(False)
        shard(scorer, self._config, self._peers, methods=_CALLED_FROM_OUTSIDE)
        return scorer

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, whole on the first process. A collective."""
        weights_of(self.scorer)  # From here on they are sharded as they should be.
        named = list(self.scorer.model.named_parameters(remove_duplicate=False))
        names = {name for name, _ in named}
        buffers = [item for item in self.scorer.model.state_dict().items() if item[0] not in names]
        whole: dict[int, Tensor] = {}  # A tied weight is gathered once, and stays one tensor.
        for _, tensor in [*named, *buffers]:
            if id(tensor) not in whole:
                whole[id(tensor)] = gathered(tensor, keep=self._peers.rank == 0)
        return {name: whole[id(tensor)] for name, tensor in [*named, *buffers]}

    def plain_weights(self) -> dict[str, Tensor]:
        """By name, sharded as they are: of a model without adapters that does the same."""
        weights_of(self.scorer)
        named: dict[str, Tensor] = dict(self.scorer.model.named_parameters())
        return merged(self.scorer.model, named, self._config.lora) if self._config.lora.rank else named

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """A Hugging Face folder; an adapter is merged, and is beside it alone too."""
        lora, model = self._config.lora, self.scorer.model
        if lora.rank:
            save_adapter(model, state, folder / ADAPTER, base=str(self._start))
            state, model = merged(model, state, lora), without_adapter(model)
        save_policy(model, self.tokenizer, folder, state)


def load_scorer(folder: Path, config: TrainingConfig, peers: Peers) -> CompletionScorer:
    # A model that will be sharded may not fit on one GPU: sharding moves it there layer by layer.
    device = "cpu" if config.parallelism == "fsdp" else peers.device
    return make_scorer(folder, device=device, flat=config.packing)
