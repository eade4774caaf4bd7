"""The one owner of a run's preferences, found by its jobs and by all who serve its policy."""

from typing import Any

import ray

from dpo_ray.buffer import PreferenceBuffer, default_url
from dpo_ray.config import BufferConfig
from dpo_ray.machines import NAMESPACE
from dpo_ray.storage import Storage

_BUFFER = "buffer of "
_RETRIED: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}


def buffer_actor(storage: Storage, config: BufferConfig) -> Any:
    """The run's one preference buffer, for the job and for whoever serves its policy; it outlives both."""
    url = config.url or default_url(storage)
    actor = ray.remote(PreferenceBuffer).options(
        num_cpus=0,
        name=_buffer_name(storage),
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_concurrency=64,
        **_RETRIED,
    )
    return actor.remote(url, storage, is_held=False)


def end_other_buffers(storage: Storage) -> None:
    """End the buffers of runs whose policy this cluster serves no more, for which nobody votes."""
    actors: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    for actor in actors:
        name, is_ours = actor["name"], actor["namespace"] == NAMESPACE
        if is_ours and name.startswith(_BUFFER) and name != _buffer_name(storage):
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))


def _buffer_name(storage: Storage) -> str:
    return f"{_BUFFER}{storage.root}"
