"""What several test files start from: a tiny model, an empty folder, a buffer."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from dpo_ray.buffer import PreferenceBuffer
from dpo_ray.models import save_policy
from dpo_ray.starter import make_review_tokenizer, tiny_config
from dpo_ray.storage import Storage


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Qwen3 with random weights that knows the words of the film reviews."""
    folder = tmp_path_factory.mktemp("tiny_model")
    tokenizer = make_review_tokenizer()
    config = tiny_config(tokenizer, max_tokens=64, hidden_size=64, num_layers=2)
    config.initializer_range = 0.2  # Far from uniform: a wrong position gives a visibly wrong log-prob.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_policy(Qwen3ForCausalLM(config), tokenizer, folder)
    return folder


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def buffer_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/buffer.sqlite"


@pytest.fixture
def buffer(buffer_url: str, storage: Storage) -> PreferenceBuffer:
    return PreferenceBuffer(buffer_url, storage)
