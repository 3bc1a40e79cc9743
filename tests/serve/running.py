"""A server in this process, on a port of its own, for tests that speak with it as its readers do."""

import contextlib
import threading
import time

import rcm_jax
from rcm_jax.serve.engine import Engine
from rcm_jax.serve.options import ServeOptions
from rcm_jax.serve.server import Server, bound

OPTIONS = {"cache_policy": "sliding_window", "window_blocks": 3, "num_steps": 1}


class Running:
    def __init__(self, engine, limits, token=None):
        self.engine, self.limits = engine, limits
        engine.limits = limits
        listener = bound(limits)
        self.port = listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.url, self.socket = f"http://{self.address}", f"ws://{self.address}/api/stream"
        self.server = Server(engine, token)
        self.served = self.server.app.state.served
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        until(lambda: self.server.started)

    @property
    def shows(self):
        return list(self.engine._shows)

    def stop(self):
        self.server.should_exit = True
        self._thread.join(20)


def until(true, seconds=20.0):
    """Waits until it is so."""
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.01)
    return value


@contextlib.contextmanager
def running(pipe=None, options=OPTIONS, **limits):
    engine = Engine(pipe or rcm_jax.load("toy_causal"), ServeOptions(port=0, **limits), options)
    engine.start()
    with served(engine, **limits) as server:
        yield server
    engine.stop(5)


@contextlib.contextmanager
def served(engine, *, token=None, **limits):
    """By an engine that runs, under limits of its own."""
    server = Running(engine, ServeOptions(port=0, **limits), token)
    try:
        yield server
    finally:
        server.stop()
        until(lambda: not server.shows)
