"""The Ray Serve deployment of the live policy."""

import asyncio
import hashlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus

from dpo_ray.buffer_actor import end_other_buffers
from dpo_ray.config import SamplingConfig
from dpo_ray.registry import PolicyRegistry
from dpo_ray.sampler import Answer
from dpo_ray.storage import Storage
from dpo_ray.types import Stream
from serve.comparison_ids import run_secret
from serve.guard import check_environment, check_exposure
from serve.listener import Listener
from serve.replica import Replicas, ReplicaState
from serve.settings import ReplicaSettings

_APP_PREFIX = "dpo_ray_"
_ALIVE = (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING)
_LOGGING = {"enable_access_log": False}
_ENGINE_POLL_S = 0.5
_STATUS_POLL_S = 0.5


@serve.deployment(
    name="policy",
    max_ongoing_requests=10_000,
    health_check_period_s=5,
    health_check_timeout_s=60,
    graceful_shutdown_wait_loop_s=1,
    graceful_shutdown_timeout_s=120,
)
@serve.ingress()
class PolicyServer:
    """A replica: one engine that answers HTTP and the job's own sampling calls."""

    async def __init__(self, run_dir: str, settings: ReplicaSettings, secret: str) -> None:
        from serve.engine import PolicyEngine  # vLLM is imported where an engine runs, and nowhere else.

        check_environment(os.environ)
        self._storage = Storage(run_dir)
        self._registry = PolicyRegistry(self._storage)
        self._settings = settings
        self._secret = secret
        sampling = settings.sampling
        self._engine = await PolicyEngine.start(self._registry, sampling, takes_candidate=_is_last_replica)
        self._engine.replica = serve.get_replica_context().replica_tag
        self._engine.node = ray.get_runtime_context().get_node_id()
        self._has_peers = (sampling.max_replicas or sampling.replicas) > 1
        self._listener = Listener()
        self._watch = asyncio.create_task(self._end_with_engine())

    async def __serve_build_asgi_app__(self) -> Any:
        from serve.http import build_http_app

        context = serve.get_replica_context()
        replicas = Replicas(serve.get_deployment_handle(context.deployment, context.app_name))
        app = await build_http_app(self._engine, self._storage, replicas, self._settings, self._secret)
        if self._has_peers:
            self._engine.address = await self._listener.listen(app, ray.util.get_node_ip_address())
        serving = self._settings.serving
        if serving.replica_port is not None:
            await self._listener.listen(app, serving.host, serving.replica_port, shared=True)
        return app

    async def __del__(self) -> None:
        """Serve calls and awaits this when it ends the replica, and has let its own requests finish."""
        await self._listener.close()

    async def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], params: dict[str, Any]
    ) -> list[list[Answer]]:
        """`params["n"]` answers to each prompt, in order."""
        outputs = await self._engine.sample(prompts, seeds, params)
        return [[_answer(completion) for completion in output.outputs] for output in outputs]

    async def sample_as(
        self, version: int, prompts: Sequence[Sequence[int]], seeds: Sequence[int], params: dict[str, Any]
    ) -> list[list[Answer]] | None:
        """The same of one version; None where this replica does not hold it."""
        return await self.generate(prompts, seeds, params) if self._engine.version == version else None

    async def receive(self, stream: Stream) -> str:
        """Take a version's files from the trainers; why that failed, or nothing: storage has them too."""
        from dpo_ray.stream import receive

        if self._engine.replica in stream.receivers:
            try:
                await asyncio.to_thread(receive, stream, self._registry, self._engine.replica)
            except (RuntimeError, ValueError, OSError) as error:
                return str(error)
        return ""

    async def converge(self) -> ReplicaState:
        """Hold the desired version, proven by its canaries, on return. StaleWeightsError: it is refused."""
        await self._engine.converge()
        return self._engine.describe()

    async def settle(self) -> ReplicaState:
        """The same, where a refusal is told, not raised."""
        with suppress(Exception):
            await self._engine.converge()
        return self._engine.describe()

    async def describe(self) -> ReplicaState:
        return self._engine.describe()

    async def check_health(self) -> None:
        """Catch up on a push that was missed. Serve replaces a replica that raises here for long."""
        await self._engine.converge()

    async def _end_with_engine(self) -> None:
        # A replica with a dead engine would go on drawing requests, and fail them fast.
        while not self._engine.llm.errored:
            await asyncio.sleep(_ENGINE_POLL_S)
        os._exit(1)


