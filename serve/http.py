"""The HTTP face of a replica: vLLM's OpenAI routes and the policy's own, in the layers that requests pass."""

from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.exceptions import RetryableRequestError
from vllm.utils.argparse_utils import FlexibleArgumentParser

from dpo_ray.buffer_actor import buffer_actor
from dpo_ray.models import load_tokenizer
from dpo_ray.registry import PolicyRegistry
from dpo_ray.storage import Storage
from serve.authors import ReportingEngine
from serve.ballot_box import BallotBox
from serve.comparing import Comparing
from serve.comparison_ids import ComparisonIds, run_secret
from serve.encoding import Encoder
from serve.engine import PolicyEngine, StaleWeightsError
from serve.feedback_routes import FeedbackRoutes
from serve.forwarding import Forwarding, PeerDoor
from serve.guard import Abilities, guarded
from serve.metrics import CANARY_TOLERANCE, AllMetrics, CountedRequests, OwnMetrics
from serve.models import SERVED_NAME
from serve.openapi import close_unused
from serve.page_routes import mount_page
from serve.peers import Peers
from serve.placement import PolicyView
from serve.policy_routes import PolicyRoutes
from serve.replica import Replicas
from serve.served import RecordedAnswers, ServedLog
from serve.settings import ReplicaSettings
from serve.tokens import Tokens
from serve.trained import TrainedVersions
from serve.versions import VersionedAnswers


async def build_http_app(
    engine: PolicyEngine, storage: Storage, replicas: Replicas, settings: ReplicaSettings, secret: str
) -> ASGIApp:
    """Everything that a replica answers. `secret` is what replicas know each other by."""
    registry, box = PolicyRegistry(storage), BallotBox(lambda: buffer_actor(storage, settings.buffer))
    view, peers = PolicyView(registry), Peers(secret)
    model = engine.llm.model_config
    encoder = Encoder(load_tokenizer(model.model), context_length=model.max_model_len)
    CANARY_TOLERANCE.set(engine.tolerance)
    routes = await _vllm_app(engine)
    PolicyRoutes(engine, registry, replicas).mount(routes)
    log = ServedLog(box, most=settings.votes.served_kept)
    answers = VersionedAnswers(RecordedAnswers(routes, log, encoder.text), held=lambda: engine.version)
    placed = Forwarding(answers, engine.describe, view, replicas, peers)
    FeedbackRoutes(
        box=box,
        ids=ComparisonIds(run_secret(storage)),
        encoder=encoder,
        comparing=Comparing(placed, settings, context_length=model.max_model_len),
        view=view,
        trained=TrainedVersions(storage, registry),
        config=settings.votes,
    ).mount(routes)
    mount_page(routes)
    close_unused(routes)
    public = guarded(
        AllMetrics(placed, engine.describe, view, box, replicas, peers),
        settings.serving,
        Tokens(storage),
        Abilities(model.max_model_len, writes_json=_writes_json(engine)),
    )
    own = OwnMetrics(answers, engine.describe, view, box)
    return PeerDoor(CountedRequests(public), own, engine.describe, secret)


def _writes_json(engine: PolicyEngine) -> bool:
    tokenizer, json = engine.llm.get_tokenizer(), '{"a": [1.5, "b"], "c": {}}'
    return tokenizer.decode(tokenizer.encode(json, add_special_tokens=False)) == json


async def _vllm_app(engine: PolicyEngine) -> FastAPI:
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    assert args is not None
    args.model, args.served_model_name = engine.llm.model_config.model, [SERVED_NAME]
    tasks = await engine.llm.get_supported_tasks()
    app = build_app(args, tasks, engine.llm.model_config)
    client: Any = _ServedEngine(engine.llm)
    await init_app_state(client, app.state, args, tasks)
    # vLLM's error handlers tell their own server to stop; ours is Serve.
    app.state.server = SimpleNamespace()
    return app


class _ServedEngine(ReportingEngine):
    """Tells clients to ask again when the engine's weights turn out to be refused: 503, not 500."""

    def generate(
        self, prompt: Any, params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        return _retryable(super().generate(prompt, params, request_id, **options))


async def _retryable(outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    try:
        async for output in outputs:
            yield output
    except StaleWeightsError as error:
        raise RetryableRequestError(str(error)) from error
