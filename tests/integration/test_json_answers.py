"""Answers that must fit in a JSON schema, from a model whose vocabulary can spell them."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from dpo_ray.config import SamplingConfig, ServingConfig, VotesConfig
from dpo_ray.logprobs import CompletionScorer
from dpo_ray.models import load_model, make_canaries
from dpo_ray.registry import PolicyManifest, PolicyRegistry
from dpo_ray.starter import make_random_model
from dpo_ray.storage import Storage
from serve.deployment import engine_environment
from serve.replica import Replicas
from serve.settings import ReplicaSettings

SCHEMA = {
    "type": "object",
    "properties": {"good": {"type": "boolean"}, "stars": {"enum": [1, 2, 3]}},
    "required": ["good", "stars"],
    "additionalProperties": False,
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path / "run"))
    make_random_model(
        ['{"good": true, "stars": 3} or not'], tmp_path / "model", vocab_size=300, max_tokens=256
    )
    canaries = make_canaries(
        CompletionScorer(load_model(tmp_path / "model"), flat=True), [[5, 9, 12, 7] * 10]
    )
    registry = PolicyRegistry(storage)
    registry.publish(tmp_path / "model", PolicyManifest(version=0, canaries=canaries))
    registry.promote(0)
    return storage


def test_an_answer_fits_in_the_schema_and_a_broken_schema_is_refused(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in engine_environment(SamplingConfig()).items():
        monkeypatch.setenv(name, value)
    from serve.engine import PolicyEngine
    from serve.http import build_http_app

    async def answer(client: openai.AsyncOpenAI, schema: dict[str, Any]) -> Any:
        return await client.chat.completions.create(
            model="policy",
            messages=[{"role": "user", "content": "a review"}],
            response_format={"type": "json_schema", "json_schema": {"name": "review", "schema": schema}},
            max_tokens=120,
        )

    async def scenario() -> None:
        engine = await PolicyEngine.start(PolicyRegistry(storage), SamplingConfig())
        no_thumbs = VotesConfig(served_kept=0)  # Which Ray would keep.
        settings = ReplicaSettings(SamplingConfig(), ServingConfig(), no_thumbs)
        app = await build_http_app(engine, storage, Replicas(None), settings, "secret")
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
            client = openai.AsyncOpenAI(
                base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0
            )
            answers = await asyncio.gather(*(answer(client, SCHEMA) for _ in range(8)))
            for each in answers:
                review = json.loads(each.choices[0].message.content)
                assert review.keys() == {"good", "stars"}
                assert review["stars"] in (1, 2, 3)
            assert len({each.choices[0].message.content for each in answers}) > 1
            with pytest.raises(openai.BadRequestError):
                await answer(client, {"type": "no such type"})
        engine.llm.shutdown(timeout=0)

    asyncio.run(scenario())