def _is_last_replica() -> bool:
    """Whether a candidate is for this replica: one of several takes it, the others hold what is live."""
    context = serve.get_replica_context()
    return 1 < context.world_size == context.rank.rank + 1


def _answer(completion: Any) -> Answer:
    assert completion.cumulative_logprob is not None and completion.weight_versions
    return Answer(
        text=completion.text,
        token_ids=tuple(completion.token_ids),
        logp=completion.cumulative_logprob,
        policy_version=int(completion.weight_versions[-1].version),
        finish_reason=completion.finish_reason or "",
    )


def deploy(run_dir: str, settings: ReplicaSettings) -> str:
    """Start to serve a run's live policy; the name of the application.

    One that already serves this run with these settings is left as it is, in-flight requests included.
    ValueError: the port is taken, or others than this machine could reach it without a token.
    """
    serving, storage = settings.serving, Storage(run_dir)
    check_environment(os.environ)
    check_exposure(run_dir, serving)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # Of this process: replicas have their own logs.
    if not _serve_runs():
        _check_port(serving.host, serving.port, "port")
    serve.start(http_options={"host": serving.host, "port": serving.port})
    identity = f"{storage.root} {settings.identity}"
    name = f"{_APP_PREFIX}{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    applications = serve.status().applications
    if name in applications and applications[name].status in _ALIVE:
        return name
    for other in applications:
        if other.startswith(_APP_PREFIX):
            serve.delete(other)
    if serving.replica_port is not None:
        _check_port(serving.host, serving.replica_port, "replica_port")
    end_other_buffers(storage)
    run_secret(storage)  # Made by one, before several replicas look for it.
    target = serve.RunTarget(_application(storage, settings), name=name, logging_config=_LOGGING)
    serve.run_many([target], wait_for_applications_running=False)
    return name


def wait_until_serving(name: str, *, timeout_s: float = 1800) -> None:
    """Return when a replica holds the live version, proven. RuntimeError: it cannot be deployed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        application = _serve_details()["applications"][name]
        if application["status"] == ApplicationStatus.RUNNING:
            return
        if application["status"] == ApplicationStatus.DEPLOY_FAILED:
            reasons = [deployment["message"] for deployment in application["deployments"].values()]
            raise RuntimeError(
                "the sampler could not start: " + "\n".join([application["message"], *reasons])
            )
        time.sleep(_STATUS_POLL_S)
    raise RuntimeError(f"the sampler was not up after {timeout_s:.0f} s")


def http_address() -> str:
    """Where Serve listens: where it ran already, that is not where this job asked for."""
    options = _serve_details()["http_options"]
    return f"http://{options['host']}:{options['port']}"


def _serve_details() -> dict[str, Any]:
    """`serve.status()` makes objects of them, which takes ten times as long."""
    client = _get_global_client()
    assert client is not None
    return client.get_serve_details()


def engine_environment(sampling: SamplingConfig) -> dict[str, str]:
    """Environment variables that vLLM is imported with."""
    common = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if sampling.gpus_per_replica:
        return common
    return common | {
        # More threads than cores cost more than they give.
        "OMP_NUM_THREADS": str(max(1, int(sampling.cpus_per_replica / sampling.tensor_parallel_size))),
        # The first request with log-probs would compile for half a minute.
        "TORCHDYNAMO_DISABLE": "1",
        # The model runs in the engine's process, not in a further one that polls busily.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Ray decides which cores are whose; vLLM's own binding puts all engines on the same ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def _application(storage: Storage, settings: ReplicaSettings) -> serve.Application:
    sampling = settings.sampling
    deployment = PolicyServer.options(
        **_scaling(sampling),
        ray_actor_options={
            "num_cpus": sampling.cpus_per_replica,
            "num_gpus": sampling.gpus_per_replica,
            "runtime_env": {"env_vars": engine_environment(sampling)},
        },
    )
    return deployment.bind(storage.root, settings, secrets.token_hex())


def _scaling(sampling: SamplingConfig) -> dict[str, Any]:
    if sampling.max_replicas is None:
        return {"num_replicas": sampling.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": sampling.replicas,
            "max_replicas": sampling.max_replicas,
            "target_ongoing_requests": sampling.requests_per_replica,
        }
    }


def _serve_runs() -> bool:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def _check_port(host: str, port: int, name: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"cannot listen on {host}:{port} ({error.strerror}): "
                f"stop what uses it, or set --serving.{name} to a free one"
            ) from None
