"""Runs the application until it is told to stop, and then lets every stream end whole."""

import asyncio
import os
import secrets
import signal
import socket
from types import FrameType

import uvicorn

from rcm_jax.errors import ArgumentError
from rcm_jax.serve.app import application
from rcm_jax.serve.engine import Engine
from rcm_jax.serve.options import SHORTEST_TOKEN, ServeOptions

TOKEN = "RCM_JAX_TOKEN"  # in the environment: flags are seen by all who list the processes of a machine


def bound(limits: ServeOptions) -> socket.socket:
    """The socket, before anything is loaded. Raises ArgumentError for an address that cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(limits.host, limits.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ArgumentError(
            f"{{host}} and {{port}} cannot be listened at: {error.strerror or error}", host=limits.host,
            port=limits.port,
        ) from None  # fmt: skip
    return listener


def token_of(limits: ServeOptions) -> str | None:
    """What readers must know: what was given, or is in the environment, or, where others can reach the server, a new
    one. Raises ValueError for one that is too short."""
    if limits.token is not None:
        return limits.token
    given = os.environ.get(TOKEN)
    if given and len(given) < SHORTEST_TOKEN:
        raise ValueError(f"{TOKEN} in the environment must have at least {SHORTEST_TOKEN} characters")
    return given or (None if limits.local else secrets.token_urlsafe(16))


def address(limits: ServeOptions, listener: socket.socket, token: str | None) -> str:
    """Where to look. A token of the environment's is not told again: what is printed is kept, in a container's log."""
    host = f"[{limits.host}]" if ":" in limits.host else limits.host
    query = "" if token in (None, os.environ.get(TOKEN)) else f"/?token={token}"
    return f"http://{host}:{listener.getsockname()[1]}{query}"


class Server(uvicorn.Server):
    """The first signal to stop ends the streams, then the server; a second one ends it at once."""

    def __init__(self, engine: Engine, token: str | None):
        self.engine, self.app = engine, application(engine, token)
        limits = engine.limits
        config = uvicorn.Config(
            self.app, log_level="warning", access_log=False, ws="websockets-sansio", lifespan="off",
            ws_max_size=max(limits.max_frame, 4 * limits.max_prompt + 1024) + 1024, ws_ping_interval=20.0,
            timeout_graceful_shutdown=int(limits.grace) + 1, server_header=False,
        )  # fmt: skip
        super().__init__(config)
        self._draining: asyncio.Task | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        served = self.app.state.served
        if served.draining or sig == signal.SIGQUIT:
            super().handle_exit(sig, frame)
            return
        served.draining = True
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = self._loop.create_task(self._end())

    async def _end(self) -> None:
        await self.app.state.served.drain()
        self.should_exit = True

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)


def run(engine: Engine, listener: socket.socket, token: str | None) -> None:
    """Until a signal."""
    try:
        Server(engine, token).run(sockets=[listener])
    finally:
        engine.stop(engine.limits.grace)
