"""HTTP on ports of a replica's own."""

import asyncio
import socket
from typing import Any

import uvicorn


class Listener:
    """Listens until it is closed; answers that are under way then are finished."""

    def __init__(self) -> None:
        self._servers: list[tuple[uvicorn.Server, asyncio.Task[None]]] = []

    async def listen(self, app: Any, host: str, port: int = 0, *, shared: bool = False) -> str:
        """The address that it answers at: port 0 is any free one.

        `shared`: with the other replicas of this machine, and the kernel divides connections among them.
        OSError: it cannot.
        """
        listening = _bound(host, port, shared=shared)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        task = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started:
            await asyncio.sleep(0.01)
        self._servers.append((server, task))
        return f"http://{host}:{listening.getsockname()[1]}"

    async def close(self) -> None:
        """Take no more requests; return when those that came before are answered."""
        for server, _ in self._servers:
            server.should_exit = True
        await asyncio.gather(*(task for _, task in self._servers))


def _bound(host: str, port: int, *, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
