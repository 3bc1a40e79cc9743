"""The server as an ASGI application: a page, streams over WebSockets and HTTP, what it says of itself."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from rcm_jax.causal.policies import POLICIES
from rcm_jax.serve import metrics, wire
from rcm_jax.serve.desk import Desk, Full
from rcm_jax.serve.engine import Engine
from rcm_jax.serve.gate import Gate
from rcm_jax.serve.socket import Reader
from rcm_jax.version import version

STATIC = Path(__file__).parent / "static"
OPEN = ("/health", "/static/", "/favicon.ico")  # to all: a load balancer has no token, and these are no secrets
STUCK = 60.0  # seconds without a sign from the engine's thread
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; media-src 'self' blob:; img-src 'self' data: blob:; "
    "connect-src 'self' ws: wss:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Guard:
    """Middleware: refuses what the gate refuses, before anything else is done, and counts connections."""

    def __init__(self, app: Callable, gate: Gate, most: int):
        self.app, self.gate, self.most, self.connected = app, gate, most, 0

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        why = None if scope["path"].startswith(OPEN) else self.gate.refusal(HTTPConnection(scope))
        status = 403
        if why is None and self.connected >= self.most:
            why, status = f"there are {self.most} connections, and no more are taken", 503
        if why is not None:
            metrics.REFUSALS.labels(why).inc()
            if scope["type"] == "websocket":  # before it is accepted this is answered with 403
                await send({"type": "websocket.close", "code": 1008, "reason": why})
            else:
                await PlainTextResponse(why + "\n", status)(scope, receive, send)
            return
        self.connected += 1
        metrics.CONNECTIONS.set(self.connected)
        try:
            await self.app(scope, receive, send)
        finally:
            self.connected -= 1
            metrics.CONNECTIONS.set(self.connected)


class Served:
    """What the routes need. draining: no more streams are opened."""

    def __init__(self, engine: Engine):
        self.engine, self.desk = engine, Desk(engine.limits.streams, engine.limits.queue)
        self.draining = False

    @property
    def well(self) -> bool:
        """Whether the engine runs."""
        return self.engine.alive and time.monotonic() - self.engine.beat < STUCK

    async def drain(self) -> None:
        """Ends all streams, whole, and takes no more; waits until their readers have all of it, but no longer than the
        limits say."""
        self.draining = True
        loop, grace = asyncio.get_running_loop(), self.engine.limits.grace
        await asyncio.to_thread(self.engine.stop, grace)
        until = loop.time() + grace
        while self.desk.active and loop.time() < until:
            await asyncio.sleep(0.02)

    # --- pages --------------------------------------------------------------------------------------------------------

    async def page(self, _: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers=HEADERS)

    async def nothing(self, _: Request) -> Response:
        return Response(status_code=204)  # browsers ask for a picture of every page

    async def about(self, _: Request) -> Response:
        engine = self.engine
        return JSONResponse({
            "version": version(), "network": str(engine.pipe.opened.options.dit_path), "world": engine.pipe.world.name,
            "prompt": engine.pipe.world.prompt, "fps": engine.pipe.world.fps, "size": engine.size,
            "policies": list(POLICIES), "steps": engine.steps, "settings": engine.settings,
            "options": {k: str(v) for k, v in engine.options.items()},
            "limits": {name: getattr(engine.limits, name) for name in
                       ("streams", "queue", "max_seconds", "idle_seconds", "max_prompt", "max_frame", "messages")},
            "GET /api/video": "an MP4 that plays while it comes: ?prompt=…&seconds=…, and any field of open",
            "WebSocket /api/stream": wire.documented(),
            "GET /health": "200 while streams are made, else 503", "GET /metrics": "for Prometheus",
        })  # fmt: skip

    async def health(self, _: Request) -> Response:
        well, quiet = self.well and not self.draining, time.monotonic() - self.engine.beat
        words = {"streams": self.desk.active, "draining": self.draining, "engine_seconds_ago": round(quiet, 1)}
        return JSONResponse({"well": well} | words, 200 if well else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(generate_latest(metrics.REGISTRY), media_type=CONTENT_TYPE_LATEST)

    # --- streams ------------------------------------------------------------------------------------------------------

    async def stream(self, socket: WebSocket) -> None:
        await Reader(socket, self.engine, self.desk).serve()

    async def video(self, request: Request) -> Response:
        """As long as is asked for; a reader that takes its time is waited for."""
        try:
            opening, seconds = _asked(dict(request.query_params))
            self.engine.check_prompt(opening.prompt)
        except wire.BadMessage as error:
            return PlainTextResponse(f"{error}\n", 400)
        place = self.desk.place(lambda _: None)
        try:
            await place.__aenter__()
        except Full as error:
            return PlainTextResponse(f"{error}\n", 503)
        parts = self._parts(opening, seconds, place)
        first = await anext(parts)
        if isinstance(first, str):
            await parts.aclose()
            return PlainTextResponse(f"{first}\n", 400)

        async def body() -> AsyncIterator[bytes]:
            async with contextlib.aclosing(parts):
                yield first
                async for part in parts:
                    if isinstance(part, bytes):
                        yield part

        return StreamingResponse(body(), media_type="video/mp4", headers={"Cache-Control": "no-store"})

    async def _parts(self, opening: wire.Open, seconds: float, place: Any) -> AsyncIterator[bytes | str]:
        """The video's parts; a text is why there is none."""
        loop, out = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(what: str | bytes) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(out.put_nowait, what)

        show = self.engine.open(opening, deliver)
        try:
            until, got, what = 0.0, 0, None
            while until < seconds or not isinstance(what, bytes):
                what = await out.get()
                if what == b"":
                    return
                if isinstance(what, bytes):
                    got += 1
                    yield what
                    show.hear(wire.More(chunks=got + 2))
                    continue
                said = json.loads(what)
                if said["type"] == "chunk":
                    until = said["start"] + said["seconds"]
                elif said["type"] == "end" and said["wrong"] and not got:
                    yield said["why"]
        finally:
            show.hear(wire.Close())
            await place.__aexit__(None, None, None)


def _asked(query: dict[str, str]) -> tuple[wire.Open, float]:
    query.pop("token", None)
    seconds = query.pop("seconds", "10")
    opening = wire.opening(query)
    try:
        if 0 < float(seconds) < float("inf"):
            return opening, float(seconds)
    except ValueError:
        pass
    raise wire.BadMessage(f"seconds must be a number above 0, not {seconds[:20]!r}")


def application(engine: Engine, token: str | None) -> Starlette:
    """Its `state.served` is what the routes use. The engine is started by who serves it."""
    served = Served(engine)
    routes = [
        Route("/", served.page),
        Route("/favicon.ico", served.nothing),
        Route("/api", served.about),
        Route("/api/video", served.video),
        Route("/health", served.health),
        Route("/metrics", served.metrics),
        WebSocketRoute("/api/stream", served.stream),
        Mount("/static", Static(directory=STATIC)),
    ]
    guard = Middleware(Guard, gate=Gate(engine.limits, token), most=engine.limits.connections)
    app = Starlette(routes=routes, middleware=[guard])
    app.state.served = served
    return app


class Static(StaticFiles):
    """With the headers of the page."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response
