"""What several test files start from: a tiny model, an empty folder, a buffer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from postgres import PostgresServer
from transformers import Qwen3ForCausalLM

from dpo_ray.buffer import PreferenceBuffer
from dpo_ray.models import load_model, load_tokenizer, save_policy
from dpo_ray.starter import make_review_tokenizer, tiny_config
from dpo_ray.storage import Storage


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost such small models more than they give, and processes are forked from here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache, or another test's."""
    cache = tmp_path / "own_cache"
    monkeypatch.setenv("DPO_RAY_CACHE", str(cache))
    return cache


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


@pytest.fixture(scope="session")
def near_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model with slightly other weights, so that log-ratios are not 0."""
    folder = tmp_path_factory.mktemp("near_model")
    model = load_model(tiny_model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    save_policy(model, load_tokenizer(tiny_model), folder)
    return folder


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    server = PostgresServer("-c", "fsync=off")  # The machine itself does not crash here.
    yield server
    server.stop()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/buffer.sqlite"


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """Of an empty database that only this test has."""
    yield postgres.new_database("pairs")
    postgres.drop_database("pairs")


@pytest.fixture(params=["sqlite", "postgres"])
def buffer_url(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def buffer(buffer_url: str, storage: Storage) -> Iterator[PreferenceBuffer]:
    buffer = PreferenceBuffer(buffer_url, storage)
    yield buffer
    buffer.close()
