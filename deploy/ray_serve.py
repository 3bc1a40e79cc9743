"""The page and its streams from many GPUs behind one address: Ray Serve, one replica a GPU.

  python deploy/ray_serve.py --replicas 8 [the flags of python -m rcm_jax.serve]

A stream is one WebSocket: it stays on the replica that it was given to, and ends with it. What else is asked for, like
the page and GET /api, is the same on all. The header X-Replica of an answer says whose it is; /health and /metrics are
those of one replica. Limits, like --streams, are of each replica. Without GPUs: --gpus 0.
"""

import argparse
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from rcm_jax.cli import one_line_errors
from rcm_jax.errors import ArgumentError
from rcm_jax.options import add_options, check_options, option, taken
from rcm_jax.ranges import at_least
from rcm_jax.serve.__main__ import checked
from rcm_jax.serve.__main__ import parser as serving_parser

NAME = "rcm_jax"
MARGIN = 5.0  # seconds between looks at a replica, and on top of what its streams are given to end in


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Arguments of the deployment."""

    replicas: int = option(1, "of the network, each with its own GPU", range=at_least(1))
    gpus: int = option(1, "of each replica; 0: it runs on CPUs", range=at_least(0))
    cpus: float = option(1.0, "of each replica, for Ray's reckoning", range=at_least(0))
    ray_address: str | None = option(
        None, "of a Ray cluster that runs, or auto (default: one on this machine, for as long as the command runs)"
    )

    def __post_init__(self) -> None:
        check_options(self)

    def check_room(self, have: dict[str, float]) -> None:
        """Raises ArgumentError where the machine has less than is asked for: Ray would wait for more."""
        for name, each in ("gpus", self.gpus), ("cpus", self.cpus):
            got = have.get(name[:-1].upper(), 0)
            if self.replicas * each > got:
                raise ArgumentError(
                    f"{{replicas}} with {{{name}}} each are too many: Ray finds {got:g} {name} here",
                    replicas=self.replicas, **{name: each},
                )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = serving_parser()
    p.prog, p.description = "python deploy/ray_serve.py", __doc__
    add_options(p.add_argument_group("Ray"), RayOptions)
    return p


class Signed:
    """Middleware: each answer says which replica it is from."""

    def __init__(self, app: Callable, name: str):
        self.app, self.header = app, (b"x-replica", name.encode())

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def signed(message: dict) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                message = message | {"headers": [*message.get("headers", ()), self.header]}
            await send(message)

        await self.app(scope, receive, signed)


def deployment(how: RayOptions, limits: Any, options: dict[str, Any], files: dict[str, Any], token: str | None) -> Any:
    """What Ray runs in each replica. A replica is ready when its network is compiled."""
    from ray import serve

    def build() -> Any:
        from rcm_jax.compilation import keep_programs
        from rcm_jax.serve.__main__ import started
        from rcm_jax.serve.app import application

        keep_programs()
        try:
            app = application(started(limits, options, files), token)
        except ArgumentError as error:
            raise ValueError(error.as_flags()) from None
        app.add_middleware(Signed, name=serve.get_replica_context().replica_tag)
        return app

    @serve.deployment(
        num_replicas=how.replicas,
        ray_actor_options={"num_gpus": how.gpus, "num_cpus": how.cpus},
        max_ongoing_requests=2 * limits.connections,  # the application refuses before Ray would let readers wait
        max_constructor_retry_count=1,  # flags that are wrong stay so
        health_check_period_s=MARGIN,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=limits.grace + MARGIN,
    )
    @serve.ingress(build)
    class Replica:
        """Ray's hooks; `app` is what `build` made."""

        def check_health(self) -> None:
            served = self.app.state.served
            if not (served.well or served.draining):
                raise RuntimeError("the engine does not run")

        async def drain(self) -> None:
            await self.app.state.served.drain()

        def __del__(self) -> None:
            if hasattr(self, "app"):
                self.app.state.served.engine.stop(limits.grace)

    return Replica


def run(args: argparse.Namespace) -> None:
    """Until a signal; then every stream ends whole."""
    how = RayOptions(**taken(vars(args), RayOptions))
    limits, options, files = checked(args)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody unless it is asked for
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise RuntimeError(f"a deployment needs {error.name}: pip install 'rcm_jax[ray]'") from None
    from rcm_jax.serve.server import address, bound, token_of

    token = token_of(limits)  # one for all replicas
    with bound(limits) as listener:  # a port that is taken is told before anything is started; Ray binds it itself
        where, port = address(limits, listener, token), listener.getsockname()[1]
    own = how.ray_address is None
    ray.init(how.ray_address or "local", **({"include_dashboard": False} if own else {}))
    try:
        if own:
            how.check_room(ray.cluster_resources())
        elif serve.status().proxies:
            raise RuntimeError("this cluster runs Ray Serve already; `serve shutdown` ends it")
        _serve(deployment(how, limits, options, files, token), limits, port, where)
    finally:
        ray.shutdown()


def _serve(replica: Any, limits: Any, port: int, where: str) -> None:
    from ray import serve

    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(http_options={"host": limits.host, "port": port}, logging_config=quiet)
    try:
        print("loading and compiling …", file=sys.stderr)
        handle = _running(replica, quiet)
        print(where, flush=True)
        _wait()
        handle.broadcast("drain").results(timeout_s=2 * limits.grace + MARGIN)
    finally:
        serve.shutdown()


def _running(replica: Any, logging: dict[str, Any]) -> Any:
    """Its handle. Raises in one line what a replica did not start for."""
    from ray import serve

    try:
        return serve.run(replica.bind(), name=NAME, logging_config=logging)
    except RuntimeError as error:
        told = [each.message for each in serve.status().applications[NAME].deployments.values() if each.message]
        raise RuntimeError((told or [str(error)])[0].strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def _wait() -> None:
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    told.wait()


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with one_line_errors():
        run(args)


if __name__ == "__main__":
    main()
